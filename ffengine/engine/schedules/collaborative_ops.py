"""What the instructions of collaborative FF do; see instructions.py for how they are written."""

from __future__ import annotations

import torch

from ffengine.engine import affine
from ffengine.engine.batch import Batch, whole
from ffengine.engine.inputs import InputRows
from ffengine.engine.instructions import Made, Place, Tensors
from ffengine.engine.program import Instruction
from ffengine.nn.collaborative import CollaborativeNet, gamma_owner


def collaborate(at: Place, line: Instruction, given: Tensors) -> Made:
    """What the other layers' goodness adds to this one's, and that goodness if gamma learns: of the
    layers below, which are at rest, and of those above by their current weights."""
    ctx, i, net = at.ctx, line.index, at.ctx.net
    assert isinstance(net, CollaborativeNet)
    below = [given[role] for role, _ in line.reads if role.startswith("q")]
    last = i + 1 == len(net.layers)
    above = [] if last else net.run(given["x"], start=i, backend=ctx.backend)[1:]
    others = net.pooled([*below, *above])
    if "batch" in given:  # features of a stage, whose layers below summed their goodness then
        made = given["batch"]
        item = made.item if isinstance(made, InputRows) else made
        if isinstance(item, Batch) and item.below is not None:
            rows = at.rows.of(item.below)[:, None]
            others = others + rows.to(others.dtype) * net.pair_weight
    g0 = net.gamma.detach()[i].to(others.dtype) * others
    return (g0, others)[:len(line.writes)]


def update_gamma(at: Place, line: Instruction, given: Tensors) -> Made:
    """Steps what the other layers' goodness counts for a layer, by dL/dG (A-CFF)."""
    ctx, i, net, others = at.ctx, line.index, at.ctx.net, given["others"]
    assert isinstance(net, CollaborativeNet)
    slope = whole(ctx.coef[i]) * net.group_size(i)
    others = whole(others) if isinstance(others, list) else others
    grad = torch.zeros_like(net.gamma)
    grad[i] = (slope * others.to(slope.dtype)).sum().to(grad.dtype)
    affine.step(ctx, "net", "gamma", net.gamma, grad, gamma_owner(i))
    return ()
