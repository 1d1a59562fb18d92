"""The recorder that a step's watched calls tell of their begins and ends."""

from __future__ import annotations

import time
from typing import Any

import torch

from ffengine.engine.memory.meter import KINDS
from ffengine.engine.memory.plan import Plan
from ffengine.engine.trainer import Trainer
from ffengine.profile.costs import Cost
from ffengine.profile.spans import Span
from ffengine.profile.watch import Watched

#: A whole step; spans are noted inside one only.
ROOT = Watched("step", Trainer.step)


class Recorder:
    """Notes the begins and ends of a step's calls: their times or, `metered`, what they are."""

    def __init__(self, trainer: Trainer, metered: bool) -> None:
        self.net, self.device, self.metered = trainer.net, trainer.device, metered
        #: The step's own, from its begin on.
        self.plan: Plan | None = None
        #: perf_counter seconds, or CUDA events; where metered nothing, only their number counts.
        self.marks: list[Any] = []
        #: Names of the calls that begin, "end" of those that end: what all steps must share.
        self.order: list[str] = []
        self.spans: list[Span] = []
        self.costs: list[Cost | None] = []
        #: (marks so far, live bytes by kind): see `memory`.
        self.levels: list[tuple[int, tuple[int, ...]]] = []
        #: Marks of every span's begin and end.
        self.bounds: list[list[int]] = []
        self._open: list[int] = []
        self._leaf, self._cuda = False, trainer.device.type == "cuda"
        #: The layer whose pre-activation came last: a sweep that follows is its own.
        self._forwarded: int | None = None
        #: The level without a call's own scratch, while it holds some.
        self._without: tuple[int, ...] | None = None

    def open(self, watched: Watched, args: tuple[Any, ...]) -> bool:
        if self._leaf or not (self._open or watched is ROOT) or (
                watched.relevant is not None and not watched.relevant(*args)):
            return False
        if self.metered:
            self._settle()
            self._begin(watched, args)
        self._open.append(len(self.bounds))
        self.bounds.append([len(self.marks), 0])
        self._leaf = watched.cost is not None
        self._mark(watched.name)
        return True

    def close(self, watched: Watched, result: Any, args: tuple[Any, ...],
              options: dict[str, Any]) -> None:
        if self.metered:
            self._settle()
        index = self._open.pop()
        self.bounds[index][1] = len(self.marks)
        self._mark("end")
        self._leaf = False
        if self.metered:
            self.costs[index] = watched.cost(result, *args, **options) if watched.cost else None

    def _mark(self, name: str) -> None:
        self.order.append(name)
        if self.metered:
            self.marks.append(None)
        elif self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def _begin(self, watched: Watched, args: tuple[Any, ...]) -> None:
        """A span whose layer, segment and tile are its parent's where it has none."""
        parent = self._open[-1] if self._open else -1
        where: dict[str, Any] = {"layer": None, "segment": None, "tile": None}
        if parent >= 0:
            above = self.spans[parent]
            where = {name: getattr(above, name) for name in where}
        if watched.where is not None:
            where.update(watched.where(*args))
        segments = () if self.plan is None else self.plan.segments
        known: tuple[tuple[str, list[Any]], ...] = (
            ("layer", list(self.net.layers)), ("segment", list(segments)))
        for name, among in known:
            if where[name] is not None and not isinstance(where[name], int):
                where[name] = among.index(where[name])
        if watched.part == "forward":
            self._forwarded = where["layer"]
        elif watched.part == "sweep" and where["layer"] is None:
            where["layer"] = self._forwarded
        self.spans.append(Span(where.pop("name", watched.name), watched.part, parent, **where))
        self.costs.append(None)

    def memory(self, live: dict[str, int], inside: int) -> None:
        """The meter's word: live bytes by kind, and scratch that the present call holds."""
        plain = tuple(live[k] for k in KINDS)
        self._without = plain if inside else None
        level = (*plain[:-1], plain[-1] + inside)
        if not self.levels or self.levels[-1] != (len(self.marks), level):
            self.levels.append((len(self.marks), level))

    def _settle(self) -> None:
        """Scratch of a call is gone when it ends."""
        if self._without is not None:
            self.levels.append((len(self.marks), self._without))
            self._without = None

    def times(self) -> list[float]:
        """Seconds of every mark from the first."""
        if self._cuda:
            torch.cuda.synchronize(self.device)
            return [self.marks[0].elapsed_time(m) / 1e3 for m in self.marks]
        return [m - self.marks[0] for m in self.marks]
