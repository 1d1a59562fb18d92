"""What a layer loses with its weak neurons: accuracy after each of several degenerations.

Support neurons, app. D.2.2 (fig. 6: one by one), D.3.2 (fig. 8: by a fraction of the strongest
response). Each is of the network as given, which stays as it is; responses are measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffengine.adapt.checks import offsets_of
from ffengine.adapt.edits import remove_units
from ffengine.adapt.growth import Degeneration, weak_units
from ffengine.adapt.responses import survey
from ffengine.engine.run.evaluation import accuracy
from ffengine.nn.maps import Samples
from ffengine.nn.network import LocalNet


@dataclass(frozen=True)
class Removed:
    """How many neurons went, and the smaller network's accuracy, 0 to 1."""

    count: int
    accuracy: float


def removed(net: LocalNet, layer: int, train: Samples, test: Samples,
            options: Sequence[Degeneration], *, backend: str = "auto") -> list[Removed]:
    """Of each of the options, neurons chosen by their responses to `train`, judged on `test`.

    Raises:
        ValueError: a layer without a set for each class, more neurons asked for than can go, a
            loss that needs equal groups.
    """
    offsets = offsets_of(net, layer)
    own = survey(net, layer, train, backend).own(offsets)
    units = [weak_units(own, offsets, option) for option in options]
    known: dict[tuple[int, ...], float] = {}
    for gone in units:
        if tuple(gone) not in known:
            smaller = remove_units(net, layer, gone)[0] if gone else net
            known[tuple(gone)] = accuracy(smaller.eval(), test, backend)
    return [Removed(len(gone), known[tuple(gone)]) for gone in units]
