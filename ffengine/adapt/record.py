"""Records of structural edits: made, made again, undone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ffengine.nn.layers import keep_weights_channels_last
from ffengine.nn.network import LocalNet
from ffengine.ops.config import Loss, bce

Groups = int | tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What happens to one axis of one tensor.

    source: int64, for each position after the edit the one before, -1 for a new one.
    added: what the new positions hold, removed: what those that are gone held, both along `dim`.
    blocks: channel groups of a convolution whose inputs these are; the tensor is then seen `whole`.
    """

    name: str
    dim: int
    source: torch.Tensor
    added: torch.Tensor
    removed: torch.Tensor
    blocks: int = 1

    def moved(self, tensor: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """`tensor` after the edit, with `added` at its new positions."""
        out = whole(tensor, self.blocks).index_select(
            self.dim, self.source.clamp(min=0).to(tensor.device))
        out.index_copy_(self.dim, new_places(self.source).to(tensor.device),
                        added.to(out.device, out.dtype))
        return in_blocks(out, self.blocks)

    @property
    def before(self) -> int:
        """Positions before the edit."""
        return int((self.source >= 0).sum()) + self.removed.shape[self.dim]

    def fits(self, tensor: torch.Tensor) -> bool:
        """The edit is of a tensor of this shape."""
        shape = list(whole(tensor, self.blocks).shape)
        here, shape[self.dim] = shape[self.dim], self.added.shape[self.dim]
        return here == self.before and shape == list(self.added.shape)

    def inverse(self) -> Part:
        return replace(self, source=inverse(self.source, self.before), added=self.removed,
                       removed=self.added)


@dataclass(frozen=True)
class Edit:
    """Record of a change: enough to make it again, to undo it, and to read it.

    layer: whose units were named. units: every layer that changed -> for each unit after the edit
    the one before, -1 for a new one. sizes: units before. groups: (before, after) of those layers,
    as LocalPassConfig.groups. parts: in the order in which they are made.
    """

    layer: int
    units: dict[int, tuple[int, ...]]
    sizes: dict[int, int]
    groups: dict[int, tuple[Groups, Groups]]
    parts: tuple[Part, ...]

    def new(self, layer: int) -> list[int]:
        """Units of a layer that the edit added, by their numbers after it."""
        return [u for u, source in enumerate(self.units.get(layer, ())) if source < 0]

    def gone(self, layer: int) -> list[int]:
        """Units of a layer that the edit removed, by their numbers before it."""
        return sorted({*range(self.sizes.get(layer, 0))} - {*self.units.get(layer, ())})

    def summary(self) -> dict[str, Any]:
        """Plain values for people: who changed, by how much, and in which groups."""
        return {"layer": self.layer, "removed": {i: self.gone(i) for i in self.units},
                "added": {i: self.new(i) for i in self.units}}


def invert(edit: Edit) -> Edit:
    """The edit that undoes it; what was removed comes back as it was."""
    units = {i: tuple(inverse(torch.tensor(s, dtype=torch.int64), edit.sizes[i]).tolist())
             for i, s in edit.units.items()}
    return Edit(edit.layer, units, {i: len(s) for i, s in edit.units.items()},
                {i: (after, before) for i, (before, after) in edit.groups.items()},
                tuple(part.inverse() for part in reversed(edit.parts)))


def apply(net: LocalNet, edit: Edit) -> LocalNet:
    """A copy of the network with the edit made.

    Raises:
        ValueError: the network has other layers than the edit is of.
    """
    changed = copy.deepcopy(net)
    apply_in_place(changed, edit)
    return changed


def apply_in_place(net: LocalNet, edit: Edit) -> None:
    """Make the edit in the network itself; its changed parameters are new objects."""
    for i, size in edit.sizes.items():
        had = net.layer(i).units if i < len(net.layers) else 0
        if had != size or net.layer(i).config.groups != edit.groups[i][0]:
            raise ValueError(f"[edits] expected {size} units in layer {i} of groups "
                             f"{edit.groups[i][0]}, got {had}")
    tensors = net.state_dict()
    made: dict[str, torch.Tensor] = {}
    for part in edit.parts:
        tensor = made.get(part.name, tensors.get(part.name))
        if tensor is None or not part.fits(tensor):
            raise ValueError(f"[edits] expected {part.before} positions in axis {part.dim} of "
                             f"{part.name}, got another network")
        made[part.name] = part.moved(tensor.detach(), part.added)
    for name, tensor in made.items():
        path, _, own = name.rpartition(".")
        owner = net.get_submodule(path)
        held = getattr(owner, own)
        setattr(owner, own, nn.Parameter(tensor, requires_grad=held.requires_grad)
                if isinstance(held, nn.Parameter) else tensor)
    for i, (_, groups) in edit.groups.items():
        layer = net.layer(i)
        loss = layer.config.loss
        if isinstance(loss, Loss) and loss.name == "bce" and loss.p[0] == edit.sizes[i]:
            loss = bce(layer.units, loss.reduction)  # its width is the number of units
        layer.config = replace(layer.config, groups=groups, loss=loss)
    net.shapes = net.infer_shapes()
    keep_weights_channels_last(net)


def inverse(source: torch.Tensor, before: int) -> torch.Tensor:
    """For each of the `before` positions where it went, -1 if it is gone."""
    out = torch.full((before,), -1, dtype=torch.int64)
    kept = (source >= 0).nonzero().flatten()
    out[source[kept]] = kept
    return out


def new_places(source: torch.Tensor) -> torch.Tensor:
    """Positions that come from nowhere."""
    return (source < 0).nonzero().flatten()


def whole(weight: torch.Tensor, blocks: int) -> torch.Tensor:
    """(O / G, C, ...) of a convolution's weight (O, C / G, ...) in G channel groups: an axis of all
    input channels."""
    if blocks == 1:
        return weight
    split = weight.reshape(blocks, weight.shape[0] // blocks, *weight.shape[1:])
    return split.transpose(0, 1).flatten(1, 2)


def in_blocks(weight: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse of `whole`."""
    if blocks == 1:
        return weight
    split = weight.reshape(weight.shape[0], blocks, weight.shape[1] // blocks, *weight.shape[2:])
    return split.transpose(0, 1).flatten(0, 1)
