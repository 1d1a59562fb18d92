"""Collaborative FF: layer after layer, each with the other layers' goodness added to its own.

Buffers beside those of program.py: q{i} goodness of a layer at rest, o{i} the other layers' for
layer i's rows (O{i}: of all tiles), b{i} what of it is added to layer i's own.
"""

from __future__ import annotations

from ffengine.engine.compiling import Layers, source
from ffengine.engine.program import Instruction, Part
from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.nn.collaborative import CollaborativeNet, gamma_owner
from ffengine.nn.network import LocalNet


class Collaborative(Layerwise):
    """Layer-wise training where a layer's goodness holds the other layers' (collaborative FF).

    G_l = g_l + gamma_l sum_{m != l} w stopgrad(g_m): lower layers are frozen, upper ones answer
    with their current weights. A learned gamma steps by dL/dG (A-CFF).
    """

    def begin(self, net: LocalNet, epochs: int) -> None:
        if not isinstance(net, CollaborativeNet):
            raise ValueError("[schedule] collaborative training expected a CollaborativeNet, got "
                             f"{type(net).__name__}")
        super().begin(net, epochs)

    def active(self, epoch: int) -> list[str]:
        assert isinstance(self.net, CollaborativeNet)
        own = ["gamma"] if self.net.gamma.requires_grad else []
        return [*super().active(epoch), *own]

    def owners(self) -> dict[str, tuple[str, ...]]:
        """Every layer's gamma has moments and a step count of its own."""
        return {"gamma": tuple(gamma_owner(i) for i in range(1, len(self.net.layers)))}

    @property
    def writer(self) -> type[Layers]:
        return Collaborating


class Collaborating(Layers):
    """Writes the lines of a stage: the layers below give their goodness, those above answer."""

    cuts = False  # the goodness of the layers below belongs to a tile

    def at_rest(self, i: int) -> tuple[str, ...]:
        return (f"q{i}",)

    def term(self, i: int) -> str | None:
        below = {f"q{j}": f"q{j}" for j in range(self.facts.first, i)}
        kept = {"batch": source(self.net)} if self.facts.first else {}
        self.add("collaborate", i, f"b{i}", *self.learns(f"o{i}"), x=self.x, **below, **kept)
        return f"b{i}"

    def learns(self, *names: str) -> tuple[str, ...]:
        """The names if gamma is trained: who wants them then."""
        assert isinstance(self.net, CollaborativeNet)
        return names if self.net.gamma.requires_grad else ()

    def keeps(self, i: int) -> list[tuple[str, str]]:
        mine = self.learns(f"o{i}") if i in self.facts.turn.layers else ()
        return [*super().keeps(i), *((name, f"O{i}") for name in mine)]

    def closing(self, i: int, whole: bool) -> list[Part]:
        if i not in self.facts.turn.layers:
            return []
        return [Instruction("update_gamma", i, (("others", name),))
                for name in self.learns(f"o{i}" if whole else f"O{i}")]
