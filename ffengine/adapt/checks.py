"""What structural edits ask of a network and of their arguments: one line where it is not so."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ffengine.adapt.record import Groups
from ffengine.nn.network import LocalNet
from ffengine.nn.wiring import Axis


def layer_of(net: LocalNet, layer: int) -> int:
    """The number of a layer that the network has."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(net.layers):
        raise ValueError(f"[edits] expected a layer of 0..{len(net.layers) - 1}, got {layer!r}")
    return layer


def offsets_of(net: LocalNet, layer: int) -> tuple[int, ...]:
    """Offsets of a layer's groups."""
    return net.layer(layer).config.offsets(net.layer(layer).units)


def units_of(net: LocalNet, layer: int, units: Sequence[int], distinct: bool = True) -> list[int]:
    """Units that the layer has, one at least, each once."""
    size, found = net.layer(layer).units, [int(u) for u in units]
    if not found or not all(0 <= u < size for u in found):
        raise ValueError(f"[edits] layer {layer} expected units of 0..{size - 1}, got "
                         f"{found or 'none'}")
    if distinct and len(set(found)) < len(found):
        raise ValueError(f"[edits] layer {layer} expected every unit once, got {found}")
    return found


def check_groups(net: LocalNet, layer: int, edges: Sequence[int]) -> Groups:
    """A layer's groups with these offsets, as LocalPassConfig takes them: K where they are equal.

    Raises:
        ValueError: a group without units, or a loss that needs equal groups
            (`loss.equal_groups = True` of a researcher's own) and would not have them.
    """
    config, sizes = net.layer(layer).config, [b - a for a, b in pairwise(edges)]
    for group, size in enumerate(sizes):
        if size < 1:
            raise ValueError(f"[edits] group {group} of layer {layer} expected to keep a unit, got "
                             "its last one removed")
    if len(set(sizes)) == 1:
        return len(sizes)
    if getattr(config.loss, "equal_groups", False):
        raise ValueError(f"[edits] the loss of layer {layer} expected equal groups, got groups of "
                         f"{min(sizes)} to {max(sizes)} units")
    return tuple(edges)


def check_blocks(axis: Axis, source: torch.Tensor, before: int) -> None:
    """ValueError unless every channel group of a convolution keeps its own positions, as many as
    the others (source: for each position after an edit the one before, -1 for a new one)."""
    if axis.blocks == 1:
        return
    rest, kept = len(source) % axis.blocks, source >= 0
    block = torch.arange(len(source)) // max(len(source) // axis.blocks, 1)
    if rest or bool((source // (before // axis.blocks) != block)[kept].any()):
        what = "inputs" if axis.dim else "units"
        raise ValueError(f"[edits] {axis.name} is of a convolution in {axis.blocks} channel "
                         f"groups: expected as many {what} in each, got {len(source)} in all"
                         f"{'' if rest else ', unevenly'}")
