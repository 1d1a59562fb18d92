"""How a network is spread over processes, and which networks can be."""

from __future__ import annotations

from dataclasses import dataclass

from ffengine.engine import heads
from ffengine.engine.schedules.schedule import Schedule, of
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet

#: Batches that may wait for a stage.
MOST_WAITING = 16


@dataclass(frozen=True)
class Pipeline:
    """How a network is spread over processes, one a stage.

    Args:
        stages: processes, each with consecutive layers.
        queue: batches that wait for a stage at most, 1 to 16.
        timeout: seconds without progress after which a rank hangs; at the start, that the others
            are waited for.
        layers: how many layers each stage has, instead of a search, e.g. (4, 5).
    """

    stages: int
    queue: int = 2
    timeout: float = 120.0
    layers: tuple[int, ...] | None = None

    def sane(self) -> None:
        """ValueError for numbers that no network could do with."""
        whole("stages", self.stages)
        whole("queue", self.queue, MOST_WAITING)
        if not self.timeout > 0:
            raise ValueError(f"[pipeline] timeout expected seconds above 0, got {self.timeout}")

    def check(self, net: LocalNet, schedule: Schedule | None = None) -> None:
        """ValueError, with the reason, for a network that cannot be cut into so many stages."""
        self.sane()
        depth = len(net.layers)
        if self.stages > depth:
            raise ValueError(f"[pipeline] stages expected at most {depth}, one a layer, got "
                             f"{self.stages}")
        if self.layers is not None and (len(self.layers) != self.stages or min(
                self.layers) < 1 or sum(self.layers) != depth):
            raise ValueError(f"[pipeline] layers expected {self.stages} numbers above 0 that add "
                             f"up to {depth}, got {self.layers}")
        why = uncuttable(net, of(net, schedule)) if self.stages > 1 else None
        if why is not None:
            name = net.origin[0] if net.origin else "a network"
            raise ValueError(f"[pipeline] stages expected a network that can be cut, got {name}: "
                             f"{why}")


def whole(name: str, value: object, most: int | None = None) -> None:
    """ValueError unless it is a whole number of 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (
            most is not None and value > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(f"[pipeline] {name} expected a whole number of at least 1{limit}, got "
                         f"{value!r}")


def uncuttable(net: LocalNet, schedule: Schedule) -> str | None:
    """Why a network that trains by a schedule cannot be a pipeline, None if it can."""
    if schedule.by_stages:
        return (f"{type(schedule).__name__} trains one layer at a time, so that all stages but one "
                "would rest")
    if isinstance(net, RecurrentNet):
        return "its layers see the layers above them"
    if not schedule.planned:
        return "one loss trains all its layers"
    if schedule.crosses:
        return ("a loss trains the layer before its own too, at every boundary in turn, so that no "
                "neighbours may part")
    if not schedule.writer.cuts:
        return "its layers share more than the maps between them"
    if net.negatives == "hardest":
        return "the hardest negatives are drawn by the goodness of all layers"
    if any(heads.of(net, h).image != "pass" for h in range(len(net.heads))):
        return "a head sees samples by a pass of its own through all layers"
    if getattr(schedule, "heads_alone", False) and len(net.heads):
        return "its heads train alone, on features of all layers"
    return None
