"""The ops as torch sees them: schemas that only mutate, implementations, and fakes that do nothing.

torch.compile and torch.export trace these; eager calls go straight to the Python functions, which
costs 1-2 µs less. Registered with define/impl: the decorator costs 9 µs a call.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from ffengine.ops.optim import ConvGeometry, OptimConfig, OptimState

if TYPE_CHECKING:
    from ffengine.ops.call import LocalPassCall, LocalPassTensors

#: torch leaves Library without annotations.
library: Any = torch.library.Library("ffengine", "FRAGMENT")  # type: ignore[no-untyped-call]

library.define(
    "weight_update(Tensor(a!) weight, Tensor x, Tensor da, Tensor(b!)? m, Tensor(c!)? v, "
    "Tensor(d!)? accumulate, Tensor(e!)? grad_out, Tensor(f!)? bias, Tensor(g!)? bias_m, "
    "Tensor(h!)? bias_v, Tensor(i!)? bias_accumulate, Tensor(j!)? bias_grad_out, str kind, "
    "float[] numbers, bool nesterov, int step, int[] geometry, bool finish, float da_scale, "
    "str backend) -> ()")


def _weight_update(
    weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor, m: torch.Tensor | None,
    v: torch.Tensor | None, accumulate: torch.Tensor | None, grad_out: torch.Tensor | None,
    bias: torch.Tensor | None, bias_m: torch.Tensor | None, bias_v: torch.Tensor | None,
    bias_accumulate: torch.Tensor | None, bias_grad_out: torch.Tensor | None, kind: str,
    numbers: list[float], nesterov: bool, step: int, geometry: list[int], finish: bool,
    da_scale: float, backend: str,
) -> None:
    from ffengine.ops import weight_update as op

    lr, beta1, beta2, eps, weight_decay, momentum = numbers
    op.weight_update(
        weight, x, da,
        optim=OptimConfig(kind, lr, (beta1, beta2), eps,  # type: ignore[arg-type]
                          weight_decay, momentum, nesterov),
        state=OptimState(m, v, step),
        geometry=ConvGeometry((geometry[0], geometry[1]), *geometry[2:]) if geometry else None,
        accumulate=accumulate, finish=finish, grad_out=grad_out, bias=bias,
        bias_state=OptimState(bias_m, bias_v, step), bias_accumulate=bias_accumulate,
        bias_grad_out=bias_grad_out, da_scale=da_scale, backend=backend)


def _weight_update_fake(*args: Any) -> None:
    return None


library.impl("weight_update", _weight_update, "CompositeExplicitAutograd")
torch.library.register_fake("ffengine::weight_update", _weight_update_fake, lib=library)


def weight_update(
    weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor, optim: OptimConfig,
    state: OptimState | None, geometry: ConvGeometry | None, accumulate: torch.Tensor | None,
    finish: bool, grad_out: torch.Tensor | None, bias: torch.Tensor | None,
    bias_state: OptimState | None, bias_accumulate: torch.Tensor | None,
    bias_grad_out: torch.Tensor | None, da_scale: float, backend: str,
) -> None:
    """ffengine.ops.weight_update.weight_update through its registered op."""
    s, b = state or OptimState(None, None), bias_state or OptimState(None, None)
    torch.ops.ffengine.weight_update(
        weight, x, da, s.m, s.v, accumulate, grad_out, bias, b.m, b.v, bias_accumulate,
        bias_grad_out, optim.kind,
        [optim.lr, *optim.betas, optim.eps, optim.weight_decay, optim.momentum], optim.nesterov,
        s.step, [*geometry.kernel, geometry.stride, geometry.padding, geometry.groups]
        if geometry else [], finish, da_scale, backend)
    if finish:
        for counted in (state, bias_state):
            if counted is not None:
                counted.step += 1


library.define(
    "local_pass(Tensor a, Tensor? y, Tensor? g0, Tensor? h_prev, Tensor offsets, Tensor(a!)? z, "
    "Tensor(b!) g, Tensor(c!)? loss, Tensor(d!)? coef, Tensor(e!)? da, Tensor(f!) stats, "
    "int[] ints, float[] floats, str backend) -> ()")


def _local_pass(a: torch.Tensor, y: torch.Tensor | None, g0: torch.Tensor | None,
                h_prev: torch.Tensor | None, offsets: torch.Tensor, z: torch.Tensor | None,
                g: torch.Tensor, loss: torch.Tensor | None, coef: torch.Tensor | None,
                da: torch.Tensor | None, stats: torch.Tensor, ints: list[int],
                floats: list[float], backend: str) -> None:
    from ffengine.ops import call as op

    tensors = op.LocalPassTensors(a, y, g0, h_prev, offsets, z, g, loss, coef, da, stats)
    op.run(backend, tensors, unpack_call(ints, floats))


def _local_pass_fake(*args: Any) -> None:
    return None


library.impl("local_pass", _local_pass, "CompositeExplicitAutograd")
torch.library.register_fake("ffengine::local_pass", _local_pass_fake, lib=library)


def pack_call(call: LocalPassCall) -> tuple[list[int], list[float]]:
    """A call's numbers as the schema carries them: whole numbers and flags, then floats."""
    ints, floats = [], []
    for f in fields(call):
        value = getattr(call, f.name)
        if f.type == "float":
            floats.append(value)
        else:  # a 64-bit seed travels in the schema's signed 64 bits
            ints.append(value - 2**64 if value >= 2**63 else int(value))
    return ints, floats


def unpack_call(ints: list[int], floats: list[float]) -> LocalPassCall:
    """The inverse of `pack_call`."""
    from ffengine.ops.call import LocalPassCall

    whole, real = iter(ints), iter(floats)
    values: dict[str, Any] = {}
    for f in fields(LocalPassCall):
        value = next(real) if f.type == "float" else next(whole)
        values[f.name] = bool(value) if f.type == "bool" else value
    values["dropout_seed"] %= 2**64
    return LocalPassCall(**values)


def local_pass(backend: str, tensors: LocalPassTensors, call: LocalPassCall) -> None:
    """A kernel call of ffengine.ops.local_pass through its registered op."""
    torch.ops.ffengine.local_pass(*tensors, *pack_call(call), backend)
