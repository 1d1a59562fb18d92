"""A profile as text: one line a layer, then segments, the rest and the whole."""

from __future__ import annotations

from ffengine.engine.memory.budget import megabytes
from ffengine.engine.memory.meter import KINDS
from ffengine.profile.spans import Phase, Profile, Sum
from ffengine.words import plan

#: Column heads of the parts, in the order they are printed.
HEADS = {"forward": "forward", "sweep": "sweep", "update": "update", "linear_step": "stream",
         "input_gradient": "input grad", "maps": "maps", "head": "head", "rest": "rest"}
WORDS = {"parameter": "parameters", "state": "optimizer states", "gradient": "gradients",
         "feature": "features", "scratch": "scratch inside a call"}


def text(profile: Profile) -> str:
    """The whole profile."""
    lines = [title(profile), machine(profile)]
    for phase in profile.phases:
        lines += ["", *phase_lines(profile, phase)]
    lines += ["", HOW.format(steps=profile.steps)]
    return "\n".join(lines)


HOW = ("Times are medians of {steps} unmetered steps. Memory is of one metered step, laid on those "
       "times call by call; inside a call its changes are in order, their moments are not known. "
       "FLOP are those of products. Roofline: the least time at this machine's copy rate and "
       "product rate of each call's size, measured cold and right after the steps; above 100 % the "
       "operands were still in cache, or the machine was busier then.")


def title(profile: Profile) -> str:
    budget = "" if profile.budget is None else f", budget {megabytes(profile.budget)}"
    return (f"{profile.model}, batch {profile.batch} ({profile.rows} rows), {profile.precision}, "
            f"on {profile.device}, back-end {profile.backend}: planned "
            f"{megabytes(profile.planned_bytes)}{budget}")


def machine(profile: Profile) -> str:
    rates = profile.rates
    return (f"this machine: {rates['bytes_per_second'] / 1e9:.1f} GB/s copied, "
            f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s in {profile.precision} products, "
            f"{rates['launch_seconds'] * 1e6:.1f} us a call")


def headline(profile: Profile, phase: Phase) -> str:
    """What one sees, in a sentence or two."""
    peak, where = phase.peak, phase.at_peak()
    live = ", ".join(f"{megabytes(n)} {WORDS[k]}" for k, n in zip(KINDS, peak.live, strict=True)
                     if n)
    planned = phase.plan.peak_bytes
    said = (f"Memory peaks at {megabytes(peak.total)}, {1e3 * peak.time:.2f} ms into a step of "
            f"{1e3 * phase.seconds:.2f} ms, {place(profile, phase)} ({where.name}). Live there: "
            f"{live}. The plan said {megabytes(planned)}")
    if profile.budget is not None:
        said += f", the budget {megabytes(profile.budget)}"
    if phase.allocated_bytes is not None:
        said += f"; the CUDA allocator held {megabytes(phase.allocated_bytes)}"
    if phase.joules is not None:
        said += f". A step took {phase.joules:.3g} J of the GPU"
    return said + "."


def place(profile: Profile, phase: Phase) -> str:
    """Where the peak lies, in words."""
    where = phase.at_peak()
    if where.layer is None:
        return "outside the layers"
    said = f"in layer {where.layer}"
    if where.segment is not None and len(phase.plan.segments) > 1:
        said += f" of segment {where.segment}"
    if where.tile is not None and where.tile[1] < profile.rows:
        said += f", rows {where.tile[0]}-{sum(where.tile) - 1}"
    return said


def phase_lines(profile: Profile, phase: Phase) -> list[str]:
    total, parts = phase.total(), [p for p in HEADS if p in phase.total().parts]
    spread = phase.measured
    lines = [f"phase {phase.number}: {phase.label} in training (epoch {phase.epoch}, batch "
             f"{phase.iteration}), {plan(phase.plan.cuts, phase.plan.tile, profile.rows)}: "
             f"{1e3 * phase.seconds:.2f} ms a step (whole steps {1e3 * spread['min']:.2f} to "
             f"{1e3 * spread['max']:.2f}), {100 * total.share:.0f} % of the roofline",
             headline(profile, phase),
             f"{'layer':>7} {'seg':>3} {'tile':>4} {'input':>12} {'MFLOP':>8} {'MB moved':>8} "
             + " ".join(f"{HEADS[p]:>10}" for p in parts)
             + f" {'ms':>9} {'roofline':>9} {'bound by':>10} {'peak MB':>8}"]
    for i, row in phase.by_layer().items():
        tile, segment = phase.tile_of(i), phase.segment_of(i)
        shape = "x".join(map(str, profile.shapes[i]))
        lines.append(f"{i:>7} {'-' if segment is None else segment:>3} "
                     f"{tile or profile.rows:>4} {shape:>12} " + numbers(row, parts))
    if len(phase.by_segment()) > 1:
        lines += [f"{f'segm. {i}':>7} {'':21} " + numbers(row, parts)
                  for i, row in phase.by_segment().items()]
    lines.append(f"{'outside':>7} {'':21} " + numbers(phase.outside(), parts))
    lines.append(f"{'all':>7} {'':21} " + numbers(total, parts))
    return lines


def numbers(row: Sum, parts: list[str]) -> str:
    times = " ".join(f"{1e3 * row.parts[p]:>10.3f}" if p in row.parts else f"{'':>10}"
                     for p in parts)
    return (f"{row.flops / 1e6:>8.1f} {row.bytes / 1e6:>8.2f} {times} {1e3 * row.seconds:>9.3f} "
            f"{100 * row.share:>7.0f} % {row.bound:>10} {row.peak_bytes / 1e6:>8.2f}")
