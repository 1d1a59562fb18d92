"""Structural edits: neurons of any layer are removed, added or put in another order.

    smaller, edit = remove_units(net, layer=0, units=[3, 17])
    same = apply(smaller, invert(edit))                    # bit for bit the network it was

Every function leaves its network alone and gives a new one with a record of the change. What
follows a unit: the columns of whatever reads it (through pools, flattened maps, shortcuts, heads),
norms on it, running statistics, group offsets; with `carry_states` optimizer moments too. A
shortcut that adds maps ties channels of several layers: they are edited together. A label map names
groups, and no edit empties a group, so it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ffengine.adapt.checks import (
    check_blocks,
    check_groups,
    layer_of,
    offsets_of,
    units_of,
)
from ffengine.adapt.filling import Fill
from ffengine.adapt.record import (
    Edit,
    Part,
    apply,
    apply_in_place,
    inverse,
    invert,
    new_places,
    whole,
)
from ffengine.nn import wiring
from ffengine.nn.network import LocalNet
from ffengine.nn.wiring import Axis, Unit, Wiring

__all__ = ["Edit", "add_units", "apply", "apply_in_place", "invert", "remove_units",
           "reorder_units", "restructure"]
#: A layer -> for each of its units after an edit the one it was before, -1 for a new one.
Sources = dict[int, list[int]]


def remove_units(net: LocalNet, layer: int, units: Sequence[int]) -> tuple[LocalNet, Edit]:
    """The network without some of a layer's neurons, and what a shortcut ties to them.

    Raises:
        ValueError: no such layer or units, the last one of a group (of any layer that is tied), a
            loss that needs equal groups, not as many units of each channel group of a convolution.
    """
    return remove_from_layers(net, {layer: units})


def remove_from_layers(net: LocalNet,
                       units: Mapping[int, Sequence[int]]) -> tuple[LocalNet, Edit]:
    """remove_units of several layers at once, by layer, in one record."""
    found, gone = wiring.of(net), set()
    tied = found.tied()
    for layer, named in units.items():
        for unit in units_of(net, layer_of(net, layer), named):
            gone.update(tied.get((layer, unit), [(layer, unit)]))
    sources: Sources = {}
    for i, size in enumerate(found.units):
        kept = [u for u in range(size) if (i, u) not in gone]
        if len(kept) < size:
            sources[i] = kept
    offsets = {}
    for i, kept in sources.items():
        before = offsets_of(net, i)
        offsets[i] = [sum(u < edge for u in kept) for edge in before]
    return _made(net, min(units), found, sources, offsets)


def reorder_units(net: LocalNet, layer: int, order: Sequence[int]) -> tuple[LocalNet, Edit]:
    """The network with a layer's neurons in another order: unit j is then what order[j] was.

    Every unit stays in its group, so the network computes the same (up to the order of sums).

    Raises:
        ValueError: no permutation, a unit that would change its group, no such layer.
    """
    layer, found = layer_of(net, layer), wiring.of(net)
    order = units_of(net, layer, order)
    if len(order) != found.units[layer]:
        raise ValueError(f"[edits] an order expected all {found.units[layer]} units of layer "
                         f"{layer}, got {len(order)}")
    tied, sources = found.tied(), {layer: list(order)}
    for slot, unit in enumerate(order):
        here = {i: u for i, u in tied.get((layer, slot), ()) if i != layer}
        for i, u in tied.get((layer, unit), ()):
            if i != layer:
                sources.setdefault(i, list(range(found.units[i])))[here[i]] = u
    offsets = {i: list(offsets_of(net, i)) for i in sources}
    for i, source in sources.items():
        for k, (start, end) in enumerate(zip(offsets[i], offsets[i][1:], strict=False)):
            moved = [u for u in source[start:end] if not start <= u < end]
            if moved:
                raise ValueError(f"[edits] an order expected every unit in its group, got unit "
                                 f"{moved[0]} of layer {i} in group {k}")
    return _made(net, layer, found, sources, offsets)


def add_units(net: LocalNet, layer: int, at: Sequence[int] | None = None, *,
              group: int | None = None, count: int = 1, like: int | Sequence[int] | None = None,
              values: Mapping[str, torch.Tensor] | None = None,
              outgoing: Mapping[str, torch.Tensor] | None = None,
              seed: int | None = None) -> tuple[LocalNet, Edit]:
    """The network with more neurons in a layer, and in those that a shortcut ties to it.

    What reads them starts with zeros: the layers above compute what they did (as far as no norm
    over the whole map looks at the new units).

    Args:
        at: units before which the new ones stand, one a new unit, in their groups; C: at the end.
        group: instead of `at`, the group at whose end `count` units stand.
        like: the unit, or one a new unit, whose own weights and statistics are copied; default:
            drawn as the layer's weights were.
        values: own tensors of the new units, (n, ...) by "weight", "bias", "norm_weight", ...
        outgoing: columns of what reads them, (..., n positions, ...) by their names in the
            state_dict, e.g. "layers.1.weight"; default zero.
        seed: of the drawing; default is torch's generator as it stands.

    Raises:
        ValueError: no such layer, place, group or unit, values of another shape, a loss that needs
            equal groups, not as many units for each channel group of a convolution.
    """
    layer, found = layer_of(net, layer), wiring.of(net)
    anchors = _anchors(net, layer, at, group, count)
    if like is None:
        templates: list[int | None] = [None] * len(anchors)
    else:
        given = [like] * len(anchors) if isinstance(like, int) else like
        templates = [*units_of(net, layer, given, distinct=False)]
    if len(templates) != len(anchors):
        raise ValueError(f"[edits] like expected one unit or {len(anchors)}, got "
                         f"{len(templates)}")
    new = _with_ties(layer, anchors, templates, found.tied())
    sources: Sources = {}
    offsets: dict[int, list[int]] = {}
    clones: dict[int, list[int | None]] = {}
    for i, rows in new.items():
        sources[i], offsets[i], clones[i] = _inserted(found.units[i], offsets_of(net, i), rows)
    fill = Fill(net, layer, found, clones, values or {}, outgoing or {}, seed)
    return _made(net, layer, found, sources, offsets, fill)


def restructure(net: LocalNet, structure: Mapping[str, Any] | None) -> None:
    """Give a network that was just built the layers that a checkpoint describes, in place, before
    its weights are loaded: see `structure_edit`."""
    edit = structure_edit(net, structure)
    if edit is not None:
        apply_in_place(net, edit)


def structure_edit(net: LocalNet, structure: Mapping[str, Any] | None) -> Edit | None:
    """What makes a network's layers those that a checkpoint describes; new units hold zeros. None
    where they are so already, or an old checkpoint (None) does not say.

    Args:
        structure: `units` of every layer and offsets of their `groups`, as a checkpoint's JSON has
            it (engine.checkpoint.structure).

    Raises:
        ValueError: it is of a network with other layers.
    """
    if structure is None:
        return None
    units, groups = structure["units"], structure["groups"]
    if len(units) != len(net.layers) or len(groups) != len(units):
        raise ValueError(f"[edits] a structure expected {len(net.layers)} layers, got "
                         f"{len(units)}")
    sources, offsets = {}, {}
    for i, (count, edges) in enumerate(zip(units, groups, strict=True)):
        had = net.layer(i).units
        if count != had or list(offsets_of(net, i)) != list(edges):
            sources[i] = [u if u < had else -1 for u in range(count)]
            offsets[i] = list(edges)
    return _recorded(net, 0, wiring.of(net), sources, offsets) if sources else None


class _New(NamedTuple):
    """A new unit: the one beside which it stands, on which side, and the one it is like."""

    beside: int
    before: bool
    like: int | None


def _anchors(net: LocalNet, layer: int, at: Sequence[int] | None, group: int | None,
             count: int) -> list[tuple[int, bool]]:
    """(unit, before it) where new units are to stand."""
    size, edges = net.layer(layer).units, offsets_of(net, layer)
    if (at is None) == (group is None):
        raise ValueError("[edits] adding units expected at= or group=, got "
                         f"{'neither' if at is None else 'both'}")
    if group is not None:
        if not 0 <= group < len(edges) - 1 or count < 1:
            raise ValueError(f"[edits] layer {layer} expected a group of 0..{len(edges) - 2} and "
                             f"one unit or more, got group {group} and {count}")
        return [(edges[group + 1] - 1, False)] * count
    places = [int(p) for p in at or ()]
    if not places or places != sorted(places) or not 0 <= places[0] <= places[-1] <= size:
        raise ValueError(f"[edits] layer {layer} expected rising places of 0..{size}, got "
                         f"{places}")
    return [(p, True) if p < size else (size - 1, False) for p in places]


def _with_ties(layer: int, anchors: list[tuple[int, bool]], templates: list[int | None],
               tied: dict[Unit, list[Unit]]) -> dict[int, list[_New]]:
    """The new units of the layer, and of those that a shortcut ties to it where they stand."""
    out: dict[int, list[_New]] = {}
    for (anchor, before), like in zip(anchors, templates, strict=True):
        alike = {} if like is None else dict(tied.get((layer, like), [(layer, like)]))
        for i, unit in tied.get((layer, anchor), [(layer, anchor)]):
            out.setdefault(i, []).append(_New(unit, before, alike.get(i)))
    return out


def _inserted(size: int, edges: Sequence[int],
              rows: list[_New]) -> tuple[list[int], list[int], list[int | None]]:
    """(source, offsets, the units that the new ones are like) of a layer with new units."""
    source: list[int] = []
    clones: list[int | None] = []
    starts = []
    for unit in range(size + 1):
        if unit in edges:
            starts.append(len(source))
        here = [row for row in rows if row.beside == unit]
        for row in (r for r in here if r.before):
            source.append(-1)
            clones.append(row.like)
        if unit < size:
            source.append(unit)
        for row in (r for r in here if not r.before):
            source.append(-1)
            clones.append(row.like)
    return source, starts, clones


def _made(net: LocalNet, layer: int, found: Wiring, sources: Sources,
          offsets: dict[int, list[int]], fill: Callable[..., torch.Tensor] | None = None,
          ) -> tuple[LocalNet, Edit]:
    """(changed copy, edit) from what becomes of every layer's units and groups."""
    edit = _recorded(net, layer, found, sources, offsets, fill)
    return apply(net, edit), edit


def _recorded(net: LocalNet, layer: int, found: Wiring, sources: Sources,
              offsets: dict[int, list[int]], fill: Callable[..., torch.Tensor] | None = None,
              ) -> Edit:
    groups = {}
    for i, edges in offsets.items():
        groups[i] = (net.layer(i).config.groups, check_groups(net, i, edges))
    tensors, parts = dict(net.state_dict()), []
    for axis in found.axes:
        if not any(run.layer in sources for run in axis.runs):
            continue
        blocks = axis.blocks if axis.dim else 1
        tensor = whole(tensors[axis.name].detach(), blocks)
        source = _source(axis, found, sources)
        check_blocks(axis, source, tensor.shape[axis.dim])
        count = int((source < 0).sum())
        added = tensor.new_zeros((*tensor.shape[:axis.dim], count, *tensor.shape[axis.dim + 1:]))
        if fill is not None and count:
            added = fill(axis, tensor, count)
        gone = new_places(inverse(source, tensor.shape[axis.dim]))
        removed = tensor.index_select(axis.dim, gone.to(tensor.device))
        parts.append(Part(axis.name, axis.dim, source, added, removed, blocks))
        tensors[axis.name] = parts[-1].moved(tensors[axis.name].detach(), added)
    return Edit(layer, {i: tuple(s) for i, s in sources.items()},
                {i: found.units[i] for i in sources}, groups, tuple(parts))


def _source(axis: Axis, found: Wiring, sources: Sources) -> torch.Tensor:
    """For each position of an axis after the edit the one before, -1 for a new one."""
    parts, start = [], 0
    for layer, repeat in axis.runs:
        size = 1 if layer is None else found.units[layer]
        units = torch.tensor(sources.get(-1 if layer is None else layer, range(size)),
                             dtype=torch.int64)[:, None]
        at = start + units * repeat + torch.arange(repeat)
        parts.append(torch.where(units < 0, -1, at).flatten())
        start += size * repeat
    return torch.cat(parts)
