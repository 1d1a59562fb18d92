"""The least time a local step could take: sum over ops of max(bytes / copy rate, product time).

Rates are measured on the same machine at the op's own size, with cold inputs.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.problem import Problem, turns
from ffengine.devices.rates import copy_rate, product_seconds
from ffengine.engine.context import Turn
from ffengine.engine.inputs import rows_of
from ffengine.engine.schedules.schedule import of
from ffengine.nn import LocalNet, RecurrentNet
from ffengine.ops import batch_pass, local_pass


def seconds(problem: Problem) -> float | None:
    """Floor of one training step of `problem`, its turns weighted as a table's step weighs them;
    None where a step is more than a pass through the layers (recurrent networks).

    Heads, the encoding of labels and a collaborative layer's look at the others are left out.
    """
    net = problem.network()
    if isinstance(net, RecurrentNet):
        return None
    schedule = of(net, None)
    schedule.begin(net, problem.epochs)
    known: dict[Any, float] = {}
    return sum(weight * turn_seconds(problem, net, schedule.turn(epoch, iteration),
                                     schedule.crosses, known)
               for weight, epoch, iteration in turns(schedule))


def turn_seconds(problem: Problem, net: LocalNet, turn: Turn, crosses: bool,
                 known: dict[Any, float]) -> float:
    """Forward of every layer passed, and the weight gradient of those that train."""
    device, dtype = problem.x.device, problem.dtype
    rate, batch, total = copy_rate(device), rows_of(net, problem.batch), 0.0
    for i in range(turn.depth):
        rows, inner, out, moved = sizes(net, i, batch, dtype)
        if (rows, inner, out) not in known:
            # forward and weight gradient are the same arithmetic: the better product's rate
            known[rows, inner, out] = min(product_seconds(*shape, dtype, device)
                                          for shape in ((rows, inner, out), (out, rows, inner)))
        trains = i in turn.layers
        before = trains and crosses and i > 0  # an input gradient, and the layer before's update
        products = 1 + trains + 2 * before
        total += products * max(known[rows, inner, out], moved / rate)
        total += swept(net, i, batch, dtype, trains) / rate
        steps = [i] * trains + [i - 1] * before
        weights = sum(net.layer(k).weight.numel() for k in steps)
        total += weights * 4 * 2 * (1 + problem.optim.states) / rate  # weight, states, both ways
    return total


def swept(net: LocalNet, i: int, batch: int, dtype: torch.dtype, trains: bool) -> int:
    """Bytes that layer i's sweep over its pre-activation must move."""
    layer = net.layer(i)
    shape = (batch, *layer.out_shape(net.input_of(i, net.shapes[i])))
    if layer.batch_coupling is not None:
        return batch_pass.bytes_moved(shape, dtype, layer.config, layer.batch_coupling,
                                      want_da=trains)
    return local_pass.bytes_moved(shape, dtype, layer.config, want_da=trains)


def sizes(net: LocalNet, i: int, batch: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(pixels, patch, channels, bytes) of layer i's product over patches."""
    seen = net.input_of(i, net.shapes[i])
    a = net.layer(i).out_shape(seen)
    weight = net.layer(i).weight
    rows, inner = batch * _count(a[1:]), weight[0].numel()
    moved = dtype.itemsize * (batch * (_count(seen) + _count(a)) + weight.numel())
    return rows, inner, a[0], moved


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for s in shape:
        total *= s
    return total
