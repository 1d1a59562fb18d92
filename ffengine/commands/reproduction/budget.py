"""What trainings cost, and which of them fit into so many hours."""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ffengine import sealed
from ffengine.commands.options import device_of, fitted_options
from ffengine.commands.reproduction.results import Run, digest
from ffengine.commands.reproduction.training import Job, loaded, named, threads, work_folder
from ffengine.commands.train import make_trainer
from ffengine.engine.run import checkpoint
from ffengine.engine.trainer import Trainer
from ffengine.provenance import facts

#: A step is repeated for so many seconds.
LONG_ENOUGH = 0.2


class Costs:
    """Seconds that an epoch takes here, by what is trained: of finished runs, or measured."""

    def __init__(self, args: argparse.Namespace, runs: Iterable[Run]) -> None:
        self.path = work_folder(args) / "costs.json"
        self.known: dict[str, float] = {}
        if self.path.exists():
            self.known |= sealed.read(self.path)["seconds_per_epoch"]
        here = facts()
        for run in runs:
            if all(run["machine"][name] == here[name] for name in ("cpu", "gpu")):
                self.known[run["start"]] = run["seconds"] / run["epochs"]

    def seconds(self, job: Job) -> float | None:
        """What is left of a job; None where nothing is known of it."""
        missing = job.missing()
        if not missing:
            return 0.0
        each = self.known.get(digest(job.args, missing[-1].start))
        return None if each is None else each * missing[-1].epochs * (
            1 - done(job.folder(missing[-1])))

    def learn(self, job: Job) -> None:
        """Take the seconds of a finished job."""
        runs, case = job.results.runs(), job.cases[-1]
        run = runs.get((job.key(case), job.seed))
        if run is not None:
            self.known[run["start"]] = run["seconds"] / run["epochs"]

    def measure(self, jobs: Sequence[Job], count: int, tell: Callable[[str], None]) -> None:
        """Time a few steps of each that nothing is known of, with so many threads."""
        unknown = {digest(job.args, job.cases[-1].start): job for job in jobs
                   if self.seconds(job) is None}
        if unknown:
            tell(f"timing a step of each of {len(unknown)} networks")
        for start, job in unknown.items():
            with threads(count):
                self.known[start] = epoch_seconds(job)
            sealed.write(self.path, {"seconds_per_epoch": {
                name: value for name, value in self.known.items() if math.isfinite(value)}})


def done(folder: Path) -> float:
    """The share of its epochs that a training has behind it."""
    if not (folder / checkpoint.LATEST).exists():
        return 0.0
    meta = checkpoint.load(folder).meta
    return float(meta["position"]["epoch"] / meta["notes"]["epochs_in_all"])


def epoch_seconds(job: Job) -> float:
    """Of one of the recipe's epochs, by a few steps of every phase; infinite where one fails."""
    case = job.cases[-1]
    args, splits = named(job, case), loaded(job, case)
    trainer = make_trainer(args, case.recipe, fitted_options(case.file.model, splits, case.options),
                           case.data_options, job.seed)
    size = min(case.recipe.batch_size, len(splits.train))
    x, y = (t.to(device_of(args)) for t in splits.train.batch(slice(0, size)))
    steps = math.ceil(len(splits.train) / size)
    tests = math.ceil(len(splits.valid) / size)
    try:
        once = seconds_of(lambda: trainer.evaluate([(x, y)]), trainer) if tests else 0.0
        return (sum(count * (steps * step_seconds(trainer, x, y, first) + tests * once)
                    for first, count in phases(trainer)) / case.epochs)
    except (RuntimeError, MemoryError):
        return math.inf


def phases(trainer: Trainer) -> list[tuple[int, int]]:
    """(first epoch, epochs) of each phase of the schedule."""
    numbers = [trainer.schedule.phase(epoch) for epoch in range(trainer.epochs)]
    return [(numbers.index(phase), count) for phase, count in Counter(numbers).items()]


def step_seconds(trainer: Trainer, x: torch.Tensor, y: torch.Tensor, epoch: int) -> float:
    return seconds_of(lambda: trainer.step(x, y, epoch=epoch), trainer)


def seconds_of(call: Callable[[], object], trainer: Trainer) -> float:
    """Mean of some calls, after one that is not counted."""
    def wait() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)

    call()
    wait()
    calls, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < LONG_ENOUGH or not calls:
        call()
        wait()
        calls += 1
    return passed / calls


def choose(jobs: Sequence[Job], seconds: Sequence[float], limit: float, at_a_time: int
           ) -> list[int]:
    """Which jobs, by number, fit into `limit` seconds, in the order to train them.

    The paper with fewest rows so far goes first, and of its own the first seed, then the quickest;
    what is finished costs nothing. Each goes to the worker that is free first.
    """
    files = [job.cases[-1].file for job in jobs]
    free, rows, seeds = [0.0] * at_a_time, Counter[str](), Counter[str]()

    def rank(i: int) -> tuple[float, ...]:
        return seconds[i] > 0, rows[files[i].paper], seeds[files[i].name], seconds[i]

    left, chosen = list(range(len(jobs))), list[int]()
    while left:
        best = min(left, key=rank)
        left.remove(best)
        worker = free.index(min(free))
        if free[worker] + seconds[best] <= limit:
            free[worker] += seconds[best]
            rows[files[best].paper] += 1
            seeds[files[best].name] += 1
            chosen.append(best)
    return chosen
