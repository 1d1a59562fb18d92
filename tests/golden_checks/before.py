"""What every model's step is now, exactly: a redesign of the engine may change none of it.

    python -m tests.golden_checks.before [--write]      compare with, or renew, before.json

A row is a phase of a model's schedule after three steps on eight samples, in C++ by the plan that
the trainer chooses and by one within the fewest bytes, and on the reference: planned bytes, cuts
and tiles, what the third step launches, and a digest of the weights and running statistics, bit by
bit. Bits depend on the processor and its instruction set, on torch and its library: `needs` says
which the file is of, and elsewhere nothing is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

import ffengine as ff
from bench.compare import differences, incomparable
from bench.counters import device_needs
from bench.steps import Launches
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.plans import phase_starts
from ffengine.env import cpu_name
from ffengine.nn import LocalNet
from tests.models import every

FILE = Path(__file__).with_suffix(".json")
SAMPLES, STEPS = 8, 3
#: Exit status where nothing can be compared.
ELSEWHERE = 77

Row = dict[str, Any]


def needs() -> dict[str, str]:
    """What the rows depend on beside the code."""
    return {**device_needs("cpu"), "cpu": cpu_name(),
            "library": torch.backends.cpu.get_cpu_capability()}


def rows() -> Iterator[tuple[str, Row]]:
    for model, precision in product(every.NAMES, ("fp32", "bf16")):
        made = trainer(model, precision=precision, backend="cpu")
        sides = {"cpu": made}
        planning = made.planning
        if made.schedule.planned:
            least = max(planning.planner(SAMPLES, epoch).smallest().peak_bytes
                        for epoch in phase_starts(made.schedule))
            sides["cpu leanest"] = trainer(model, precision=precision, backend="cpu",
                                           memory_budget=least)
        if precision == "fp32":  # by the same cuts and tiles: a search of its own takes a minute
            sides["reference"] = trainer(model, precision=precision, backend="reference",
                                         plan=planning.plans(SAMPLES).at(0))
        for side, run in sides.items():
            for epoch, row in phases(run):
                yield f"{model} {precision} {side} epoch {epoch}", row


def trainer(model: str, plan: Plan | None = None, **settings: Any) -> ff.Trainer:
    torch.manual_seed(0)
    # costs measured here would choose other plans from run to run
    return ff.Trainer(ff.models.create(model, **every.options(model)), epochs=1, lr=1e-3,
                      batch_size=SAMPLES, progress=False,
                      memory=ff.Memory(costs="modelled", plan=plan), **settings)


def phases(made: ff.Trainer) -> Iterator[tuple[int, Row]]:
    """(first epoch, row) of every phase, one after the other."""
    x, y = every.batch(made.net, SAMPLES)
    for epoch in phase_starts(made.schedule):
        for step in range(STEPS - 1):
            made.step(x, y, epoch=epoch, iteration=step)
        with Launches() as launches:
            made.step(x, y, epoch=epoch, iteration=STEPS - 1)
        row: Row = {"kernels": sum(launches.kernels.values()),
                    "library_ops": sum(launches.library.values()), "weights": digest(made.net)}
        if made.schedule.planned:
            plan = made.planning.plans(SAMPLES).at(epoch)
            row = {"peak_bytes": plan.peak_bytes, "floor_bytes": plan.floor_bytes,
                   "cuts": list(plan.cuts), "tiles": [s.tile for s in plan.segments], **row}
        yield epoch, row


def digest(net: LocalNet) -> str:
    """Of every parameter and buffer by name, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, t in sorted(net.state_dict().items()):
        found.update(f"{name} {tuple(t.shape)} {t.dtype}\0".encode())
        found.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def read() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text()))


def write(found: dict[str, Any]) -> None:
    """A line for each row, so that what moved is read in a diff."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}"
                       for name, row in found["rows"].items())
    FILE.write_text(f'{{"needs": {json.dumps(found["needs"])},\n "rows": {{\n{lines}\n}}}}\n')


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 alike, 1 different, ELSEWHERE."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden_checks.before",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    renew = parser.parse_args(argv).write
    found: dict[str, Any] = {"needs": needs()}
    if not renew and (reason := incomparable(read(), found)):
        print(reason)
        return ELSEWHERE
    torch.set_num_threads(1)
    found["rows"] = dict(rows())
    if renew:
        write(found)
        return 0
    moved = list(differences(read(), found))
    print("\n".join(moved) or f"{len(found['rows'])} rows alike")
    return int(bool(moved))


if __name__ == "__main__":
    sys.exit(main())
