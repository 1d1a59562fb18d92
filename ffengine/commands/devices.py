"""`ffengine devices`, and `--device-profile`: what a training step would take on another device.

`plan` predicts. `train` on a GPU runs with the device's memory as its budget, which the allocator
enforces, and says what of the device was not emulated.
"""

from __future__ import annotations

import argparse
from typing import Any

from ffengine import words
from ffengine.commands.options import device_of
from ffengine.devices import catalog
from ffengine.devices.catalog import Device
from ffengine.devices.prediction import NO_LAYER, Prediction, Predictor, every_phase
from ffengine.engine.memory.budget import megabytes, parse_bytes
from ffengine.engine.memory.plans import Job
from ffengine.engine.trainer import Trainer

#: --device-profile NAME for one row a bundled device.
ALL = "all"


def run_devices(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The bundled devices, or what a file of one's own looks like."""
    if args.template:
        return catalog.TEMPLATE.rstrip(), []
    found = [catalog.load(name) for name in catalog.names()]
    head = (f"{'':17s} {'GB':>6} {'usable':>7} {'GB/s':>7} {'fp32':>8} {'fp16':>8} {'bf16':>8}  "
            f"TFLOP/s, dense")
    return "\n".join([head, *map(device_row, found)]), [d.values() for d in found]


def device_row(device: Device) -> str:
    rates = "".join(
        f" {device.flops_per_second[p].value / 1e12:8.3g}" if p in device.flops_per_second
        else f" {'-':>8}" for p in ("fp32", "fp16", "bf16"))
    only = "; prediction only" if device.prediction_only else ""
    mode = f", {device.mode}" if device.mode else ""
    return (f"{device.name:17s} {device.value('memory_bytes') / 1e9:6.1f} "
            f"{device.usable_bytes / 1e9:7.1f} {device.value('bytes_per_second') / 1e9:7.0f}"
            f"{rates}  {device.title}{mode}{only}")


def plan_on(args: argparse.Namespace, job: Job) -> tuple[str, Any]:
    """`plan --device-profile`: steps on one device, or a row for every bundled one.

    Of a schedule with several phases the slowest step is shown, and the JSON has all.
    """
    budget, settings = parse_bytes(args.memory_budget), job.settings
    head = f"{args.model}, batch {settings.batch_size}, {settings.precision}"
    if args.device_profile != ALL:
        device = catalog.load(args.device_profile)
        device.rates(settings.precision)  # refuses before the long part
        found = [phase.on(device, budget) for phase in every_phase(job)]
        return f"{head}, on {device.name}: {prediction_text(found)}", prediction_values(args, found)
    phases, rows = every_phase(job), []
    values: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    for device in map(catalog.load, catalog.names()):
        if settings.precision not in device.flops_per_second:
            rows.append(f"  {device.name:17s} no {settings.precision} rate; known: "
                        f"{', '.join(device.flops_per_second)}")
            continue
        found = [phase.on(device, budget) for phase in phases]
        rows.append(prediction_row(found))
        values.append(prediction_values(args, found))
        notes[f"  expected: {why_expected(slowest(found))}"] = None
    titles = (f"  {'':17s} {'fits':4} {'peak MB':>9} {'usable MB':>10} {'floor ms':>9} "
              f"{'expected ms':>24} {'img/s at most':>13}  bound by")
    return "\n".join([head, titles, *rows, *notes]), values


def slowest(found: list[Prediction]) -> Prediction:
    return max(found, key=lambda p: p.floor)


def prediction_values(args: argparse.Namespace, found: list[Prediction]) -> dict[str, Any]:
    """The slowest phase's step, whether all fit, and the phases."""
    return {"model": args.model, **slowest(found).values(),
            "fits": all(p.fits for p in found),
            "peak_bytes": max(p.plan.peak_bytes for p in found),
            "phases": [{"turn": p.turn, "fits": p.fits, "peak_bytes": p.plan.peak_bytes,
                        "floor_seconds": p.floor} for p in found]}


def prediction_row(found: list[Prediction]) -> str:
    slow, device = slowest(found), found[0].device
    peak = max(p.plan.peak_bytes for p in found)
    return (f"  {device.name:17s} {'yes' if all(p.fits for p in found) else 'no':4} "
            f"{peak / 1e6:9.1f} {device.usable_bytes / 1e6:10.1f} {1e3 * slow.floor:9.2f} "
            f"{expected_ms(slow):>24} {slow.batch / slow.floor:13.0f}  {slow.bound}"
            + ("; prediction only" if device.prediction_only else ""))


def expected_ms(found: Prediction) -> str:
    """Milliseconds: median (low-high)."""
    return "-" if found.expected is None else "{1:.1f} ({0:.1f}-{2:.1f})".format(
        *(1e3 * s for s in found.expected))


def prediction_text(found: list[Prediction]) -> str:
    """A device's predictions for people."""
    slow, device = slowest(found), found[0].device
    needs = max(found, key=lambda p: p.plan.peak_bytes).plan
    usable = (f"of {megabytes(device.usable_bytes)} usable "
              f"({device.figures['usable'].source})")
    fits = (f"fits: peak {megabytes(needs.peak_bytes)} {usable}" if all(p.fits for p in found) else
            f"does not fit: the smallest plan needs {megabytes(needs.peak_bytes)}, {usable}")
    mode = f", {device.mode}" if device.mode else ""
    rows = [f"{device.title}{mode}", f"  {fits}",
            f"  plan: {words.plan(needs.cuts, needs.tile, needs.batch)}"]
    if len(found) > 1:
        rows.append(f"  {len(found)} phases, a step of each at least (ms): " + ", ".join(
            f"{p.turn} {1e3 * p.floor:.2f}" for p in found) + "; the slowest:")
    rows += [f"  a step takes at least {1e3 * slow.floor:.2f} ms "
             f"({slow.batch / slow.floor:.0f} images/s): "
             + ", ".join(f"{1e3 * s:.2f} ms {name}" for name, s in slow.by_bound.items()),
             f"  expected {expected_ms(slow)} ms: {why_expected(slow)}"]
    if slow.rehearsed_on != device.kind:
        rows.append(f"  the peak counts the scratch of {slow.rehearsed_on} kernels: torch here "
                    f"cannot rehearse {device.kind}")
    if device.note:
        rows.append(f"  {device.note}")
    rows.append(f"  {'layer':>6} {'MB moved':>10} {'GFLOP':>9} {'kernels':>8} {'ms':>9}  bound by")
    rows += [f"  {'-' if s.layer == NO_LAYER else s.layer:>6} {s.bytes / 1e6:10.2f} "
             f"{s.flops / 1e9:9.3f} {s.kernels:8d} {1e3 * s.floor:9.3f}  {s.bound}"
             for s in slow.shares]
    return "\n".join(rows)


def why_expected(found: Prediction) -> str:
    """The measured range behind `expected`, and on what it was measured."""
    slow, kind = found.slow, found.device.kind
    if slow is None:
        return f"no machine has been measured in {found.precision}"
    other = "" if slow.kind == kind else f"; no {kind} device measured"
    return (f"steps took {slow.median:.2f} ({slow.low:.2f}-{slow.high:.2f}) times their floors on "
            f"{slow.where}, and a call {1e6 * slow.call_seconds:.0f} us of the host{other}")


def emulate(args: argparse.Namespace) -> Device | None:
    """The device of --device-profile for a run: its usable memory becomes the run's budget.

    Raises:
        ValueError: no such device, no GPU to run on, a device for predictions only, or one without
            a rate for the precision.
    """
    if args.device_profile is None:
        return None
    device = catalog.load(args.device_profile)
    if device.prediction_only:
        raise ValueError(f"[device] {device.name} is for predictions only (`ffengine plan`): "
                         f"{device.note}")
    if device_of(args).type != "cuda":
        raise ValueError(f"[device] a run with --device-profile {device.name} expected a GPU, got "
                         "cpu; `ffengine plan` predicts without one")
    device.rates(args.precision or "fp32")
    budget = parse_bytes(args.memory_budget)
    args.memory_budget = min(device.usable_bytes, budget or device.usable_bytes)
    return device


def emulation(device: Device, trainer: Trainer, batch: int, seconds: float,
              epoch: int = 0) -> tuple[str, dict[str, Any]]:
    """What `seconds` a step, measured here in the device's memory, say of the device.

    Args:
        batch: samples of the steps.
        epoch: whose phase they are of.
    """
    precision = trainer.settings.precision
    here = catalog.sheet_of(trainer.device) or catalog.this_machine(trainer.device, (precision,))
    predictor = Predictor(trainer.planning.job, epoch)
    plan = trainer.planning.plans(batch).at(epoch)
    there, ours = (predictor.of_plan(d, d.rates(precision), plan) for d in (device, here))
    apart = catalog.not_emulated(device, here, precision)
    text = (f"memory of {device.name}: {megabytes(device.usable_bytes)}, enforced by the allocator"
            f"\n  measured {1e3 * seconds:.2f} ms a step on {here.title}, at least "
            f"{1e3 * ours.floor:.2f} by its rates"
            f"\n  {device.name}: at least {1e3 * there.floor:.2f} ms, expected "
            f"{expected_ms(there)} ms\n  not emulated (there, here): " + ", ".join(
                f"{key} {v['there']:.4g}, {v['here']:.4g} ({v['ratio']:.2g})"
                for key, v in apart.items()))
    return text, {"device": device.values(), "here": here.values(), "measured_seconds": seconds,
                  "predicted": there.values(), "predicted_here": ours.values(),
                  "not_emulated": apart}
