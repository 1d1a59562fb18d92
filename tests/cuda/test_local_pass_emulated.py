"""The CUDA kernels' own source, emulated on the CPU, against the fp64 reference.

It says nothing of speed or of races that only hardware shows; it holds the index arithmetic, the
merges, the barriers' placement and every formula to the rule on machines without a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

import emulate
import pytest
import torch
from local_pass_cuda_cases import CASES, CLUSTER_CASES, DROP, Case, check, expand

from ffengine.ops import local_pass as op
from ffengine.ops.config import LocalPassConfig, symba


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate.build(tmp_path_factory.mktemp("emulated"))


def pretend(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, major: int,
            shared: int) -> list[int]:
    """Sends the op's kernel calls to the emulator; the list gets the cluster size of each."""
    clusters: list[int] = []
    monkeypatch.setattr(op.backends, "resolve", lambda *_: "cuda")
    monkeypatch.setattr(
        op, "run", lambda _, t, call: clusters.append(emulate.run(library, t, call, major, shared)))
    return clusters


@pytest.mark.parametrize(("case", "dtype", "layout"), expand(CASES))
def test_two_sweeps(case: Case, dtype: torch.dtype, layout: str, library: ctypes.CDLL,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(pretend(monkeypatch, library, 8, 99 << 10))
    check(case, dtype, layout, "cpu", op.local_pass)


@pytest.mark.parametrize("shared", [227 << 10, 64 << 10], ids=["large", "small"])
@pytest.mark.parametrize(("case", "dtype", "layout"), expand(CLUSTER_CASES))
def test_one_read(case: Case, dtype: torch.dtype, layout: str, shared: int, library: ctypes.CDLL,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = pretend(monkeypatch, library, 9, shared)
    check(case, dtype, layout, "cpu", op.local_pass)
    assert clusters[0] > 0, "the case was meant for the cluster kernel"


def test_nan_reaches_every_result(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, library, 8, 99 << 10)
    case = next(c for c in CASES if c.id == "plain")
    a = torch.randn(case.shape)
    a[1, 2, 1, 1] = float("nan")
    out = op.local_pass(a, torch.zeros(3, dtype=torch.int64), config=case.config, want_da=True)
    assert out.z is not None and out.loss is not None
    assert out.g[1, 0].isnan() and out.loss[1].isnan() and out.z[1, 2, 1, 1].isnan()
    assert not out.g[0].isnan().any() and not out.loss[2].isnan()


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("shape", [(3, 8), (3, 2048)], ids=["short", "long"])
def test_da_over_a(shape: tuple[int, ...], major: int, library: ctypes.CDLL,
                   monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, library, major, 227 << 10)
    a, y = torch.randn(shape), torch.tensor([0, 1, 0])
    settings: dict[str, Any] = {"config": LocalPassConfig(groups=2, goodness="mean_sq"),
                                "want_z": False, "want_da": True}
    beside = op.local_pass(a, y, **settings)
    over = op.local_pass(a, y, da_out=a, **settings)
    assert beside.da is not None and over.da is a
    for one, other in zip(over[1:5], beside[1:5], strict=True):
        assert torch.equal(one, other)


def plan(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...],
         config: LocalPassConfig, major: int = 9, **settings: Any) -> int:
    """Blocks of the cluster that a call would get on a device with 227 KB of shared memory."""
    planned: list[int] = []
    monkeypatch.setattr(op.backends, "resolve", lambda *_: "cuda")
    monkeypatch.setattr(op, "run", lambda _, t, call: planned.append(
        emulate.run(library, t, call, major, 227 << 10, dry=True)))
    y = torch.zeros(shape[0], dtype=torch.int64)
    op.local_pass(torch.zeros(shape, **settings), y, config=config, want_da=True)
    return planned[0]


@pytest.mark.parametrize(("shape", "fp32", "bf16"), [
    ((128, 100, 32, 32), 8, 4),
    ((128, 200, 16, 16), 4, 2),
    ((128, 400, 8, 8), 2, 1),
    ((128, 800, 4, 4), 1, 1),
])
def test_cluster_of_resnet17(shape: tuple[int, ...], fp32: int, bf16: int, library: ctypes.CDLL,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    config = LocalPassConfig(groups=10)
    assert plan(library, monkeypatch, shape, config) == fp32
    assert plan(library, monkeypatch, shape, config, dtype=torch.bfloat16) == bf16


@pytest.mark.parametrize(("shape", "settings", "major"), [
    ((2, 100, 32, 32), {}, 8),  # no clusters before Hopper
    ((2, 100, 32, 32), {}, 12),  # shared memory of 99 KB a block
    ((2, 100, 32, 32), {"pool": "max2"}, 9),
    ((2, 100, 32, 32), {"groups": 1, "loss": symba()}, 9),
    ((2, 100, 32, 32), {"dropout": DROP, "relu_gradient": "straight_through"}, 9),
    ((2, 400, 64, 64), {}, 9),  # 6.5 MB a sample
    ((2, 10, 7, 5), {}, 9),  # samples that are not whole vectors
    ((2, 20, 4, 4), {}, 9),  # 1280 bytes a sample
])
def test_two_sweeps_are_planned(shape: tuple[int, ...], settings: dict[str, Any], major: int,
                                library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(library, monkeypatch, shape, LocalPassConfig(**settings), major) == 0
