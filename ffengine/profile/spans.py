"""A profile: the spans of a step in order, the memory at every change, and their sums.

Times are seconds from the step's begin. A span's own time is what its children leave of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ffengine.engine.memory.meter import KINDS
from ffengine.engine.memory.plan import Plan
from ffengine.env import instruction_set


@dataclass
class Span:
    """One call of a watched function (ffengine.profile.watch)."""

    name: str
    part: str
    #: Index of the span it lies in; -1: the step itself.
    parent: int
    layer: int | None
    segment: int | None
    #: (first row, rows) of the batch.
    tile: tuple[int, int] | None
    begin: float = 0.0
    end: float = 0.0
    bytes: int = 0
    flops: int = 0
    #: Least seconds at this machine's rates, and which of the two takes them.
    floor: float = 0.0
    bound: str = ""
    #: Most bytes live inside it.
    peak_bytes: int = 0
    #: Time that no child took.
    own: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Sample:
    """Bytes live from `time` on, by kind (ffengine.engine.memory.meter.KINDS)."""

    time: float
    live: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.live)


@dataclass
class Sum:
    """What some spans come to, each counted once."""

    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    floor: float = 0.0
    peak_bytes: int = 0
    #: Own seconds by part.
    parts: dict[str, float] = field(default_factory=dict)
    #: Floor seconds of what bytes bound, and of what arithmetic bounds.
    bounds: dict[str, float] = field(default_factory=lambda: {"bytes": 0.0, "arithmetic": 0.0})

    @property
    def share(self) -> float:
        """Of the roofline: least seconds over seconds."""
        return self.floor / self.seconds if self.seconds else 0.0

    @property
    def bound(self) -> str:
        return max(self.bounds, key=lambda b: self.bounds[b]) if self.floor else ""

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Sum:
        made = cls()
        for s in spans:
            made.seconds += s.own
            made.bytes, made.flops = made.bytes + s.bytes, made.flops + s.flops
            made.floor += s.floor
            made.peak_bytes = max(made.peak_bytes, s.peak_bytes)
            made.parts[s.part] = made.parts.get(s.part, 0.0) + s.own
            if s.bound:
                made.bounds[s.bound] += s.floor
        return made

    def values(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "bytes_moved": self.bytes, "flops": self.flops,
                "floor_seconds": self.floor, "roofline_share": self.share, "bound": self.bound,
                "peak_bytes": self.peak_bytes, "parts": self.parts}


@dataclass
class Phase:
    """One step of one phase of the schedule."""

    number: int
    label: str
    epoch: int
    iteration: int
    #: Layers that train in it.
    layers: tuple[int, ...]
    plan: Plan
    spans: list[Span]
    samples: list[Sample]
    #: Whole steps as timed: median, smallest, largest seconds.
    measured: dict[str, float]
    #: Bytes the CUDA allocator held at most in an unmetered step, with library workspaces.
    allocated_bytes: int | None = None
    #: What a step took of the GPU's energy, where its driver counts it (ffengine.devices.energy).
    joules: float | None = None

    @property
    def seconds(self) -> float:
        return self.spans[0].end

    @property
    def peak(self) -> Sample:
        return max(self.samples, key=lambda s: s.total)

    def at_peak(self) -> Span:
        """The innermost span in which most bytes are live."""
        inside = [s for s in self.spans if s.peak_bytes == self.peak.total]
        return inside[-1] if inside else self.spans[0]

    def tile_of(self, layer: int) -> int | None:
        """Rows of the tiles that a layer takes; None: the whole batch without tiles."""
        return max((s.tile[1] for s in self.spans if s.layer == layer and s.tile), default=None)

    def segment_of(self, layer: int) -> int | None:
        return next((s.segment for s in self.spans if s.layer == layer), None)

    def by_layer(self) -> dict[int, Sum]:
        found = sorted({s.layer for s in self.spans if s.layer is not None})
        return {i: Sum.of(s for s in self.spans if s.layer == i) for i in found}

    def by_segment(self) -> dict[int, Sum]:
        found = sorted({s.segment for s in self.spans if s.segment is not None})
        return {i: Sum.of(s for s in self.spans if s.segment == i) for i in found}

    def outside(self) -> Sum:
        """What belongs to no layer: pairs of rows, heads, Python between the layers."""
        return Sum.of(s for s in self.spans if s.layer is None)

    def total(self) -> Sum:
        return Sum.of(self.spans)

    def values(self) -> dict[str, Any]:
        return {
            "number": self.number, "label": self.label, "epoch": self.epoch,
            "iteration": self.iteration, "layers_training": list(self.layers),
            "plan": {"cuts": self.plan.cuts, "tile": self.plan.tile,
                     "peak_bytes": self.plan.peak_bytes, "floor_bytes": self.plan.floor_bytes},
            "measured_seconds": self.measured,
            "allocated_bytes": self.allocated_bytes, "joules": self.joules,
            "total": self.total().values(),
            "layers": {str(i): s.values() for i, s in self.by_layer().items()},
            "segments": {str(i): s.values() for i, s in self.by_segment().items()},
            "outside_layers": self.outside().values(),
            "peak": {"bytes": self.peak.total, "time": self.peak.time,
                     "live": dict(zip(KINDS, self.peak.live, strict=True)),
                     "span": self.spans.index(self.at_peak())},
            "spans": [asdict(s) for s in self.spans],
            "samples": [[s.time, *s.live] for s in self.samples]}


@dataclass
class Profile:
    """Steps of a network's training, one of each phase, in order."""

    model: str
    batch: int
    #: Rows of a step: twice the batch where it makes positive and negative halves.
    rows: int
    precision: str
    backend: str
    device: str
    steps: int
    budget: int | None
    #: Per-sample shapes of the layers' inputs.
    shapes: list[tuple[int, ...]]
    #: Measured rates: bytes_per_second, flops_per_second, launch_seconds.
    rates: dict[str, float]
    phases: list[Phase]

    @property
    def planned_bytes(self) -> int:
        """The highest planned peak."""
        return max(p.plan.peak_bytes for p in self.phases)

    @property
    def highest(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda p: p.peak.total)

    def values(self) -> dict[str, Any]:
        return {
            "model": self.model, "batch_size": self.batch, "rows": self.rows,
            "precision": self.precision, "backend": self.backend, "device": self.device,
            "instruction_set": instruction_set(),
            "steps": self.steps, "rates": self.rates, "memory_budget": self.budget,
            "planned_bytes": self.planned_bytes, "shapes": [list(s) for s in self.shapes],
            "peak_bytes": self.highest.peak.total, "kinds": list(KINDS),
            "phases": [p.values() for p in self.phases]}
