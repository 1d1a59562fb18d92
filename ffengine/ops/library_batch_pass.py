"""`batch_pass`'s kernel calls as torch sees them; as ffengine/ops/library.py for the other ops."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ffengine.ops.library import functions, library
from ffengine.ops.params import BatchPassCall, BatchPassTensors

library.define(
    "batch_pass(Tensor a, Tensor? y, Tensor? gamma, Tensor(l!)? table, Tensor(m!)? weight, "
    "Tensor(a!)? moments, Tensor(b!)? extrema, Tensor(c!)? z, Tensor(d!)? da, Tensor? pivot, "
    "Tensor? beta, Tensor(e!)? running_mean, Tensor(f!)? running_var, Tensor? offsets, "
    "Tensor(g!)? g, Tensor(h!)? loss, Tensor(i!)? coef, Tensor(j!)? dgamma, Tensor(k!)? dbeta, "
    "int[] ints, float[] floats, str backend) -> ()")


def _batch_pass(a: torch.Tensor, y: torch.Tensor | None, gamma: torch.Tensor | None,
                table: torch.Tensor | None, weight: torch.Tensor | None,
                moments: torch.Tensor | None, extrema: torch.Tensor | None,
                z: torch.Tensor | None, da: torch.Tensor | None, pivot: torch.Tensor | None,
                beta: torch.Tensor | None, running_mean: torch.Tensor | None,
                running_var: torch.Tensor | None, offsets: torch.Tensor | None,
                g: torch.Tensor | None, loss: torch.Tensor | None, coef: torch.Tensor | None,
                dgamma: torch.Tensor | None, dbeta: torch.Tensor | None, ints: list[int],
                floats: list[float], backend: str) -> None:
    tensors = BatchPassTensors(a, y, gamma, table, weight, moments, extrema, z, da, pivot, beta,
                               running_mean, running_var, offsets, g, loss, coef, dgamma, dbeta)
    functions["batch_pass"](backend, tensors, unpack(ints, floats))


def _batch_pass_fake(*args: Any) -> None:
    return None


library.impl("batch_pass", _batch_pass, "CompositeExplicitAutograd")
torch.library.register_fake("ffengine::batch_pass", _batch_pass_fake, lib=library)


def batch_pass(backend: str, tensors: BatchPassTensors, call: BatchPassCall) -> None:
    """A kernel call of ffengine.ops.batch_pass through its registered op."""
    torch.ops.ffengine.batch_pass(*tensors, *pack(call), backend)


def pack(call: BatchPassCall) -> tuple[list[int], list[float]]:
    """A call's numbers as the schema carries them: whole numbers and flags, then floats."""
    ints = [int(getattr(call, f.name)) for f in fields(call) if f.type != "float"]
    return ints, [getattr(call, f.name) for f in fields(call) if f.type == "float"]


def unpack(ints: list[int], floats: list[float]) -> BatchPassCall:
    """The inverse of `pack`."""
    whole, real = iter(ints), iter(floats)
    values: dict[str, Any] = {}
    for f in fields(BatchPassCall):
        value = next(real) if f.type == "float" else next(whole)
        values[f.name] = bool(value) if f.type == "bool" else value
    return BatchPassCall(**values)
