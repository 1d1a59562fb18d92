"""One training of a queue: goes on from its own checkpoint, and keeps each row as it is passed."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ffengine import data
from ffengine.commands.cases import Case
from ffengine.commands.options import device_of, fitted_options, load_data, shaped_like
from ffengine.commands.reproduction.progress import Progress
from ffengine.commands.reproduction.results import NAME, Results, key_of, run_of
from ffengine.commands.train import announce, job_of, make_trainer, tested_at
from ffengine.commands.train import refuse_early as refuse_budget
from ffengine.data import own
from ffengine.data.image_set import Splits
from ffengine.engine.run import checkpoint
from ffengine.engine.run.callbacks import Callback
from ffengine.engine.trainer import Trainer
from ffengine.locks import locked
from ffengine.ops import backends

#: What an attempt at a job came to.
DONE, BUSY, LATE, FAILED = "done", "busy", "late", "failed"


class OutOfTime(Exception):
    """The time that the queue was given is over."""


@dataclass(frozen=True)
class Job:
    """Recipes that one training with this seed serves, by rising epochs: the last is trained."""

    args: argparse.Namespace
    cases: tuple[Case, ...]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cases[-1].file.name}, seed {self.seed}"

    @property
    def results(self) -> Results:
        return Results(Path(self.args.out) / NAME)

    def key(self, case: Case) -> str:
        return key_of(self.args, case)

    def missing(self) -> list[Case]:
        """Those the results file lacks."""
        runs = self.results.runs()
        return [case for case in self.cases if (self.key(case), self.seed) not in runs]

    def folder(self, case: Case) -> Path:
        """Where the training of this case lives."""
        return work_folder(self.args) / f"{case.file.name}-{self.key(case)}-seed{self.seed}"


def work_folder(args: argparse.Namespace) -> Path:
    return Path(args.out) / "reproduce"


def refuse_early(jobs: Sequence[Job]) -> None:
    """ValueError for what none of the jobs could be trained with, before any of them begins."""
    for job in {job.cases[-1].start: job for job in jobs}.values():
        case = job.cases[-1]
        args = named(job, case)
        refuse_budget(args, case.recipe, case.options, case.data_options)
        if not own.is_own(case.data):  # whose classes and shape only its files tell
            job_of(args, case.recipe, shaped_like(case.file.model, case.options))
    if jobs[0].args.data is not None:  # of all of them, and what has to be fetched is fetched once
        loaded(jobs[0], jobs[0].cases[-1])


def named(job: Job, case: Case) -> argparse.Namespace:
    """The command's flags, for a training of this case."""
    return argparse.Namespace(**{**vars(job.args), "model": case.file.model, "data": case.data,
                                 "augment": case.augment, "quiet": True})


def loaded(job: Job, case: Case) -> Splits:
    return load_data(case.file.model, case.data, case.options, case.data_options, job.seed,
                     job.args.data_root)


def attempt(job: Job, deadline: float | None = None,
            stopped: Callable[[], bool] = bool) -> tuple[str, str]:
    """Train what the results lack of a job; (DONE | BUSY | LATE | FAILED, why).

    BUSY: another process trains it. LATE: `deadline` (of time.time) passed, the checkpoint stands.
    stopped: asked after each epoch whether to stop like that for a Ctrl-C.

    Raises:
        ValueError, OSError: what the command cannot go on with.
        KeyboardInterrupt: the checkpoint stands.
    """
    try:
        # a case that a training had passed before anyone asked for it takes one of its own
        while missing := job.missing():
            folder = job.folder(missing[-1])
            with locked(folder, wait=False) as mine:
                if not mine:
                    return BUSY, f"{job.name} is trained by another process"
                if job.missing() == missing:
                    train(job, missing, folder, deadline, stopped)
    except OutOfTime:
        return LATE, "out of time"
    except (RuntimeError, MemoryError) as error:
        return FAILED, str(error) or type(error).__name__
    return DONE, ""


def train(job: Job, cases: Sequence[Case], folder: Path, deadline: float | None,
          stopped: Callable[[], bool]) -> None:
    """Train the last of the cases; a run for each as its epochs are done."""
    case, seed = cases[-1], job.seed
    args = named(job, case)
    splits = resident(loaded(job, case), device_of(args))
    shown = Progress(job.name, enabled=not job.args.quiet)
    trainer = make_trainer(args, case.recipe, fitted_options(case.file.model, splits, case.options),
                           case.data_options, seed)
    trainer.sip = trainer.sip and case.file.train.sip
    trainer.write_into(folder)
    if not job.args.quiet:
        print(job.name, file=sys.stderr)
        announce(argparse.Namespace(**{**vars(args), "quiet": False}), trainer)
    begun = (folder / checkpoint.LATEST).exists()
    # other threads would add up in another order
    count = checkpoint.load(folder).meta["notes"]["threads"] if begun else None
    if stopped():
        raise KeyboardInterrupt
    with threads(count):
        if begun:
            trainer.resume(folder)
            shown.resumed(trainer.epoch, trainer.epochs)
        trainer.notes |= {"threads": torch.get_num_threads(), "epochs_in_all": trainer.epochs}
        read_off(job, args, trainer, splits, ahead(cases, trainer),
                 Supervisor(shown, deadline, stopped))


class Supervisor(Callback):
    """Says how far a training is, and ends it once its checkpoint is written when it is asked to,
    or when the time is over."""

    def __init__(self, shown: Progress, deadline: float | None,
                 stopped: Callable[[], bool]) -> None:
        self.shown, self.deadline, self.stopped = shown, deadline, stopped

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self.shown.epoch(trainer.history.rows[-1], trainer.epochs)
        if self.stopped():
            raise KeyboardInterrupt
        if (self.deadline is not None and time.time() > self.deadline
                and trainer.epoch < trainer.epochs):
            raise OutOfTime


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads inside; None leaves them as they are."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    try:
        set_threads(count)
        yield
    finally:
        set_threads(before)


def set_threads(count: int) -> None:
    """Of torch and of our kernels."""
    torch.set_num_threads(count)
    ext = backends.extension()
    if ext is not None:
        ext.set_num_threads(count)


def ahead(cases: Sequence[Case], trainer: Trainer) -> dict[int, list[Case]]:
    """By the epoch of the trainer, the cases that it has yet to pass."""
    marks = sorted({case.epochs for case in cases})
    if len(marks) == 1:  # a single number is that of a layer's epochs, where layers train in turn
        return {trainer.epochs: list(cases)}
    return {mark: [case for case in cases if case.epochs == mark]
            for mark in marks if mark >= trainer.epoch}


def read_off(job: Job, args: argparse.Namespace, trainer: Trainer, splits: Splits,
             stops: dict[int, list[Case]], supervisor: Supervisor) -> None:
    """Train from stop to stop, and keep a run at each."""
    augment = data.augment.by_name(args.augment)
    drop_last = any(case.drop_last for cases in stops.values() for case in cases)
    test = data.loader(splits.test, batch_size=trainer.settings.batch_size, device=trainer.device)
    for (_, row), cases in zip(
            tested_at(args, trainer, splits, list(stops), augment, drop_last, [supervisor]),
            stops.values(), strict=True):
        row |= {"epochs": cases[0].epochs, "layer_accuracy": trainer.evaluate_layers(test),
                "seconds": sum(r.seconds for r in trainer.history.rows)}
        job.results.add(job.args, run_of(job.args, cases[0], job.seed, row), job.cases)


def resident(splits: Splits, device: torch.device) -> Splits:
    """Data on the GPU that trains on them, so that no batch comes from the host."""
    if device.type == "cpu":
        return splits
    return replace(splits, **{name: getattr(splits, name).to(device)
                              for name in ("train", "valid", "test")})
