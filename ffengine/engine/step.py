"""How a batch becomes an update: runs of layers, sample tiles inside a run, one layer's step.

    for run in plan:                       # between runs, whole-batch maps
        for tile of samples:               # inside a run, depth-first
            for layer in run:
                x -> transform -> a -> local_pass -> z, da
                weight_update(x, da)       # into the run's buffer; the last tile steps
                drop x, da; join the shortcut

Every plan gives the same gradients: losses scale by the whole batch, z comes from the weights
before the step (or, with propagate="updated", after it), and the optimizer steps when the last
tile has been added.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ffengine.engine import affine, heads, label_channel
from ffengine.engine.affine import Buffers
from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport, Maps, StepContext, Turn
from ffengine.engine.inputs import completed, entrance
from ffengine.engine.plan import Plan, Run, one_tile
from ffengine.nn.layers import LocalLayer, LocalLinear
from ffengine.ops.batch_pass import batch_pass
from ffengine.ops.config import Loss, Tile
from ffengine.ops.linear_step import linear_step
from ffengine.ops.local_pass import local_pass
from ffengine.ops.memory_accounting import allocating
from ffengine.ops.optimizer_step import step_dtype


def train_batch(ctx: StepContext, item: Batch | torch.Tensor, plan: Plan,
                dtype: torch.dtype) -> BatchReport:
    """One step: the layers of the turn train on the batch, and then the heads."""
    ctx.roomy = plan.roomy
    with torch.no_grad():
        maps, results = begin(ctx, item, dtype)
        del item
        for run in covering(plan, range(ctx.first, ctx.whose().depth), ctx.batch):
            train_run(ctx, run, maps)
        del maps
        results |= heads.train_on_pass(ctx)
    ctx.optimizer.mark_stepped()
    return ctx.report(results)


def begin(ctx: StepContext, item: Batch | torch.Tensor,
          dtype: torch.dtype) -> tuple[Maps, heads.Results]:
    """(the first run's maps, what the heads with a pass of their own left)."""
    turn = ctx.whose()
    if isinstance(item, Batch):
        item = completed(ctx, item, dtype)
        ctx.first = turn.start if item.features is not None else 0
    results = heads.train_neutral(ctx, item, dtype)  # features of the weights before the step
    return Maps(entrance(ctx, item, dtype) if turn.depth else None), results


def covering(plan: Plan, layers: range, batch: int) -> list[Run]:
    """The plan's runs; layers that it leaves out, being of another turn, go in one tile."""
    if not plan.runs:
        return list(one_tile(layers, batch).runs)
    before = range(layers.start, plan.runs[0].layers.start)
    after = range(plan.runs[-1].layers.stop, layers.stop)
    return [*one_tile(before, batch).runs, *plan.runs, *one_tile(after, batch).runs]


def train_run(ctx: StepContext, run: Run, maps: Maps) -> None:
    """A run of layers over the whole batch; leaves its last maps in `maps`."""
    turn = ctx.whose()
    layers = [i for i in run.layers if ctx.first <= i < turn.depth]
    if not layers:
        return
    if run.tile >= ctx.batch:
        for i in layers:
            layer_step(ctx, i, maps, Tile(0, ctx.batch), (None, None), finish=True)
        return
    read = any(maps.x is t for tiles in ctx.features.values() for t in tiles)
    run = replace(run, overwrite_x=False) if read else run  # a head still wants it
    out = destination(maps, run, ctx.batch) if layers[-1] + 1 < turn.depth else Maps(None)
    for upto, trained in passes(run, layers, turn):
        train_tiles(ctx, run.tile, maps, upto, trained, out if upto is layers else Maps(None))
    maps.x, maps.shortcut = out.x, out.shortcut


def passes(run: Run, layers: list[int], turn: Turn) -> list[tuple[list[int], list[int]]]:
    """(layers that the tiles go through, those of them that train), pass by pass.

    One by one, the last layer trains first: no layer's features have changed when it is run anew.
    """
    if not run.one_by_one:
        return [(layers, layers)]
    below = [(layers[:k + 1], [layers[k]]) for k in range(len(layers) - 2, -1, -1)
             if layers[k] in turn.layers]
    return [(layers, layers[-1:]), *below]


def train_tiles(ctx: StepContext, size: int, maps: Maps, layers: list[int], trained: list[int],
                out: Maps) -> None:
    """The batch's tiles through `layers`; the last layer's maps into `out`, where it has any."""
    with allocating("gradient"):
        buffers = {i: zeros_like_parameters(ctx.net.layer(i)) for i in trained
                   if i in ctx.whose().layers and ctx.sums is None}
    for start in range(0, ctx.batch, size):
        stop = min(start + size, ctx.batch)
        piece = maps.rows(start, stop)
        for i in layers:
            layer_step(ctx, i, piece, Tile(start, ctx.batch), buffers.get(i, (None, None)),
                       finish=stop == ctx.batch, passing=i not in trained)
        store(piece, out, start, stop)
        del piece  # or its maps would live through the next tile


def store(piece: Maps, out: Maps, start: int, stop: int) -> None:
    """A tile's last maps into their rows of the whole batch's."""
    for kept, part in ((out.x, piece.x), (out.shortcut, piece.shortcut)):
        if kept is not None and part is not None:
            kept[start:stop].copy_(part)


def destination(maps: Maps, run: Run, batch: int) -> Maps:
    """Whole-batch maps a run writes: over its own input where the shapes agree, else new."""
    assert maps.x is not None
    like = maps.x

    def place(shape: tuple[int, ...], over: torch.Tensor | None) -> torch.Tensor:
        if over is not None and tuple(over.shape[1:]) == shape:
            return over
        layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        return torch.empty((batch, *shape), dtype=like.dtype, device=like.device,
                           memory_format=layout)

    x = place(run.out_shape, maps.x if run.overwrite_x else None)
    if run.shortcut_shape is None:
        return Maps(x)
    if run.shortcut_is_x:
        return Maps(x, x)
    return Maps(x, place(run.shortcut_shape, maps.shortcut if run.overwrite_shortcut else None))


def zeros_like_parameters(layer: LocalLayer) -> Buffers:
    """Where the tiles of a run add up the gradients of (weight, bias)."""
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    return torch.zeros_like(layer.weight, dtype=step_dtype(layer.weight.dtype)), bias


def layer_step(ctx: StepContext, i: int, maps: Maps, tile: Tile, buffers: Buffers,
               finish: bool, passing: bool = False) -> None:
    """One layer's whole turn on a tile; `maps` goes in as its input and comes out as the next's.

    Args:
        passing: it gives the features that it trains with, and trains in another pass.
    """
    net, layer, turn = ctx.net, ctx.net.layer(i), ctx.whose()
    assert maps.x is not None
    x = net.transform(i, maps.x)
    maps.x = None
    want_z = ctx.wants_z(i)
    if want_z:
        maps.addend, maps.shortcut = net.addend(i, maps.shortcut)
    met = maps.addend is not None
    if i not in turn.layers:
        z, _ = layer.infer(x, want_z=want_z, training=i >= turn.start and layer.couples,
                           shortcut=maps.taken(), half=ctx.half(i, x.dtype), backend=ctx.backend)
    elif passing:
        z = pass_on(ctx, i, x, tile, maps)
    else:
        joins = ctx.roomy and net.wires[i].join == "concat" and net.propagate == "stale"
        if want_z and joins and layer.couple is None:
            maps.x, met = joined_map(ctx, i, maps), True
        z = train_layer(ctx, i, x, tile, buffers, finish, want_z, maps)
    del x
    if z is not None:
        joined = [z if maps.x is None else maps.x]
        del z
        maps.x = None
        maps.x, maps.shortcut = net.join(i, joined.pop(), maps.shortcut, met)
        if i in ctx.read_by_heads() and not passing:
            ctx.features.setdefault(i, []).append(maps.x)


def joined_map(ctx: StepContext, i: int, maps: Maps) -> torch.Tensor:
    """Layer i's map after its concatenation, the shortcut in its place and the layer's own channels
    still to be written."""
    shortcut, maps.shortcut = maps.shortcut, None
    assert shortcut is not None
    shape = ctx.net.shapes[i + 1]
    layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    made = torch.empty((shortcut.shape[0], *shape), dtype=shortcut.dtype, device=shortcut.device,
                       memory_format=layout)
    made[:, shape[0] - shortcut.shape[1]:].copy_(shortcut)
    return made


def train_layer(ctx: StepContext, i: int, x: torch.Tensor, tile: Tile, buffers: Buffers,
                finish: bool, want_z: bool, maps: Maps) -> torch.Tensor | None:
    """x -> a -> sweep -> update; z, with `maps.addend`, where the next layer wants it."""
    layer, updated = ctx.net.layer(i), ctx.net.propagate == "updated"
    masks = layer.dropout > 0 and ctx.clock is not None  # from memory, which linear_step has not
    shown = i == 0 and ctx.labels is not None
    if not want_z and ctx.sums is None and streams(layer, x, tile) and not (masks or shown):
        stream_layer(ctx, i, x, tile)
        return None
    u, made = layer.enter(x, training=True)
    a = preactivation(ctx, i, u)
    own = None if maps.x is None else maps.x[:, :a.shape[1]]
    swept = sweep(ctx, i, a, tile, want_z=want_z and not updated,
                  shortcut=None if updated else maps.taken(), into=own)
    del a, own
    assert swept.da is not None and swept.loss is not None
    z = swept.z
    ctx.note(i, swept.loss, swept.g)
    du = label_channel.train(ctx, u, made, swept) if shown else None
    affine.update(ctx, i, u, made, swept, buffers, finish, du=du)
    del swept, u, made, du
    if want_z and updated:
        z, _ = layer.sweep(preactivation(ctx, i, layer.enter(x, training=False)[0]),
                           shortcut=maps.taken(), backend=ctx.backend)
    return z


def pass_on(ctx: StepContext, i: int, x: torch.Tensor, tile: Tile,
            maps: Maps) -> torch.Tensor | None:
    """z as `train_layer` gives it, dropout and all, of a layer whose samples do not couple."""
    config, clock = ctx.dropout(i)
    a = preactivation(ctx, i, x)
    return local_pass(a, config=config, out=a if config.pool == "none" else None, tile=tile,
                      shortcut=maps.taken(), clock=clock, backend=ctx.backend).z


def preactivation(ctx: StepContext, i: int, u: torch.Tensor) -> torch.Tensor:
    """a of what the layer's weight sees; what both halves share of it is multiplied once."""
    layer = ctx.net.layer(i)
    if i == 0 and ctx.differ is not None and u.shape[0] == ctx.batch:
        assert isinstance(layer, LocalLinear)
        return layer.of_halves(u, ctx.differ)
    return layer.preactivation(u, layer.operands(u, ctx.half(i, u.dtype)))


def streams(layer: LocalLayer, x: torch.Tensor, tile: Tile) -> bool:
    """A dense layer whose features nobody asked for, and whose loss is known: `linear_step`.

    Worth it where the activations that are never stored outweigh the gradient that it forms.
    """
    plain = layer.geometry is None and layer.pre_norm is None and layer.couple is None
    return (plain and isinstance(layer.config.loss, Loss) and tile.batch == x.shape[0]
            and 2 * x.shape[0] > layer.weight.shape[1])


def stream_layer(ctx: StepContext, i: int, x: torch.Tensor, tile: Tile) -> None:
    """The whole of a dense layer's turn without its activations ever being stored."""
    layer, opt, bias = ctx.net.layer(i), ctx.optimizer, ctx.net.layer(i).bias
    made = linear_step(
        layer.weight.detach(), x, ctx.targets(i, tile, x.shape[0]),
        config=layer.settings(ctx.seed, i, ctx.step), optim=opt.config(layer.weight),
        state=opt.state_of(layer.weight), bias=None if bias is None else bias.detach(),
        bias_state=opt.state_of(bias), g0=ctx.g0.get(i), grad_out=ctx.grad_of(i, "weight"),
        bias_grad_out=ctx.grad_of(i, "bias"), backend=ctx.backend)
    ctx.note(i, made.loss, made.g)
    if i in ctx.g0:
        ctx.coef[i] = [made.coef]


def sweep(ctx: StepContext, i: int, a: torch.Tensor, tile: Tile, *, want_z: bool,
          shortcut: torch.Tensor | None = None,
          into: torch.Tensor | None = None) -> affine.Swept:
    """The layer's goodness, loss and gradients at a; z, or da, over a unless it pools.

    Args:
        shortcut: added to z.
        into: where z goes instead.
    """
    layer, n = ctx.net.layer(i), a.shape[0]
    config, clock = ctx.dropout(i)
    y, out = ctx.targets(i, tile, n), a if config.pool == "none" else None
    out = out if into is None else into
    if layer.couple is None:
        g0 = ctx.g0.get(i)
        made = local_pass(
            a, y, config=config, out=out if want_z else None, want_z=want_z, want_da=True,
            da_out=None if want_z else out, tile=tile, shortcut=shortcut, clock=clock,
            g0=None if g0 is None else g0[tile.start:tile.start + n], backend=ctx.backend)
        if i in ctx.g0 and made.coef is not None:
            ctx.coef.setdefault(i, []).append(made.coef)
        return affine.Swept(made.z, made.g, made.loss, made.da, made.da_scale)
    both = batch_pass(
        a, y, config=config, couple=layer.couple, gamma=layer.norm_weight, beta=layer.norm_bias,
        running_mean=layer.running_mean, running_var=layer.running_var, out=out if want_z else None,
        want_z=want_z, want_da=True, backend=ctx.backend)
    if both.penalty is not None:
        ctx.penalties[i] = both.penalty
    if both.z is not None and shortcut is not None:
        both.z.add_(shortcut)
    return affine.Swept(both.z, both.g, both.loss, both.da, both.da_scale, both.dgamma, both.dbeta)
