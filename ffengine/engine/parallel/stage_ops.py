"""What the instructions between two stages of a pipeline do; see instructions.py for how they are
written."""

from __future__ import annotations

from ffengine.engine.batch import joined, whole
from ffengine.engine.inputs import set_targets
from ffengine.engine.instructions import Made, Place, Tensors
from ffengine.engine.program import Instruction


def receive(at: Place, line: Instruction, given: Tensors) -> Made:
    """The maps that the stage before sent, and the goodness of the layers that are done."""
    ctx, arrived = at.ctx, given.pop("batch").arrived
    set_targets(ctx, ctx.batch)
    ctx.goodness.update((i, [g]) for i, g in arrived.goodness.items())
    return tuple(arrived.maps.pop(name) for name in line.writes)


def send(at: Place, line: Instruction, given: Tensors) -> Made:
    """Hands the maps on, with the goodness of all layers so far; waits where the next stage is
    behind. The maps are the link's from here on."""
    ctx, maps = at.ctx, {}
    for name, made in list(given.items()):
        maps[name] = whole(made) if isinstance(made, list) else made
        del given[name], made
    if ctx.send is not None:  # a dry run has no other stage
        ctx.send(maps, {i: joined(tiles, ctx.halves) for i, tiles in ctx.goodness.items()})
    return ()
