"""The ops as torch sees them: schemas that only mutate, implementations, and fakes that do nothing.

torch.compile and torch.export trace these; eager calls go straight to the Python functions, which
costs 1-2 µs less. Registered with define/impl: the decorator costs 9 µs a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch

from ffengine.ops.optim import ConvGeometry, OptimConfig, OptimState
from ffengine.ops.params import LocalPassCall, LocalPassTensors

#: torch leaves Library without annotations.
library: Any = torch.library.Library("ffengine", "FRAGMENT")  # type: ignore[no-untyped-call]
#: What the registered ops call, by their names.
functions: dict[str, Callable[..., None]] = {}
Function = TypeVar("Function", bound=Callable[..., None])


def implements(op: str) -> Callable[[Function], Function]:
    """Decorator of the function that registered op `op` calls."""
    def keep(function: Function) -> Function:
        functions[op] = function
        return function
    return keep


library.define(
    "weight_update(Tensor(a!) weight, Tensor x, Tensor da, Tensor(b!)? m, Tensor(c!)? v, "
    "Tensor(d!)? accumulate, Tensor(e!)? grad_out, Tensor(f!)? bias, Tensor(g!)? bias_m, "
    "Tensor(h!)? bias_v, Tensor(i!)? bias_accumulate, Tensor(j!)? bias_grad_out, "
    "Tensor(k!)? m_scale, Tensor(l!)? v_scale, Tensor(m!)? bias_m_scale, Tensor(n!)? bias_v_scale, "
    "str[] words, float[] numbers, bool nesterov, int[] random, int[] geometry, bool finish, "
    "float da_scale, str backend) -> ()")


def _weight_update(
    weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor, m: torch.Tensor | None,
    v: torch.Tensor | None, accumulate: torch.Tensor | None, grad_out: torch.Tensor | None,
    bias: torch.Tensor | None, bias_m: torch.Tensor | None, bias_v: torch.Tensor | None,
    bias_accumulate: torch.Tensor | None, bias_grad_out: torch.Tensor | None,
    m_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
    bias_m_scale: torch.Tensor | None, bias_v_scale: torch.Tensor | None, words: list[str],
    numbers: list[float], nesterov: bool, random: list[int], geometry: list[int], finish: bool,
    da_scale: float, backend: str,
) -> None:
    functions["weight_update"](
        weight, x, da, optim=unpack_optim(words, numbers, nesterov),
        state=unpack_state((m, v, m_scale, v_scale), random[:3]),
        geometry=ConvGeometry((geometry[0], geometry[1]), *geometry[2:]) if geometry else None,
        accumulate=accumulate, finish=finish, grad_out=grad_out, bias=bias,
        bias_state=unpack_state((bias_m, bias_v, bias_m_scale, bias_v_scale), random[3:]),
        bias_accumulate=bias_accumulate,
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
        bias_grad_out, s.m_scale, s.v_scale, b.m_scale, b.v_scale, *pack_optim(optim),
        [*pack_random(s), *pack_random(b)],
        [*geometry.kernel, geometry.stride, geometry.padding, geometry.groups]
        if geometry else [], finish, da_scale, backend)
    if finish:
        for counted in (state, bias_state):
            if counted is not None:
                counted.step += 1


Parts = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def pack_optim(optim: OptimConfig) -> tuple[list[str], list[float], bool]:
    """(words, numbers, nesterov), as the schemas carry an optimizer's settings."""
    return ([optim.kind, optim.state_precision],
            [optim.lr, *optim.betas, optim.eps, optim.weight_decay, optim.momentum],
            optim.nesterov)


def unpack_optim(words: list[str], numbers: list[float], nesterov: bool) -> OptimConfig:
    """The inverse of `pack_optim`."""
    kind, precision = words
    lr, beta1, beta2, eps, weight_decay, momentum = numbers
    return OptimConfig(kind, lr, (beta1, beta2), eps,  # type: ignore[arg-type]
                       weight_decay, momentum, nesterov, precision)  # type: ignore[arg-type]


def signed(seed: int) -> int:
    """A 64-bit seed in the schemas' signed 64 bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def pack_random(state: OptimState) -> list[int]:
    """A state's numbers: step, seed, stream."""
    return [state.step, signed(state.seed), state.stream]


def unpack_state(parts: Parts, numbers: list[int]) -> OptimState:
    """The state of (m, v, m_scale, v_scale) and `pack_random`'s numbers."""
    m, v, m_scale, v_scale = parts
    step, seed, stream = numbers
    return OptimState(m, v, step, m_scale, v_scale, seed % 2**64, stream)


library.define(
    "local_pass(Tensor a, Tensor? y, Tensor? g0, Tensor? h_prev, Tensor? shortcut, Tensor offsets, "
    "Tensor(a!)? z, Tensor(b!) g, Tensor(c!)? loss, Tensor(d!)? coef, Tensor(e!)? da, "
    "Tensor(f!) stats, Tensor? clock, int[] ints, float[] floats, str backend) -> ()")


def _local_pass(a: torch.Tensor, y: torch.Tensor | None, g0: torch.Tensor | None,
                h_prev: torch.Tensor | None, shortcut: torch.Tensor | None,
                offsets: torch.Tensor, z: torch.Tensor | None, g: torch.Tensor,
                loss: torch.Tensor | None, coef: torch.Tensor | None, da: torch.Tensor | None,
                stats: torch.Tensor, clock: torch.Tensor | None, ints: list[int],
                floats: list[float], backend: str) -> None:
    tensors = LocalPassTensors(a, y, g0, h_prev, shortcut, offsets, z, g, loss, coef, da, stats,
                               clock)
    functions["local_pass"](backend, tensors, unpack_call(ints, floats))


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
        else:
            ints.append(signed(int(value)))
    return ints, floats


def unpack_call(ints: list[int], floats: list[float]) -> LocalPassCall:
    """The inverse of `pack_call`."""
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
