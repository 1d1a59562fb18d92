"""`linear_step` as torch sees it: one op that only mutates; see ffengine/ops/library.py."""

from __future__ import annotations

from typing import Any, cast

import torch

from ffengine.ops.config import Dropout, LocalPassConfig, Loss, Norm
from ffengine.ops.library import (
    functions,
    library,
    pack_optim,
    pack_random,
    signed,
    unpack_optim,
    unpack_state,
)
from ffengine.ops.optim import OptimState
from ffengine.ops.params import LinearStepCall, LinearStepOutput

library.define(
    "linear_step(Tensor(a!) weight, Tensor x, Tensor y, Tensor(b!)? m, Tensor(c!)? v, "
    "Tensor(d!)? bias, Tensor(e!)? bias_m, Tensor(f!)? bias_v, Tensor? g0, Tensor(g!)? grad_out, "
    "Tensor(h!)? bias_grad_out, Tensor(i!)? m_scale, Tensor(j!)? v_scale, "
    "Tensor(k!)? bias_m_scale, Tensor(l!)? bias_v_scale, Tensor(m!) g, Tensor(n!) loss, "
    "Tensor(o!) coef, str[] words, int[] groups, int[] ints, float[] floats, str backend) -> ()")


def pack(c: LinearStepCall) -> tuple[list[str], list[int], list[int], list[float]]:
    """A call's settings as the schema carries them; `groups` is [K] where K groups are equal."""
    loss, drop, norm = cast(Loss, c.config.loss), c.config.dropout, c.input_norm
    words, numbers, nesterov = pack_optim(c.optim)
    states = [pack_random(s or OptimState(None, None)) for s in (c.state, c.bias_state)]
    return ([c.config.goodness, c.config.relu_gradient, loss.name, loss.reduction, norm.kind,
             norm.length, *words],
            [c.config.groups] if isinstance(c.config.groups, int) else list(c.config.groups),
            [signed(drop.seed & (2**64 - 1)), drop.layer, drop.step, c.tile_rows or 0, nesterov,
             c.finish, *states[0], *states[1]],
            [*loss.p, drop.p, norm.eps, *numbers])


def unpack(tensors: tuple[torch.Tensor | None, ...], words: list[str], groups: list[int],
           ints: list[int], floats: list[float]) -> LinearStepCall:
    """The inverse of `pack`; tensors: those of the schema before g."""
    weight, x, y, m, v, bias, bias_m, bias_v, g0, grad_out, bias_grad_out, *scales = tensors
    goodness, relu_gradient, name, reduction, kind, length, *optim = words
    p0, p1, p2, p, norm_eps, *numbers = floats
    seed, layer, drop_step, tile_rows, nesterov, finish, *states = ints
    config: Any = LocalPassConfig(
        groups[0] if len(groups) == 1 else tuple(groups), cast(Any, goodness),
        Loss(name, (p0, p1, p2), cast(Any, reduction)), Norm("none"), cast(Any, relu_gradient),
        dropout=Dropout(p, seed % 2**64, layer, drop_step))
    return LinearStepCall(
        cast(torch.Tensor, weight), cast(torch.Tensor, x), y, config,
        unpack_optim(optim, numbers, bool(nesterov)),
        unpack_state((m, v, scales[0], scales[1]), states[:3]), bias,
        unpack_state((bias_m, bias_v, scales[2], scales[3]), states[3:]),
        Norm(cast(Any, kind), norm_eps, cast(Any, length)), g0, tile_rows or None, grad_out,
        bias_grad_out, bool(finish))


def _linear_step(*arguments: Any) -> None:
    call = unpack(arguments[:15], *arguments[18:22])
    functions["linear_step"](call, arguments[22], LinearStepOutput(*arguments[15:18]))


def _linear_step_fake(*arguments: Any) -> None:
    return None


library.impl("linear_step", _linear_step, "CompositeExplicitAutograd")
torch.library.register_fake("ffengine::linear_step", _linear_step_fake, lib=library)


def arguments(c: LinearStepCall, backend: str, result: LinearStepOutput) -> tuple[Any, ...]:
    """What the registered op takes, in the schema's order."""
    s, b = c.state or OptimState(None, None), c.bias_state or OptimState(None, None)
    return (c.weight, c.x, c.y, s.m, s.v, c.bias, b.m, b.v, c.g0, c.grad_out, c.bias_grad_out,
            s.m_scale, s.v_scale, b.m_scale, b.v_scale, *result, *pack(c), backend)


def linear_step(c: LinearStepCall, backend: str, result: LinearStepOutput) -> None:
    """ffengine.ops.linear_step.run through its registered op."""
    torch.ops.ffengine.linear_step(*arguments(c, backend, result))
