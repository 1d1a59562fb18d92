"""The CUDA kernels' own source of linear_step, emulated on the CPU, against the fp64 reference.

local_pass and the optimizer have emulations of their own: here the CPU's stand in for them.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import emulate
import pytest
import torch

from ffengine.ops import backends, call, linear_tile, local_pass, weight_update
from tests.linear_step_cases import SMALL, check


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate.build(tmp_path_factory.mktemp("emulated"), ("linear_step.cu",),
                         "linear_entry.cpp")


def shape_of(numbers: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def extension(library: ctypes.CDLL, calls: list[str]) -> SimpleNamespace:
    """What linear_tile asks of ffengine._C, from the emulated kernels."""
    def prepare(x: int, source: int, a: int, bias: int, scale: int, shape: tuple[int, ...],
                dtype: int, rms: bool, eps: float, stream: int) -> None:
        calls.append("prepare")
        library.emulate_prepare(*map(ctypes.c_void_p, (x, source, a, bias, scale)),
                                shape_of(shape), dtype, rms, ctypes.c_double(eps))

    def finish(da: int, scale: int, sums: int, shape: tuple[int, ...], dtype: int, chunk: int,
               stream: int) -> None:
        calls.append("finish")
        library.emulate_finish(*map(ctypes.c_void_p, (da, scale, sums)), shape_of(shape), dtype,
                               ctypes.c_int64(chunk))

    return SimpleNamespace(linear_prepare_cuda=prepare, linear_finish_cuda=finish)


@pytest.mark.parametrize("name", SMALL)
def test_small(name: str, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    case, dtype, rows = SMALL[name]
    calls: list[str] = []
    resolve, step, fake = backends.resolve, weight_update.optimizer_step, extension(library, calls)
    stand_in = "cpu" if backends.extension() is not None else "reference"
    monkeypatch.setattr(backends, "resolve", lambda op, backend, *rest: (
        backend if backend in ("cuda", "reference") else resolve(op, backend, *rest)))
    monkeypatch.setattr(linear_tile, "backends", SimpleNamespace(extension=lambda: fake))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(weight_update, "optimizer_step",
                        lambda *arguments: step(*arguments[:-1], "reference"))
    monkeypatch.setattr(local_pass, "run", lambda _, tensors, numbers: call.run(
        stand_in, tensors, numbers))
    check(case, dtype, rows, "cuda")
    assert ("prepare" in calls) == (case.norm.kind != "none")
    assert ("finish" in calls) == (case.bias or linear_tile.folds(dtype, case.norm))
