"""What the instructions of a recurrent network's frames do; see instructions.py for how they are
written."""

from __future__ import annotations

import torch

from ffengine.data.seeding import generator
from ffengine.engine.inputs import drawn
from ffengine.engine.instructions import Made, Place, Tensors
from ffengine.engine.program import Instruction
from ffengine.nn.recurrent import RecurrentNet, label_rows, lengths
from ffengine.ops.host import send


def states(at: Place, line: Instruction, given: Tensors) -> Made:
    """States of both halves' rows, and their lengths: the image, which both halves share, the
    layers, the label."""
    ctx, item, net = at.ctx, given["batch"], at.ctx.net
    assert isinstance(net, RecurrentNet)
    x, n = item.x.to(at.dtype), len(item.x)
    other = item.negatives if item.negatives is not None else drawn(ctx, item, at.dtype)
    labels = torch.cat([label_rows(t, net.num_classes, at.dtype) for t in (item.y, other)])
    ctx.y = torch.cat([item.y.new_ones(n), item.y.new_zeros(n)])
    halves = item.hidden
    if halves is None:  # uniform in [0, 1), one draw for all samples
        source = generator("hidden", ctx.seed, ctx.step)
        halves = [[torch.rand(1, w, generator=source, dtype=torch.float32,
                              device=source.device)
                   for w in net.widths] for _ in range(2)]
    hidden = [torch.cat([send(t, x.device).to(x.dtype).expand(n, -1) for t in pair])
              for pair in zip(*halves, strict=True)]
    h = net.ends(x, labels, hidden)
    return h, [lengths(t) for t in h]


def first_state(at: Place, line: Instruction, given: Tensors) -> Made:
    """The first sweep, bottom up, in place: a layer sees the new state below it."""
    net, i, h, length = at.ctx.net, line.index, given["h"], given["lengths"]
    assert isinstance(net, RecurrentNet)
    h[i + 1] = net.new_state(i, neighbours(i, h, length), h[i + 1], at.ctx.backend)[0]
    length[i + 1] = lengths(h[i + 1])
    return ()


def around(at: Place, line: Instruction, given: Tensors) -> Made:
    """What a recurrent layer sees: the states below and above it."""
    return (neighbours(line.index, given["h"], given["lengths"]),)


def neighbours(i: int, h: list[torch.Tensor], length: list[torch.Tensor]) -> torch.Tensor:
    """RecurrentNet.around, normalised as it is put together: only states are ever held."""
    below, above = h[i], h[i + 2]
    rows, split = len(above), below.shape[1]
    u = below.new_empty(rows, split + above.shape[1])
    halves = u.view(-1, len(below), u.shape[1])[:, :, :split]
    torch.div(below, length[i], out=halves[0])
    for other in halves[1:]:
        other.copy_(halves[0])
    torch.div(above, length[i + 2], out=u[:, split:])
    return u


def new_state(at: Place, line: Instruction, given: Tensors) -> Made:
    """A layer's state after the frame, by the updated weights from the old states."""
    net, i = at.ctx.net, line.index
    assert isinstance(net, RecurrentNet)
    return (net.new_state(i, given.pop("u"), given["h"][i + 1], at.ctx.backend)[0],)


def switch(at: Place, line: Instruction, given: Tensors) -> Made:
    """The new state of the layer below, or the layer's own, takes the place of the old one."""
    h, length, below = given["h"], given["lengths"], "below" in given
    k = line.index if below else line.index + 1
    h[k] = given.pop("below" if below else "own")
    length[k] = lengths(h[k])
    return ()


def mean_of_frames(at: Place, line: Instruction, given: Tensors) -> Made:
    """The step reports each layer's mean loss over the frames, and the last frame's goodness."""
    ctx = at.ctx
    ctx.loss_sum = {i: torch.stack(rows).mean() for i, rows in ctx.loss_rows.items()}
    ctx.goodness = {i: rows[-1:] for i, rows in ctx.goodness.items()}
    ctx.loss_rows = {}
    return ()
