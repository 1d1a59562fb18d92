"""What the instructions of overlapping updates do; see instructions.py for how they are written."""

from __future__ import annotations

import torch

from ffengine.engine import affine
from ffengine.engine.context import StepContext
from ffengine.engine.instructions import Made, Place, Tensors
from ffengine.engine.program import Instruction
from ffengine.engine.rows import empty
from ffengine.nn.layers import as_laid_out
from ffengine.ops import routes as gradient_routes


def add(at: Place, line: Instruction, given: Tensors) -> Made:
    """Features and shortcut in one map, over the features."""
    return (given["z"].add_(given["shortcut"]),)


def activate(at: Place, line: Instruction, given: Tensors) -> Made:
    """The features of a layer that does not take its loss."""
    z, _ = at.ctx.net.layer(line.index).sweep(given.pop("a"), want_z=bool(line.writes),
                                              backend=at.ctx.backend)
    return (z,) if line.writes else ()


def operands(at: Place, line: Instruction, given: Tensors) -> Made:
    """What the layer multiplies and adds, for all tiles."""
    return (at.ctx.net.layer(line.index).operands(given["u"]),)


def routes(at: Place, line: Instruction, given: Tensors) -> Made:
    """Where a gradient goes through relu and pool, a byte an element of the features."""
    layer, a = at.ctx.net.layer(line.index), given["a"]
    made = empty(a, len(a), layer.z_shape(at.ctx.net.input_of(
        line.index, at.ctx.net.shapes[line.index])), torch.uint8)
    gradient_routes.routes(a, made, pool=layer.config.pool == "max2",
                           straight=layer.config.relu_gradient == "straight_through",
                           backend=_of_routes(at.ctx))
    return (made,)


def _of_routes(ctx: StepContext) -> str:
    """Only CPUs have kernels for them."""
    return "auto" if ctx.backend in ("auto", "cpu") else "reference"


def along_routes(at: Place, line: Instruction, given: Tensors) -> Made:
    """dL/da of dL/dz through relu and pool, for the update by the next layer's loss."""
    net, i, way = at.ctx.net, line.index, given["routes"]
    dz = given["dz"].reshape(way.shape)  # flattened between a convolution and a linear layer
    da = gradient_routes.along_routes(
        way, as_laid_out(dz), net.layer(i).out_shape(net.input_of(i, net.shapes[i])),
        pool=net.layer(i).config.pool == "max2", backend=_of_routes(at.ctx))
    return (affine.SweepResult(None, None, None, da.to(dz.dtype), given["of"].da_scale),)


def gradient_sums(at: Place, line: Instruction, given: Tensors) -> Made:
    """Where a layer's gradients add up at the weights as they are."""
    return (affine.GradientSums(at.ctx, line.index),)


def add_gradient(at: Place, line: Instruction, given: Tensors) -> Made:
    """The gradients of a tile's rows."""
    statistics, d = given.get("statistics"), given["d"]
    x_hat = None if statistics is None else at.rows.of(statistics.x_hat)
    given["sums"].add(given["u"], x_hat, d.da, d.da_scale, given.get("du"))
    return ()


def gradient(at: Place, line: Instruction, given: Tensors) -> Made:
    """The gradients of all parameters of a layer."""
    return (given["sums"].done(),)


def update_own(at: Place, line: Instruction, given: Tensors) -> Made:
    """Steps a layer by its own loss."""
    affine.step_all(at.ctx, line.index, given["gradients"], "")
    return ()


def update_next(at: Place, line: Instruction, given: Tensors) -> Made:
    """Steps a layer by the next layer's loss, with the optimizer states which that one owns."""
    affine.step_all(at.ctx, line.index, given["gradients"], "next")
    return ()
