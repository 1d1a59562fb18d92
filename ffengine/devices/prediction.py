"""What a training step would take on a device that is not at hand: seconds, and bytes at its peak.

The engine's own step runs dry, on fake tensors (ffengine.engine.memory.dry_run), while every call
tells what it must move and compute (ffengine.profile.watch). A call takes at least
max(bytes / bandwidth, FLOPs / rate), and every kernel the time from one launch to the next; their
sum is the step's floor. What real steps take beside their floors, and what a call costs the host,
was measured on the machines at hand (`python -m bench.devices`), and is stated as a range.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ffengine.devices.catalog import Device, Slowdown, slowdown
from ffengine.devices.rates import Rates
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.plans import Job, phase_starts, planner_for
from ffengine.nn.network import LocalNet
from ffengine.profile.costs import Cost
from ffengine.profile.record import label
from ffengine.profile.watch import Watched, watching

#: Kernels that a call starts at least; others start one.
KERNELS = {"local_pass": 2, "batch_pass": 3, "weight_update": 2, "linear_step": 4, "train_head": 4}
#: What a call's least time is spent on.
BOUNDS = ("bytes", "arithmetic", "launches")
#: Layer of calls that belong to none: the input, heads.
NO_LAYER = -1


class Tally:
    """Listens to a step: (layer, name, cost) of every call that has a cost."""

    def __init__(self, net: LocalNet) -> None:
        self.calls: list[tuple[int, str, Cost]] = []
        self._layers = list(net.layers)
        self._open = [NO_LAYER]
        self._leaf = False

    def open(self, watched: Watched, args: tuple[Any, ...]) -> bool:
        if self._leaf or (watched.relevant is not None and not watched.relevant(*args)):
            return False
        layer = watched.where(*args).get("layer") if watched.where is not None else None
        if layer is None:
            layer = self._open[-1]
        elif not isinstance(layer, int):
            layer = self._layers.index(layer)
        self._open.append(layer)
        self._leaf = watched.cost is not None
        return True

    def close(self, watched: Watched, result: Any, args: tuple[Any, ...],
              options: dict[str, Any]) -> None:
        layer = self._open.pop()
        self._leaf = False
        if watched.cost is not None:
            self.calls.append((layer, watched.name, watched.cost(result, *args, **options)))


@dataclass
class Share:
    """What a layer's calls come to at a device's rates; NO_LAYER: those of none."""

    layer: int
    bytes: int = 0
    flops: int = 0
    calls: int = 0
    kernels: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BOUNDS, 0.0))

    @property
    def floor(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What takes most of its time."""
        return max(BOUNDS, key=lambda b: self.seconds[b])

    def add(self, name: str, cost: Cost, rates: Rates) -> None:
        kernels = KERNELS.get(name, 1) * bool(cost.bytes or cost.flops)
        by_bytes = cost.bytes / rates.bytes_per_second
        by_flops = cost.flops / rates.flops_per_second[cost.dtype] if cost.flops else 0.0
        self.bytes, self.flops = self.bytes + cost.bytes, self.flops + cost.flops
        self.calls, self.kernels = self.calls + 1, self.kernels + kernels
        self.seconds["arithmetic" if by_flops > by_bytes else "bytes"] += max(by_bytes, by_flops)
        self.seconds["launches"] += kernels * rates.launch_seconds


@dataclass(frozen=True)
class Prediction:
    """A training step on a device.

    turn: whose, in words. plan: the fastest that fits what is usable, or, where none does, the
    smallest; run dry on a device of type `rehearsed_on`. floor: least seconds. slow: what steps
    took beside their floors, measured elsewhere, or None.
    """

    device: Device
    batch: int
    precision: str
    turn: str
    plan: Plan
    fits: bool
    shares: list[Share]
    slow: Slowdown | None
    rehearsed_on: str = "cpu"

    @property
    def floor(self) -> float:
        return sum(s.floor for s in self.shares)

    @property
    def calls(self) -> int:
        return sum(s.calls for s in self.shares)

    @property
    def expected(self) -> tuple[float, float, float] | None:
        """Seconds: (low, median, high) of the measured range."""
        if self.slow is None:
            return None
        return self.slow.expected(self.device.kind, self.floor, self.calls)

    @property
    def by_bound(self) -> dict[str, float]:
        """Seconds of the floor that bytes, arithmetic and launches take."""
        return {b: sum(s.seconds[b] for s in self.shares) for b in BOUNDS}

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        return max(BOUNDS, key=lambda b: self.by_bound[b])

    def values(self) -> dict[str, Any]:
        """Plain values, the device's sources included."""
        expected = None if self.expected is None or self.slow is None else {
            **dict(zip(("low", "median", "high"), self.expected, strict=True)),
            "measured_on": self.slow.where}
        return {
            "device": self.device.values(), "batch_size": self.batch, "precision": self.precision,
            "turn": self.turn, "fits": self.fits, "peak_bytes": self.plan.peak_bytes,
            "rehearsed_on": self.rehearsed_on,
            "usable_bytes": self.device.usable_bytes, "cuts": self.plan.cuts,
            "tile": self.plan.tile, "floor_seconds": self.floor, "expected_seconds": expected,
            "images_per_second_at_most": self.batch / self.floor,
            "seconds_by_bound": self.by_bound, "calls": self.calls,
            "bytes": sum(s.bytes for s in self.shares), "flops": sum(s.flops for s in self.shares),
            "layers": [{"layer": s.layer, "bytes": s.bytes, "flops": s.flops,
                        "kernels": s.kernels, "floor_seconds": s.floor, "bound": s.bound,
                        "seconds": dict(s.seconds)} for s in self.shares]}


class Predictor:
    """Predicts steps of one phase of a schedule; a plan's calls run dry once.

    Plans are made for the device type and back-end of `job`, which this machine can run dry: torch
    without CUDA cannot run a GPU's, and plans then count the scratch of the processor's kernels.

    Args:
        job: whose step, on a batch of its settings' size.
        epoch: the first of its phase.
    """

    def __init__(self, job: Job, epoch: int = 0) -> None:
        self.job, self.settings, self.epoch = job, job.settings, epoch
        self.planner = planner_for(job, job.settings.batch_size, epoch)
        self.turn = label(job.schedule.turn(epoch, 0))
        self._calls: dict[tuple[Any, ...], list[tuple[int, str, Cost]]] = {}

    def on(self, device: Device, budget: int | None = None) -> Prediction:
        """The step on a device, in what is usable of its memory and within `budget` bytes.

        Raises:
            ValueError: the device has no rate for the precision.
        """
        rates = device.rates(self.settings.precision)
        fastest, room = self.planner.fastest(), min(device.usable_bytes, budget or math.inf)
        if fastest.peak_bytes <= room:
            return self.of_plan(device, rates, fastest)
        if self.smallest.peak_bytes > room:
            return self.of_plan(device, rates, self.smallest, fits=False)
        return self.of_plan(device, rates, self.planner.best(int(room)))

    @functools.cached_property
    def smallest(self) -> Plan:
        """What fits where anything does."""
        return self.planner.smallest()

    def of_plan(self, device: Device, rates: Rates, plan: Plan, fits: bool = True) -> Prediction:
        """The step under a plan, at these rates."""
        shares: dict[int, Share] = {}
        for layer, name, cost in self.calls(plan):
            shares.setdefault(layer, Share(layer)).add(name, cost, rates)
        batch, precision = self.settings.batch_size, self.settings.precision
        return Prediction(device, batch, precision, self.turn, plan, fits,
                          [shares[i] for i in sorted(shares)], slowdown(device.kind, precision),
                          self.job.device)

    def calls(self, plan: Plan) -> Iterable[tuple[int, str, Cost]]:
        """(layer, name, cost) of the step's calls, in order: the same on every device."""
        key = (tuple(plan.cuts), tuple(plan.tile))
        if key not in self._calls:
            dry_run = self.planner.sizes.main
            tally = Tally(dry_run.net)
            with watching(tally):
                dry_run.step(plan)
            self._calls[key] = tally.calls
        return self._calls[key]


def every_phase(job: Job) -> list[Predictor]:
    """Of all phases of the job's schedule: layer-wise and interleaved ones have several."""
    return [Predictor(job, epoch) for epoch in phase_starts(job.schedule)]
