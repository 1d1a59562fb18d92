"""The memory plan of a whole run: one plan for every phase of its schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ffengine.engine.memory.dry_run import DryRun
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planner import Planner, Seconds
from ffengine.engine.memory.shapes import NetSizes
from ffengine.engine.optim import floor_bytes
from ffengine.engine.parallel.cutting import Piece
from ffengine.engine.run.settings import Settings
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn.network import LocalNet
from ffengine.typed import check_fields


@dataclass(frozen=True)
class Memory:
    """How a trainer spends memory.

    states: what Adam's moments (SGD's momentum) are kept in, fp32 | bf16 | 8bit (block-wise),
        rounded stochastically; small parameters keep fp32. None: fp32, if the budget allows.
    weights: fp32, or bf16 for those of layers, with precision bf16 only. None: as states.
    costs: what ranks the plans within a memory budget, measured (times this machine, once) or
        modelled (the same everywhere).
    micro_batch: train in pieces of this many samples, whose gradients add up to one update
        (ffengine.engine.micro); batch statistics are then each piece's own.
    plan: use this one instead of searching.
    """

    states: str | None = None
    weights: str | None = None
    costs: str = "measured"
    micro_batch: int | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        check_fields("trainer", self)


@dataclass(frozen=True)
class Job:
    """What a plan depends on, beside the batch and the phase.

    schedule: tied to `net`. device: type of the device. backend: of the ops. roomy: as of a Plan.
    """

    net: LocalNet
    schedule: Schedule
    settings: Settings
    device: str = "cpu"
    backend: str = "auto"
    roomy: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """The plans of a run's phases, each with the first epoch of its phase."""

    phases: tuple[tuple[int, Plan], ...]

    @property
    def largest(self) -> Plan:
        """Of the phase that needs most."""
        return max((plan for _, plan in self.phases), key=lambda plan: plan.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.largest.peak_bytes

    def at(self, epoch: int) -> Plan:
        """Of an epoch's phase."""
        return [plan for start, plan in self.phases if start <= epoch][-1]


def phase_starts(schedule: Schedule) -> list[int]:
    """The first epoch of every phase."""
    phases = [schedule.phase(epoch) for epoch in range(schedule.total)]
    return [e for e, phase in enumerate(phases) if e == 0 or phases[e - 1] != phase] or [0]


def sizes_for(job: Job, batch: int, epoch: int = 0, *, stored: bool = False, held: int = 0,
              micro: bool = False) -> NetSizes:
    """What a step on `batch` samples holds in the phase of an epoch.

    Args:
        stored: a layer-wise stage reads features that were kept.
        held: bytes that lie in memory beside the step, of kept features say.
        micro: the batch is a piece of a larger one, whose gradients add up.
    """
    optim, dtype = job.settings.optim(), job.settings.dtype
    # losses may take turns from batch to batch, or from epoch to epoch
    found: dict[object, tuple[int, int]] = {}
    for when in ((epoch, 0), (epoch, 1), (epoch + 1, 0)):
        if job.schedule.phase(when[0]) == job.schedule.phase(epoch):
            found.setdefault(job.schedule.turn(*when), when)
    return NetSizes([
        DryRun(job.net, job.schedule, optim, dtype, batch, when, stored=stored, micro=micro,
                  device=job.device, backend=job.backend, roomy=job.roomy)
        for when in found.values()], held)


def planner_for(job: Job, batch: int, epoch: int = 0, *, stored: bool = False, held: int = 0,
                micro: bool = False, seconds: Seconds | None = None) -> Planner:
    """The planner of an epoch's phase; `seconds`: measured costs. Else as `sizes_for`."""
    piece = job.schedule.piece
    whole = job if piece is None else replace(job, schedule=job.schedule.of(None))
    made = Planner(sizes_for(whole, batch, epoch, stored=stored, held=held, micro=micro), seconds)
    return made if piece is None else part_of(made, job, piece)


def part_of(planner: Planner, job: Job, piece: Piece) -> Planner:
    """The planner of a pipeline's stage, of the whole network's: batches that wait for it, and two
    that it hands on, lie beside every step."""
    sizes, layers, schedule = planner.sizes, piece.layers, job.schedule
    waits = leaves = 0
    if layers.start > sizes.span.start:
        first = sizes.layers[layers.start]
        waits = first.x_bytes + (0 if first.shortcut_in_is_x else first.shortcut_in_bytes)
    if layers.stop < sizes.span.stop:
        last = sizes.layers[layers.stop]
        leaves = last.x_bytes + (0 if last.shortcut_in_is_x else last.shortcut_in_bytes)
    names = [[n for n in phase if piece.holds(n)] for phase in schedule.phases()]
    floor = floor_bytes(job.net, job.settings.optim(), names, schedule.owners(),
                        holds=piece.holds)
    return planner.part(layers, floor, sizes.batch * (piece.queue * waits + 2 * leaves))


def plans_for(job: Job, batch: int, budget: int | None = None, *,
              seconds: Callable[[int], Seconds | None] | None = None) -> TrainingPlan:
    """The best plan of every phase within `budget` bytes.

    Args:
        seconds: epoch -> measured costs in its phase.

    Raises:
        ValueError: no plan of a phase fits; the smallest that could is named.
    """
    return TrainingPlan(tuple(
        (epoch, planner_for(job, batch, epoch, seconds=seconds and seconds(epoch)).best(budget))
        for epoch in phase_starts(job.schedule)))
