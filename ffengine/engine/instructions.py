"""What a program's instructions do, one function each.

Every function takes where it runs, its line of the program and the tensors that it reads, by role,
and gives what the line writes, in order. Tensors that nobody wants later are the
function's own: it pops them from what it reads as soon as it can let go of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from ffengine.engine import affine, heads, label_channel
from ffengine.engine.batch import Batch, whole
from ffengine.engine.context import StepContext
from ffengine.engine.inputs import InputRows, input_rows
from ffengine.engine.program import Instruction
from ffengine.engine.rows import Rows, empty
from ffengine.engine.sweep import preactivation, sweep
from ffengine.nn.layers import LocalLayer
from ffengine.ops import linear_step as linear
from ffengine.ops import local_pass as sweeps
from ffengine.ops.config import Tile
from ffengine.ops.memory_accounting import allocating
from ffengine.ops.optim import Parameter
from ffengine.ops.optimizer_step import step_dtype

#: Whole-batch tensors, or a tile's, by their names in the program; and what else ops hand on.
Tensors = dict[str, Any]


@dataclass
class Place:
    """Where in a step an instruction runs.

    rows: of the tile. finish: no tile comes after this one.
    """

    ctx: StepContext
    dtype: torch.dtype
    rows: Rows
    finish: bool = True

    @property
    def tile(self) -> Tile:
        """The tile's place in the batch, for the ops."""
        return Tile(self.rows.start, self.ctx.batch, bool(self.rows.half))


#: What an op gives, for the buffers that its instruction writes.
Made = tuple[Any, ...]


def pair(at: Place, line: Instruction, given: Tensors) -> Made:
    """Positives and negatives, which are drawn where none were given, and their targets."""
    return (input_rows(at.ctx, given.pop("batch"), at.dtype),)


def encode(at: Place, line: Instruction, given: Tensors) -> Made:
    """The input of the first layer that runs."""
    made = given.pop("batch")
    if not isinstance(made, InputRows):
        made = InputRows(at.ctx.net, made)
    return (made.of(at.rows, at.dtype),)


def zeros(at: Place, line: Instruction, given: Tensors) -> Made:
    """Where tiles add up a layer's gradients."""
    with allocating("gradient"):
        return (zeros_like_parameters(at.ctx.net.layer(line.index)),)


def zeros_like_parameters(layer: LocalLayer) -> affine.Buffers:
    """(weight, bias) gradients of nothing yet."""
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    return torch.zeros_like(layer.weight, dtype=step_dtype(layer.weight.dtype)), bias


def transform(at: Place, line: Instruction, given: Tensors) -> Made:
    """What stands before a layer: a pool, or its map made a row."""
    return (at.ctx.net.transform(line.index, given.pop("x")),)


def enter(at: Place, line: Instruction, given: Tensors) -> Made:
    """The layer's own norm of its input."""
    return at.ctx.net.layer(line.index).enter(given.pop("x"), training=True)


def forward(at: Place, line: Instruction, given: Tensors) -> Made:
    """The pre-activation."""
    u, operands = given["u"], given.get("operands")
    if operands is not None:
        return (at.ctx.net.layer(line.index).preactivation(u, operands),)
    return (preactivation(at.ctx, line.index, u),)


def local_pass(at: Place, line: Instruction, given: Tensors) -> Made:
    """Goodness, loss and dL/da; features over a, or into their channels of `room`. A recurrent
    layer blends its own state of `states` in."""
    want_z, room = len(line.writes) > 1, given.pop("room", None)
    into = None if room is None else room[:, :given["a"].shape[1]]
    states = given.get("states")
    made = sweep(at.ctx, line.index, given.pop("a"), at.tile, want_z=want_z, into=into,
                 shortcut=given.pop("shortcut", None), g0=given.get("g0"),
                 h_prev=None if states is None else states[line.index + 1].contiguous())
    assert made.loss is not None and made.g is not None
    at.ctx.note(line.index, made.loss, made.g, bool(at.rows.half))
    z, made.z, made.g, made.loss = made.z if room is None else room, None, None, None
    return (made, z) if want_z else (made,)


def linear_step(at: Place, line: Instruction, given: Tensors) -> Made:
    """The whole of a dense layer's turn without its activations ever being stored."""
    ctx, i, x = at.ctx, line.index, given["x"]
    layer = ctx.net.layer(i)
    parts = [(name, p) for name, p in (("weight", layer.weight), ("bias", layer.bias))
             if p is not None]
    finish = all(p.requires_grad for _, p in parts)
    # a part that is frozen: the gradients alone, of which the other part takes its own
    given_parts = [ctx.parameter(i, *part) for part in parts] if finish else [
        Parameter(p.detach(), grad_out=grad) for (_, p), grad in zip(
            parts, zeros_like_parameters(layer), strict=False)]
    weight, *bias = cast(list[Parameter], given_parts)
    made = linear.linear_step(
        weight, x, ctx.targets(i, at.tile, x.shape[0]),
        config=layer.settings(ctx.seed, i, ctx.step), optim=ctx.optimizer.config(layer.weight),
        bias=bias[0] if bias else None, g0=given.get("g0"), finish=finish, backend=ctx.backend)
    if not finish:
        affine.step_all(ctx, i, [(name, p, cast(torch.Tensor, q.grad_out)) for (name, p), q in zip(
            parts, (weight, *bias), strict=True)], "")
    ctx.note(i, made.loss, made.g)
    if "g0" in given:
        ctx.coef[i] = [made.coef]
    return ()


def update(at: Place, line: Instruction, given: Tensors) -> Made:
    """Every parameter of the layer, from dL/da; tiles add up and the last one steps."""
    affine.update(at.ctx, line.index, given["u"], given.get("statistics"), given["d"],
                  given.get("sums", (None, None)), at.finish, du=given.get("du"))
    return ()


def pass_on(at: Place, line: Instruction, given: Tensors) -> Made:
    """The features that a layer whose samples share no statistics trains with, dropout and all."""
    ctx = at.ctx
    config, clock = ctx.dropout(line.index)
    a = preactivation(ctx, line.index, given.pop("x"))
    z = sweeps.local_pass(a, config=config, out=a if config.pool == "none" else None, tile=at.tile,
                          shortcut=given.pop("shortcut", None), clock=clock, backend=ctx.backend).z
    return (z,) if line.writes else ()


def pass_updated(at: Place, line: Instruction, given: Tensors) -> Made:
    """The features that the updated weights give."""
    layer = at.ctx.net.layer(line.index)
    a = preactivation(at.ctx, line.index, layer.enter(given.pop("x"), training=False)[0])
    return (layer.sweep(a, shortcut=given.pop("shortcut", None), backend=at.ctx.backend)[0],)


def infer(at: Place, line: Instruction, given: Tensors) -> Made:
    """The features of a layer at rest, and its goodness if somebody wants it; above the frozen ones
    with the batch's own statistics."""
    ctx, i, x = at.ctx, line.index, given.pop("x")
    layer = ctx.net.layer(i)
    return layer.infer(x, want_z=bool(line.writes),
                       training=i >= ctx.whose().start and layer.uses_batch_statistics,
                       shortcut=given.pop("shortcut", None), half=ctx.half(i, x.dtype),
                       backend=ctx.backend)[:len(line.writes)]


def place(at: Place, line: Instruction, given: Tensors) -> Made:
    """A layer's map after its concatenation, the shortcut in its place and the layer's own channels
    still to be written."""
    shortcut, shape = given.pop("shortcut"), at.ctx.net.shapes[line.index + 1]
    made = empty(shortcut, shortcut.shape[0], shape)
    made[:, shape[0] - shortcut.shape[1]:].copy_(shortcut)
    return (made,)


def concatenate(at: Place, line: Instruction, given: Tensors) -> Made:
    """Features and shortcut as channels of one map."""
    return (torch.cat([given["z"], given["shortcut"]], 1),)


def branch(at: Place, line: Instruction, given: Tensors) -> Made:
    """A shortcut of half the size."""
    return (F.avg_pool2d(given["x"], 2),)


def input_gradient(at: Place, line: Instruction, given: Tensors) -> Made:
    """dL/du at what the layer's weight sees."""
    return (affine.input_gradient(at.ctx.net.layer(line.index), given["u"], given["d"].da,
                                  given.get("operands")),)


def through_norm(at: Place, line: Instruction, given: Tensors) -> Made:
    """dL/dx at the layer's input; over dL/du, unless somebody wants that later."""
    du = given.pop("du")
    if dict(line.reads)["du"] not in line.frees:
        du = du.clone()
    return (affine.through_norm(at.ctx.net.layer(line.index), du, given.get("statistics")),)


def update_labels(at: Place, line: Instruction, given: Tensors) -> Made:
    """Steps the label embedding, from the gradient of the channel that showed it."""
    if at.ctx.labels is not None:  # a layer that is timed alone is shown none
        label_channel.update(at.ctx, given["dx"], given["of"].da_scale)
    return ()


def head_alone(at: Place, line: Instruction, given: Tensors) -> Made:
    """A head whose features come from a pass of their own."""
    ctx, h, item = at.ctx, line.index, given["batch"]
    if isinstance(item, Batch):
        ctx.head_results[h] = heads.train_on_own_pass(ctx, h, item, at.dtype)
    return ()


def gram(at: Place, line: Instruction, given: Tensors) -> Made:
    """Adds a batch to what a head's least squares is solved from: X'X and X'Y."""
    ctx, h, item = at.ctx, line.index, given["batch"]
    predictor = heads.of(ctx.net, h)
    x = heads.own_features(ctx, h, item, at.dtype).to(predictor.weight.dtype)
    target = F.one_hot(item.y, predictor.num_classes).to(x.dtype)
    inner, cross = x.t() @ x, x.t() @ target
    if predictor.gram is not None:
        inner, cross = inner.add_(predictor.gram[0]), cross.add_(predictor.gram[1])
    predictor.gram = inner, cross
    logits = predictor(x)
    ctx.head_results[h] = F.cross_entropy(logits, item.y), logits
    return ()


def head(at: Place, line: Instruction, given: Tensors) -> Made:
    """A head that reads this pass's features, of all tiles."""
    parts = [whole([t.flatten(1) for t in (made if isinstance(made, list) else [made])])
             for made in given.values()]
    ctx, h = at.ctx, line.index
    ctx.head_results[h] = heads.train_head(ctx, h, whole(parts, 1), ctx.y)
    return ()
