"""`batch_pass`'s kernel calls as torch sees them; as ffengine/ops/library.py for the other ops."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch

from ffengine.ops.library import library

if TYPE_CHECKING:
    from ffengine.ops.batch_call import BatchPassCall, BatchPassTensors

library.define(
    "batch_pass(Tensor a, Tensor? y, Tensor? gamma, Tensor? table, Tensor? weight, "
    "Tensor(a!)? moments, Tensor(b!)? extrema, Tensor(c!)? z, Tensor(d!)? da, int[] ints, "
    "str backend) -> ()")


def _batch_pass(a: torch.Tensor, y: torch.Tensor | None, gamma: torch.Tensor | None,
                table: torch.Tensor | None, weight: torch.Tensor | None,
                moments: torch.Tensor | None, extrema: torch.Tensor | None,
                z: torch.Tensor | None, da: torch.Tensor | None, ints: list[int],
                backend: str) -> None:
    from ffengine.ops import batch_call as op

    tensors = op.BatchPassTensors(a, y, gamma, table, weight, moments, extrema, z, da)
    op.run(backend, tensors, op.BatchPassCall(ints[0], *map(bool, ints[1:])))


def _batch_pass_fake(*args: Any) -> None:
    return None


library.impl("batch_pass", _batch_pass, "CompositeExplicitAutograd")
torch.library.register_fake("ffengine::batch_pass", _batch_pass_fake, lib=library)


def batch_pass(backend: str, tensors: BatchPassTensors, call: BatchPassCall) -> None:
    """A kernel call of ffengine.ops.batch_pass through its registered op."""
    torch.ops.ffengine.batch_pass(*tensors, pack(call), backend)


def pack(call: BatchPassCall) -> list[int]:
    """A call's numbers as the schema carries them."""
    return [int(i) for i in astuple(call)]
