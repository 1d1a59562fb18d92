"""A grid of trainings over one or two settings: parallel over cores, resumed where it stopped.

Each cell is one training in a process of its own; what came out is a JSON file in the grid's
folder, so a grid that is started again trains only the cells that are missing. A training whose
numbers cease to be finite has diverged: its cell says so, and stays empty in the picture.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffengine.engine.run.checkpoint import write_atomically

#: Trains one cell in its own process: (everything it needs, its place on the axes) -> numbers.
Train = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Grid:
    """axes: the values of each setting, by its name; base: plain values that every cell shares."""

    axes: Axes
    base: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not 1 <= len(self.axes) <= 2:
            raise ValueError(f"[grid] expected one or two settings, got {len(self.axes)}")
        for name, values in self.axes.items():
            if not values or len(set(map(repr, values))) < len(values):
                raise ValueError(f"[grid] {name} expected values that differ, got {list(values)}")

    def cells(self) -> list[dict[str, Any]]:
        """Every combination of the axes' values."""
        return [dict(zip(self.axes, values, strict=True))
                for values in itertools.product(*self.axes.values())]

    def path(self, folder: Path, cell: Mapping[str, Any]) -> Path:
        """The file of a cell; its name tells the values and all that the cells share."""
        key = json.dumps([self.base, cell], sort_keys=True, default=str)
        words = "_".join(f"{k}={v}" for k, v in cell.items())
        safe = "".join(c if c.isalnum() or c in "=._-" else "-" for c in words)
        return folder / f"{safe[:80]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def run(grid: Grid, folder: Path, train: Train, *, jobs: int = 1,
        progress: bool = True) -> list[dict[str, Any]]:
    """The numbers of every cell, in the order of `cells()`, trained where they are missing.

    Args:
        folder: of the cells' files.
        train: a module's function, so that other processes find it.
        jobs: processes at once; 1 trains here.

    Raises:
        ValueError: jobs below 1, or what a cell's training raised.
    """
    if jobs < 1:
        raise ValueError(f"[grid] expected 1 job or more, got {jobs}")
    cells = grid.cells()
    found = {i: kept for i, cell in enumerate(cells)
             if (kept := read(grid.path(folder, cell))) is not None}
    missing = [i for i in range(len(cells)) if i not in found]
    with _bar(len(cells), len(found), progress) as advance:
        for i, made in _trained(grid, cells, missing, train, jobs):
            write_atomically(grid.path(folder, cells[i]), json.dumps(made).encode())
            found[i] = made
            advance()
    return [found[i] for i in range(len(cells))]


def _trained(grid: Grid, cells: Sequence[dict[str, Any]], missing: Sequence[int], train: Train,
             jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if jobs == 1 or len(missing) < 2:
        for i in missing:
            yield i, train(grid.base, cells[i])
        return
    # a forked child would inherit the parent's thread pools, and hang in them
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context) as pool:
        made = {pool.submit(train, grid.base, cells[i]): i for i in missing}
        try:
            for future in as_completed(made):
                yield made[future], future.result()
        except BaseException:  # nobody waits for cells that nobody will keep
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise


def read(path: Path) -> dict[str, Any] | None:
    """A finished cell; None where there is none, or half a file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def _bar(total: int, done: int, enabled: bool) -> Iterator[Callable[[], None]]:
    """tqdm's bar on standard error where it is a terminal, else a line a cell."""
    bar: Any = None
    if enabled and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, initial=done, unit="cell", leave=False)
    count = itertools.count(done + 1)

    def advance() -> None:
        if bar is not None:
            bar.update()
        elif enabled:
            print(f"cell {next(count)}/{total}", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()
