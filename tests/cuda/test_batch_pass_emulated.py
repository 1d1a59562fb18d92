"""The CUDA kernels' own source of batch_pass, emulated on the CPU, against the fp64 reference."""

from __future__ import annotations

from typing import Any

import emulate
import pytest
import torch
from test_batch_pass_cuda import CASES

from ffengine.ops import batch_pass as op
from ffengine.ops.config import BatchNorm
from tests.batch_pass_cases import CL, NCHW, Case, settings


@pytest.mark.parametrize("case", CASES)
def test_small(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = emulate.install(monkeypatch)
    CASES[case].check("cuda", "cpu")
    # peers without weight move nothing: the samples are passed one by one
    assert ("local_pass" if case.endswith("without-weight") else "batch_pass") in extension.calls
    assert ("batch_middle" in extension.calls) == isinstance(CASES[case].coupling, BatchNorm)


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ["pool_norm", "norm_pool"])
@pytest.mark.parametrize("shape", [(3, 80, 32, 32), (3, 480, 16, 16)], ids=str)
def test_cwcomp(shape: tuple[int, ...], order: Any, layout: torch.memory_format,
                monkeypatch: pytest.MonkeyPatch) -> None:
    emulate.install(monkeypatch, emulate.H100)
    config = settings(groups=10, goodness="mean_sq", pool="max2")
    Case("cwcomp", shape, config, BatchNorm(1e-4, order=order), torch.bfloat16, layout).check(
        "cuda", "cpu")


def test_a_python_loss_has_its_middle_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = emulate.install(monkeypatch)
    config = settings(groups=2, loss=lambda g, y: (g - y[:, None]).square().sum(1))
    Case("own", (5, 20), config).check("cuda", "cpu")
    assert set(extension.calls) == {"batch_pass"}


def test_labels_of_no_group_give_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in local_pass: labels on a device are not checked in Python."""
    extension = emulate.install(monkeypatch)
    monkeypatch.setattr(op, "check_targets", lambda *_: None)
    out = op.batch_pass(torch.randn(3, 8), torch.tensor([1, 99, 0]), config=settings(groups=2),
                        coupling=BatchNorm(), backend="cuda")
    assert out.loss is not None and "batch_middle" in extension.calls
    assert out.loss[1].isnan() and not out.loss[[0, 2]].isnan().any()
