"""A resident process that times the cases of one tree, a turn at a time, as its parent asks.

    python bench/worker.py TREE HARNESS

Imports ffengine and its kernels from TREE and from nowhere else, and the cases from TREE's own
bench/cases.py where it has one, else from HARNESS (the tree this file lies in). One JSON request a
line on standard input, one JSON answer a line on what was standard output; everything else that is
printed goes to standard error. A script, not a module of `bench`: that name belongs to the tree.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Seconds of processor time that one block of calls is made to last.
BLOCK_SECONDS = 0.006
#: Blocks a turn; the least of them counts, since disturbances only ever add. None is begun after
#: this many seconds of processor time.
BLOCKS, TURN_SECONDS = 3, 0.03


class Tree(importlib.abc.MetaPathFinder):
    """Finds ffengine, its kernels and bench in given folders, whatever is installed."""

    def __init__(self, packages: dict[str, Path]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None,
                  target: Any = None) -> importlib.machinery.ModuleSpec | None:
        folder = self.packages.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def use(tree: Path, harness: Path) -> bool:
    """From now on imports come from `tree`; whether its own cases are used."""
    own = (tree / "bench" / "cases.py").exists()
    sys.meta_path.insert(0, Tree({
        "ffengine": tree / "ffengine", "ffengine.kernels": tree / "kernels",
        "bench": (tree if own else harness) / "bench"}))
    return own


def block_seconds(call: Callable[[], Any], count: int) -> tuple[float, float]:
    """(processor, wall) seconds a call, of `count` calls one after the other."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


class Worker:
    """One case at a time, held between requests."""

    def __init__(self, cases: list[Any]) -> None:
        self.cases = {case.name: case for case in cases}
        self.call: Callable[[], Any] | None = None

    def names(self) -> dict[str, float]:
        """Threshold of each case that the gate times."""
        return {name: case.threshold for name, case in self.cases.items() if case.gate}

    def prepare(self, name: str) -> dict[str, Any]:
        """Build and check a case; calls a block of it should hold."""
        self.call = None
        gc.collect()
        if name not in self.cases:
            return {"missing": name}
        self.call = self.cases[name].make().run
        block_seconds(self.call, 2)
        cpu = min(block_seconds(self.call, 1)[0] for _ in range(3))
        return {"count": max(1, round(BLOCK_SECONDS / max(cpu, 1e-7)))}

    def turn(self, count: int) -> dict[str, float]:
        """The least of a few blocks: processor and wall seconds a call."""
        assert self.call is not None
        found: list[tuple[float, float]] = []
        while len(found) < BLOCKS and count * sum(cpu for cpu, _ in found) < TURN_SECONDS:
            found.append(block_seconds(self.call, count))
        return {"cpu": min(cpu for cpu, _ in found), "wall": min(wall for _, wall in found)}


def serve(worker: Worker, answer: Callable[[Any], None]) -> None:
    """Until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(getattr(worker, request.pop("do"))(**request))
        except Exception as reason:  # a case that fails is a failing row, never a missing one
            text = " ".join(str(reason).split())
            answer({"failed": f"{type(reason).__name__}: {text}"[:300]})


def main() -> None:
    tree, harness = (Path(p).resolve() for p in sys.argv[1:3])
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != harness / "bench"]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    try:
        own = use(tree, harness)
        import torch

        torch.set_num_threads(1)  # waiting threads of a second would count as work
        from bench.cases import cases

        worker = Worker(cases())
    except Exception as reason:
        answer({"failed": f"{type(reason).__name__}: {' '.join(str(reason).split())}"[:300]})
        return
    gc.disable()
    answer({"own_cases": own, "names": worker.names()})
    serve(worker, answer)


if __name__ == "__main__":
    main()
