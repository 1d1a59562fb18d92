"""What ranks hand to rank 0 between epochs, and how the run's one checkpoint is made of it.

A checkpoint does not say how many stages wrote it: weights, states and plan are the network's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ffengine.engine.parallel.cutting import Piece
from ffengine.engine.run.checkpoint import Checkpoint
from ffengine.engine.run.history import EpochSums
from ffengine.engine.run.process import high_water
from ffengine.nn.layers import keep_weights_channels_last
from ffengine.nn.network import LocalNet


def shed(net: LocalNet, piece: Piece) -> None:
    """Free the parameters that are not the piece's. They keep their shape, and are NaN: whoever
    reads one is found out."""
    for name, parameter in net.named_parameters():
        if not piece.holds(name):
            nothing = parameter.data.new_full((), torch.nan)
            parameter.data = nothing.expand(parameter.shape)


def weights_of(net: LocalNet, piece: Piece) -> dict[str, torch.Tensor]:
    """The piece's part of the network's state_dict, on the CPU."""
    return {name: t.detach().cpu() for name, t in net.state_dict().items() if piece.holds(name)}


def fill(net: LocalNet, weights: Mapping[str, torch.Tensor]) -> None:
    """Put parameters and buffers in their places, parameters into memory of their own."""
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    for name, t in weights.items():
        if name in parameters:
            parameters[name].data = t.to(parameters[name].device)
        elif name in buffers:
            buffers[name].copy_(t)
    keep_weights_channels_last(net)


def sums_of(found: Sequence[dict[str, Any]]) -> EpochSums:
    """An epoch's sums: every stage's losses, the last one's hits."""
    if not all(found):
        return EpochSums()
    losses = [sum(of_layer) for of_layer in zip(*(s["losses"] for s in found), strict=True)]
    return EpochSums({**found[-1], "losses": losses})


def share(sums: EpochSums, layers: range, *, last: bool) -> EpochSums:
    """A stage's part of an epoch's sums, whose parts `sums_of` adds up."""
    saved = sums.export()
    if not saved:
        return EpochSums()
    losses = [loss if i in layers else 0.0 for i, loss in enumerate(saved["losses"])]
    return EpochSums({**saved, "losses": losses, "hits": saved["hits"] if last else 0})


def part(found: Checkpoint, piece: Piece) -> Checkpoint:
    """A checkpoint without the optimizer states of other stages."""
    return replace(found, tensors={
        name: t for name, t in found.tensors.items()
        if not name.startswith("optimizer.") or piece.holds(name.removeprefix("optimizer."))})


def plan_of(found: Sequence[dict[str, Any]], stages: Sequence[range]) -> dict[str, Any]:
    """The plan of the network, of every stage's (as Planning.export gives them): cut between the
    stages too."""
    phases = []
    for rows in zip(*(plan["phases"] for plan in found), strict=True):
        cuts = [cut for (_, mine, _, _), layers in zip(rows, stages, strict=True)
                for cut in (*mine, layers.stop - 1)]
        phases.append([rows[0][0], cuts[:-1], *(
            [value for row in rows for value in row[k]] for k in (2, 3))])
    gave_up = dict.fromkeys(line for plan in found for line in plan["gave_up"])
    return {**found[0], "seconds": None, "gave_up": list(gave_up), "phases": phases}


def resident_bytes() -> int:
    """Of this process, in memory now; where nothing says it, the most so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return high_water()
