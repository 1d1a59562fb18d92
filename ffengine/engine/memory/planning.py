"""The plans of a run in progress: by batch size and phase, within the run's budget."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.plans import Job, TrainingPlan, phase_starts, planner_for
from ffengine.engine.memory.precision_fallback import choose
from ffengine.engine.run.settings import Settings
from ffengine.engine.schedules.recurrent import Recurrent
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn.checks import one_of
from ffengine.nn.recurrent import RecurrentNet

log = logging.getLogger("ffengine")


class Planning:
    """Makes plans for the batch sizes that come; smaller batches keep the cuts of the largest.

    Args:
        job: what is trained; its network may lie on any device.
        budget: bytes that a step may hold, or None.
        micro_batch: samples of the pieces that a batch is trained in.
        plan: cuts and tiles to use, for as many rows as it has, instead of searching.
        costs: "measured" or "modelled", what ranks the plans within a budget.
    """

    def __init__(self, job: Job, budget: int | None = None, *, micro_batch: int | None = None,
                 plan: Plan | None = None, costs: str = "measured") -> None:
        one_of("trainer", "costs", costs, ("measured", "modelled"))
        if not job.schedule.planned:  # its evaluation runs layer by layer all the same
            plain = Recurrent(frames=1) if isinstance(job.net, RecurrentNet) else Schedule()
            plain.net, plain.epochs = job.net, 1
            job = replace(job, schedule=plain)
        if job.device == "cuda" and budget is None:
            job = replace(job, roomy=True)
        self.job, self.budget, self.micro_batch = job, budget, micro_batch
        self.base: TrainingPlan | None = None
        self._samples = 0
        self._made: dict[int, TrainingPlan] = {}
        #: First epoch of a phase that reads kept features -> (their bytes in memory, bytes of a
        #: sample of which a batch is no copy).
        self._kept: dict[int, tuple[int, int]] = {}
        #: What ranked the plans, and a step's predicted seconds where that was measured.
        self.costs, self.seconds = "modelled", None  # type: tuple[str, float | None]
        self._measure = costs == "measured"
        #: Sentences on what the budget cost.
        self.gave_up: list[str] = []
        if plan is not None:
            self.base, self._samples = TrainingPlan(((0, plan),)), plan.batch // rows_of(job.net, 1)

    def begin(self, samples: int, *, fixed: bool) -> Settings:
        """Plan for batches of so many samples; gives the settings with the precisions it takes.

        Args:
            fixed: the precisions are the caller's wish.

        Raises:
            ValueError: nothing fits the budget; the smallest that could is named.
        """
        if self.base is None:
            self._search(samples, fixed)
        return self.job.settings

    def _search(self, samples: int, fixed: bool) -> None:
        found = choose(self.job, self._piece(samples), self.budget, fixed=fixed,
                       held=self._held(samples), micro=self.micro_batch is not None,
                       measure=self._measure)
        self.job = replace(self.job, settings=found.job.settings, roomy=found.job.roomy)
        self.base, self._samples = found.plans, samples
        if self._kept:
            self.base = self._cut_like(found.plans, samples)
        self._made[samples] = self.base
        self.costs, self.seconds = found.costs, found.seconds
        self.gave_up = list(found.gave_up)

    def plans(self, samples: int) -> TrainingPlan:
        """Every phase's plan for a batch of so many samples."""
        if samples not in self._made:
            rows = rows_of(self.job.net, self._piece(samples))
            if self.base is None or rows > self.base.largest.batch:
                self._search(samples, fixed=True)  # states exist by now
            else:
                self._made[samples] = self._cut_like(self.base, samples)
        return self._made[samples]

    @property
    def settings(self) -> Settings:
        """The run's, with the precisions that the plans took."""
        return self.job.settings

    def room(self, samples: int, epoch: int) -> int | None:
        """Bytes that the budget leaves beside a step on so many samples in an epoch's phase which
        keeps nothing; None without a budget."""
        if self.budget is None:
            return None
        kept, _ = self._kept.get(self._start(epoch), (0, 0))
        return self.budget + kept - self.plans(samples).at(epoch).peak_bytes

    @property
    def device(self) -> str:
        """Type of the device that the run is on."""
        return self.job.device

    def keeps(self, epoch: int, nbytes: int, seen: int = 0) -> None:
        """The phase of an epoch reads features that were kept, `nbytes` of them in memory: its
        plans hold those too, and what makes them anew no more.

        Args:
            seen: bytes of a sample's features that a batch looks at where they are kept.
        """
        if self._kept.get(self._start(epoch)) == (nbytes, seen):
            return
        self._kept[self._start(epoch)] = nbytes, seen
        self._made = {}
        if self.base is not None:
            self.base = self._cut_like(self.base, self._samples)

    def follow(self, other: Planning) -> None:
        """The cuts and tiles of another run's plans, where they fit in this one."""
        if other.base is not None:
            self.base, self._samples = self._cut_like(other.base, other._samples), other._samples
            self._made = {}

    def _start(self, epoch: int) -> int:
        """The first epoch of an epoch's phase."""
        return [start for start in phase_starts(self.job.schedule) if start <= epoch][-1]

    def _cut_like(self, base: TrainingPlan, samples: int) -> TrainingPlan:
        """The plans of another batch size with the same cuts and tiles."""
        return TrainingPlan(tuple((epoch, self.planner(samples, epoch).like(base.at(epoch)))
                             for epoch in phase_starts(self.job.schedule)))

    def planner(self, samples: int, epoch: int = 0) -> Planner:
        """The planner of a phase, by modelled costs."""
        stored = self._start(epoch) in self._kept
        kept, seen = self._kept.get(self._start(epoch), (0, 0))
        piece = self._piece(samples)  # whose features a dry run counts as a batch's own
        return planner_for(self.job, piece, epoch, stored=stored,
                           held=self._held(samples) + kept - seen * piece,
                           micro=self.micro_batch is not None)

    def _piece(self, samples: int) -> int:
        return min(samples, self.micro_batch or samples)

    def _held(self, samples: int) -> int:
        """Bytes of the batch beside the piece in training."""
        return (4 * math.prod(self.job.net.in_shape) + 8) * (samples - self._piece(samples))

    def give_up(self, what: str) -> None:
        """Note, and say once, what the budget costs."""
        if what not in self.gave_up:
            self.gave_up.append(what)
            log.warning("[memory] gave up: %s", what)

    def export(self) -> dict[str, Any] | None:
        """Cuts and tiles of the largest batch, and what chose them, for a checkpoint."""
        if self.base is None:
            return None
        return {"samples": self._samples, "costs": self.costs, "seconds": self.seconds,
                "gave_up": self.gave_up,
                "phases": [[epoch, plan.cuts, plan.tile, plan.one_by_one]
                           for epoch, plan in self.base.phases]}

    def exported(self, saved: dict[str, Any]) -> TrainingPlan:
        """The plans that `export` gave; ValueError if they are of another network."""
        return TrainingPlan(tuple(
            (epoch, self.planner(saved["samples"], epoch).clipped(cuts, tile, alone))
            for epoch, cuts, tile, alone in saved["phases"]))

    def keep(self, saved: dict[str, Any]) -> None:
        """Use what `export` gave from now on, unless it breaks the budget."""
        samples, made = saved["samples"], self.exported(saved)
        if self.budget is None or made.peak_bytes <= self.budget:
            self.base, self._samples, self._made = made, samples, {}
            self.costs, self.seconds = saved["costs"], saved["seconds"]
            self.gave_up = list(saved["gave_up"])
