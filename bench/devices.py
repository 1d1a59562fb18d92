"""Device predictions against this machine: seconds and peak bytes of real steps beside predicted.

    python -m bench.devices
    python -m bench.devices --device cuda --rounds 20

The machine's own rates are measured first; a step's floor comes from them as a device's comes from
its data sheet. What a call costs the host is measured on steps too small to compute anything.
`expected` takes the other rows' median ratio of measured to floor, so that no row predicts itself.
On a GPU whose data sheet is bundled the floor by the sheet stands beside. Writes
bench/results/(cpu|cuda)/devices.json, and the ratios that `ffengine plan --device-profile` states
into ffengine/devices/measured.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import machine, results
from ffengine import models
from ffengine.devices import catalog, rates
from ffengine.devices.prediction import Prediction, Predictor
from ffengine.engine.batch import Batch, label_count
from ffengine.engine.trainer import Trainer

#: Convolutions on large and small maps, dense layers, batch statistics; batches small and usual.
CASES = (("deeperforward/tinycnn", 32), ("deeperforward/tinycnn", 128),
         ("deeperforward/cnn14", 32), ("deeperforward/resnet17", 32), ("trifecta/fcn", 32),
         ("fflib/ffnn", 128), ("cff/fixed", 128))
PRECISIONS = ("fp32", "bf16")
#: A step of this many calls and next to no arithmetic.
SMALLEST = ("deeperforward/tinycnn", 1, {"widths": (10, 10, 10, 10), "image_size": 8})


@dataclass
class Case:
    """A trainer and a batch: the real step, and its prediction."""

    model: str
    batch: int
    precision: str
    trainer: Trainer
    item: Batch

    @classmethod
    def of(cls, model: str, batch: int, precision: str, device: torch.device,
           **options: Any) -> Case:
        torch.manual_seed(0)
        net = models.create(model, **options).to(device)
        trainer = Trainer(net, batch_size=batch, precision=precision, progress=False)
        x = torch.rand(batch, *net.in_shape).to(device)
        y = torch.randint(label_count(net), (batch,)).to(device)
        return cls(model, batch, precision, trainer, Batch(x, y))

    def step(self) -> None:
        self.trainer.step(self.item, epoch=0, iteration=0)

    def on(self, device: catalog.Device) -> Prediction:
        """The step at a device's rates, under the plan that the trainer uses."""
        planning = self.trainer.planning
        return Predictor(planning.job).of_plan(device, device.rates(self.precision),
                                               planning.plans(self.batch).at(0))

    def metered(self) -> int:
        self.trainer.meter_next()
        self.step()
        return self.trainer.peak_bytes


def call_seconds(this: catalog.Device, device: torch.device, rounds: int) -> float:
    """Least seconds of the host a call, from a step with next to no arithmetic."""
    model, batch, options = SMALLEST
    case = Case.of(model, batch, "fp32", device, **options)
    times = machine.interleaved({model: case.step}, 10 * rounds, warmup=3)
    return min(times[model]) / case.on(this).calls


def this_machine(device: torch.device, before: catalog.Device | None = None) -> catalog.Device:
    """This machine's profile measured now; its rates the better of now and `before`."""
    for measured in (rates.copy_rate, rates.product_rate):
        measured.cache_clear()
    now = catalog.this_machine(device, PRECISIONS)
    if before is None:
        return now
    flops = {p: max(f, before.flops_per_second[p], key=lambda figure: figure.value)
             for p, f in now.flops_per_second.items()}
    copy = max((d.figures["bytes_per_second"] for d in (now, before)), key=lambda f: f.value)
    return replace(now, flops_per_second=flops, figures={**now.figures, "bytes_per_second": copy})


def timed(cases: list[Case], rounds: int) -> list[list[float]]:
    """Seconds of every case's steps, the cases in turn."""
    for case in cases:
        case.step()  # states come to life
    times = machine.interleaved({str(i): case.step for i, case in enumerate(cases)}, rounds)
    return [times[str(i)] for i in range(len(cases))]


def compared(cases: list[Case], times: list[list[float]], this: catalog.Device,
             sheet: catalog.Device | None, host: float) -> list[dict[str, Any]]:
    """A row a case: floors, seconds, bytes. `host`: what `call_seconds` gave."""
    rows = []
    for case, taken in zip(cases, times, strict=True):
        found, seconds = case.on(this), machine.spread(taken)
        beside = 0.0 if this.kind == "cuda" else host * found.calls
        rows.append({
            "model": case.model, "batch": case.batch, "precision": case.precision,
            "floor_seconds": found.floor, "calls": found.calls, "bound": found.bound,
            "seconds": seconds, "ratio": (seconds["median"] - beside) / found.floor,
            "sheet_floor_seconds": None if sheet is None else case.on(sheet).floor,
            "planned_bytes": found.plan.peak_bytes, "metered_bytes": case.metered()})
    for row in rows:
        others = [r["ratio"] for r in rows if r is not row and r["precision"] == row["precision"]]
        middle = statistics.median(others or [row["ratio"]])
        slow = catalog.Slowdown(middle, middle, middle, host, "", this.kind)
        row["expected_seconds"] = slow.expected(this.kind, row["floor_seconds"], row["calls"])[1]
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Measured over floor by precision: smallest, median, largest row."""
    return {p: machine.spread([r["ratio"] for r in rows if r["precision"] == p])
            for p in dict.fromkeys(r["precision"] for r in rows)}


def keep(rows: list[dict[str, Any]], kind: str, host: float) -> None:
    """Into the package: what a step takes beside its floor, on a device of this kind."""
    known = results.read(catalog.MEASURED, "slowdown")["slowdown"] if (
        catalog.MEASURED.exists()) else {}
    facts = machine.facts()
    where = f"{facts['gpu'] or facts['cpu']}, threads: {facts['threads']}, {facts['date']}"
    known[kind] = {"where": where, "rows": len(rows), "ratios": ratios(rows), "call_seconds": host}
    results.write(catalog.MEASURED, "slowdown", {"slowdown": known})


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':24s} {'batch':>5} {'':4} {'floor':>8} {'sheet':>8} {'expected':>8} "
             f"{'measured':>8} {'min..max':>15} {'/floor':>6} {'/exp.':>6} {'planned':>8} "
             f"{'metered':>8}   ms, MB"]
    for r in rows:
        s, sheet = r["seconds"], r["sheet_floor_seconds"]
        lines.append(
            f"{r['model']:24s} {r['batch']:5d} {r['precision']:4} {1e3 * r['floor_seconds']:8.2f} "
            f"{'-' if sheet is None else f'{1e3 * sheet:.2f}':>8} "
            f"{1e3 * r['expected_seconds']:8.2f} {1e3 * s['median']:8.2f} "
            f"{1e3 * s['min']:7.2f}-{1e3 * s['max']:<7.2f} {r['ratio']:6.2f} "
            f"{s['median'] / r['expected_seconds']:6.2f} {r['planned_bytes'] / 1e6:8.1f} "
            f"{r['metered_bytes'] / 1e6:8.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.devices", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="models whose name has this word")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    try:
        this = this_machine(device)
        cases = [Case.of(model, batch, precision, device) for precision in PRECISIONS
                 for model, batch in CASES if (args.only or "") in model]
        host = call_seconds(this, device, args.rounds)
        times = timed(cases, args.rounds)
        this = this_machine(device, before=this)  # a busy moment must not look like a slow machine
        rows = compared(cases, times, this, catalog.sheet_of(device), host)
    except ValueError as bad:
        print(f"bench.devices: {bad}", file=sys.stderr)
        return 2
    flops = ", ".join(f"{p} {f.value / 1e9:.0f}" for p, f in this.flops_per_second.items())
    print(f"{this.title}: {this.value('bytes_per_second') / 1e9:.1f} GB/s, {flops} GFLOP/s, "
          f"{1e6 * host:.0f} us of the host a call")
    print(table(rows))
    if not args.dry:
        results.write(Path(__file__).parent / "results" / device.type / "devices.json", "devices",
                      {"device": this.values(), "call_seconds": host, "rows": rows,
                       "ratios": ratios(rows)})
        keep(rows, device.type, host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
