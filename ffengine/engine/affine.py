"""A layer's update: weight, bias, and the affine maps of its normalisations.

A BatchNorm before the weight takes no input gradient: with dŴ the weight gradient against
x̂ and S[o, k] the sum of da[o] under kernel tap k, borders included,

    dW = g dŴ + b S      dg_c = sum of W dŴ over the channel      db_c = sum of W S.

LayerNorm over all elements takes one input-gradient convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ffengine.engine.context import StepContext
from ffengine.nn.layers import LocalLayer, Operands
from ffengine.nn.norms import Normalised, PreNorm
from ffengine.ops import pieces
from ffengine.ops.host import constant
from ffengine.ops.optim import ConvGeometry, Parameter
from ffengine.ops.optimizer_step import step_dtype
from ffengine.ops.product_rule import exact
from ffengine.ops.weight_update import bias_gradient, gradient_update, weight_update


@dataclass
class SweepResult:
    """What a layer's sweep left: see ffengine.ops.local_pass and batch_pass."""

    z: torch.Tensor | None
    g: torch.Tensor | None
    loss: torch.Tensor | None
    da: torch.Tensor | None
    da_scale: float = 1.0
    dgamma: torch.Tensor | None = None
    dbeta: torch.Tensor | None = None


Buffers = tuple[torch.Tensor | None, torch.Tensor | None]


def update(ctx: StepContext, i: int, u: torch.Tensor, made: Normalised | None, swept: SweepResult,
           buffers: Buffers = (None, None), finish: bool = True, owner: str = "",
           du: torch.Tensor | None = None) -> None:
    """Step every parameter of layer i from da at its pre-activation.

    Args:
        u, made: what LocalLayer.enter gave.
        buffers, finish: of a run's tiles; whole batches only where the input is normalised.
        owner: whose optimizer states (OLU).
        du: dL/du times da_scale, where the caller has it (unfolded norms; else computed here).
    """
    layer = ctx.net.layer(i)
    da, scale = swept.da, swept.da_scale
    assert da is not None
    if made is None:
        if ctx.sums is not None:
            (total, last, share), (bias_total, *_) = (
                ctx.adding(p, owner) for p in (layer.weight, layer.bias))
            buffers, finish, scale = (total, bias_total), finish and last, scale / share
        weight = ctx.parameter(i, "weight", layer.weight, owner, buffers[0])
        bias = ctx.parameter(i, "bias", layer.bias, owner, buffers[1])
        if weight is None:
            update_bias(ctx, layer.bias, bias, da, finish, scale)
            return norms(ctx, i, swept, owner)
        weight_update(
            weight, u, da, optim=ctx.optimizer.config(layer.weight), geometry=layer.geometry,
            bias=bias, finish=finish, da_scale=scale, backend=ctx.backend)
    else:
        step_all(ctx, i, normalised_gradients(ctx, i, u, made, da, scale, du), owner)
    norms(ctx, i, swept, owner)


def norms(ctx: StepContext, i: int, swept: SweepResult, owner: str) -> None:
    """Step the affine map of the normalisation after layer i."""
    layer = ctx.net.layer(i)
    for name, grad in (("norm_weight", swept.dgamma), ("norm_bias", swept.dbeta)):
        if grad is not None:
            step(ctx, i, name, getattr(layer, name), grad, owner)


def update_bias(ctx: StepContext, bias: nn.Parameter | None, p: Parameter | None, da: torch.Tensor,
                finish: bool, scale: float) -> None:
    """Step a bias `p`, or None, whose weight is frozen; arguments as `update` gives
    weight_update."""
    if p is None:
        return
    grad = bias_gradient(da, p.value.dtype)
    if p.accumulate is not None:
        grad, scale = p.accumulate.add_(grad, alpha=1.0 / scale), 1.0
    if finish:
        gradient_update(p._replace(accumulate=None), grad, optim=ctx.optimizer.config(bias),
                        scale=scale, backend=ctx.backend)


def step(ctx: StepContext, i: int | str, name: str, parameter: nn.Parameter, grad: torch.Tensor,
         owner: str = "", scale: float = 1.0) -> None:
    """Step one parameter, unless it is frozen, with a gradient that exists, times `scale`."""
    p = ctx.parameter(i, name, parameter, owner)
    if p is None:
        return
    total, last, share = ctx.adding(parameter, owner)
    if total is not None:
        grad, scale = total.add_(grad, alpha=share / scale), 1.0
    if not last:
        return
    gradient_update(p, grad.to(step_dtype(parameter.dtype)),
                    optim=ctx.optimizer.config(parameter), scale=scale, backend=ctx.backend)


Gradients = list[tuple[str, nn.Parameter, torch.Tensor]]


def step_all(ctx: StepContext, i: int, gradients: Gradients, owner: str) -> None:
    """Step layer i's parameters with what `normalised_gradients` gave."""
    for name, parameter, grad in gradients:
        step(ctx, i, name, parameter, grad, owner)


def normalised_gradients(ctx: StepContext, i: int, u: torch.Tensor, made: Normalised,
                         da: torch.Tensor, scale: float, du: torch.Tensor | None) -> Gradients:
    """(name, parameter, gradient) of a layer with a pre_norm, at the weights as they are."""
    sums = GradientSums(ctx, i)
    sums.add(u, made.x_hat, da, scale, du)
    return sums.done()


class GradientSums:
    """Gradients of a layer's parameters at the weights as they are, added up tile by tile."""

    def __init__(self, ctx: StepContext, i: int) -> None:
        self.ctx, self.layer = ctx, ctx.net.layer(i)
        weight = self.layer.weight.detach()
        self._wide = step_dtype(weight.dtype)
        #: Of the weight, against what it sees: x̂ where a norm is folded into it.
        self.against = torch.zeros_like(weight, dtype=self._wide)
        self._sums: dict[str, torch.Tensor] = {}
        #: Of the da that came last.
        self.da_scale = 1.0
        #: Of the input's map.
        self._size = torch.Size()

    def add(self, u: torch.Tensor, x_hat: torch.Tensor | None, da: torch.Tensor, scale: float,
            du: torch.Tensor | None = None) -> None:
        """Add some rows: what the weight saw of them, x̂ (unfolded norms), da times `scale`."""
        layer, ctx, norm = self.layer, self.ctx, self.layer.pre_norm
        self.da_scale = scale
        weight_update(Parameter(layer.weight.detach(), accumulate=self.against), u, da,
                      optim=ctx.optimizer.config(layer.weight), geometry=layer.geometry,
                      finish=False, da_scale=scale, backend=ctx.backend)
        if norm is not None and norm.folded:
            self._size = u.shape[2:]
            self._more("plane", plane_sums(da, self._wide), scale)
        elif norm is not None:
            assert x_hat is not None
            wide = (input_gradient(layer, u, da) if du is None else du).to(self._wide)
            self._more("dg", (wide * x_hat).sum(0), scale)
            self._more("db", wide.sum(0), scale)
        if layer.bias is not None:
            self._more("bias", bias_gradient(da, self._wide), scale)

    def _more(self, name: str, part: torch.Tensor, scale: float) -> None:
        part = part / scale if scale != 1.0 else part
        self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    def done(self) -> Gradients:
        """(name, parameter, gradient) of the layer's parameters."""
        layer, norm, sums, grad = self.layer, self.layer.pre_norm, self._sums, self.against
        found: Gradients = []
        if norm is not None:
            if norm.folded:
                taps = tap_sums(sums["plane"], layer.geometry, self._size)
                grad, dg, db = contract(layer.weight.detach(), grad, taps, norm)
            else:
                dg, db = sums["dg"], sums["db"]
            found += [("pre_norm.weight", norm.weight, dg), ("pre_norm.bias", norm.bias, db)]
        found.append(("weight", layer.weight, grad))
        if layer.bias is not None:
            found.append(("bias", layer.bias, sums["bias"]))
        return found


def contract(weight: torch.Tensor, against: torch.Tensor, taps: torch.Tensor,
             norm: PreNorm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dW, dg, db) from the weight gradient against x̂, which dW is written over: no input gradient
    is formed. By pieces: 3 sweeps over memory instead of 13."""
    columns = (1, -1, *[1] * (weight.dim() - 2))
    g, b = (p.detach().view(columns) for p in (norm.weight, norm.bias))
    over = [d for d in range(weight.dim()) if d != 1]
    dg, db = (torch.zeros_like(p, dtype=against.dtype) for p in (norm.weight, norm.bias))
    rows = pieces.rows_of(against)
    for w, part, tap in zip(*(torch.split(t, rows) for t in (weight, against, taps)), strict=True):
        dg += (w * part).sum(over)
        db += (w * tap).sum(over)
        part.mul_(g).addcmul_(b, tap)
    return against, dg, db


def plane_sums(da: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(O, P, Q), or (O,) of a linear layer: the sum of da over the samples."""
    if da.dim() == 2:
        return da.sum(0, dtype=dtype)
    # in the order of memory (8 ms, not 64, for 256 x 128 x 16 x 16 in channels_last), and 16 bits
    # widened some rows at a time (a sum that widens each element takes 3 times as long)
    flat = da.permute(0, 2, 3, 1).flatten(1)
    if da.device.type != "cpu":  # a GPU widens in registers
        total: torch.Tensor | int = flat.sum(0, dtype=dtype)
    else:
        step = pieces.rows_of(flat, dtype.itemsize)
        total = sum(part.to(dtype).sum(0) for part in torch.split(flat, step))
    assert isinstance(total, torch.Tensor)
    return total.view(*da.shape[2:], da.shape[1]).permute(2, 0, 1)


def tap_sums(plane: torch.Tensor, geometry: ConvGeometry | None, size: torch.Size) -> torch.Tensor:
    """S (O, 1, kH, kW): the sum over the pixels whose tap lies inside the input."""
    if geometry is None:
        return plane.unsqueeze(1)
    rows, columns = (
        constant(plane.device, inside, k, geometry, extent, out, plane.dtype)
        for k, extent, out in zip(geometry.kernel, size, plane.shape[1:], strict=True))
    return torch.einsum("opq,ip,jq->oij", plane, rows, columns).unsqueeze(1)


def inside(kernel: int, geometry: ConvGeometry, extent: int, out: int,
           dtype: torch.dtype) -> torch.Tensor:
    """(kernel, out): 1 where tap i of output position p reads the input, 0 in the padding."""
    at = (torch.arange(out, device="cpu") * geometry.stride)[None] + (
        torch.arange(kernel, device="cpu") - geometry.padding)[:, None]
    return ((at >= 0) & (at < extent)).to(dtype)


def input_gradient(layer: LocalLayer, u: torch.Tensor, da: torch.Tensor,
                   operands: Operands | None = None) -> torch.Tensor:
    """dL/du (times da's scale) at what the layer's weight saw; folded norms: dL/dx̂.

    operands: what the layer multiplied u with, where somebody keeps it.
    """
    norm, geometry = layer.pre_norm, layer.geometry
    if operands is not None:
        weight = operands.weight
    else:
        weight = layer.weight.detach()
        if norm is not None and norm.folded:
            weight = weight * norm.weight.detach().view(1, -1, *[1] * (weight.dim() - 2))
        weight = weight.to(da.dtype)
    if geometry is None:
        return da @ weight
    with exact(da.device.type):
        found: torch.Tensor = torch.ops.aten.convolution_backward(
            da, u, weight, None, [geometry.stride] * 2, [geometry.padding] * 2, [1, 1], False,
            [0, 0], geometry.groups, [True, False, False])[0]
    return found


def through_norm(layer: LocalLayer, du: torch.Tensor, made: Normalised | None) -> torch.Tensor:
    """dL/dx at the layer's input, from what `input_gradient` gave; written over it."""
    norm = layer.pre_norm
    if norm is None or made is None:
        return du
    dx_hat = du if norm.folded else du.mul_(norm.weight.detach().to(du.dtype))
    return norm.input_gradient(dx_hat, made, training=True)
