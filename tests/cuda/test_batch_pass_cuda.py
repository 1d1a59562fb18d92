"""The CUDA kernels of batch_pass on a CUDA device against the fp64 reference."""

from __future__ import annotations

import pytest
import torch

from ffengine.ops.config import BatchNorm
from tests.batch_pass_cases import CL, NCHW, Case, cases, settings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", cases())
def test_small(case: str) -> None:
    cases()[case].check("cuda", "cuda")


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ["pool_norm", "norm_pool"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(128, 80, 32, 32), (128, 480, 16, 16)], ids=str)
def test_cwcomp(shape: tuple[int, ...], backend: str, order: str,
                layout: torch.memory_format) -> None:
    config = settings(groups=10, goodness="mean_sq", pool="max2")
    for dtype in (torch.float32, torch.bfloat16):
        couple = BatchNorm(1e-4, order=order)  # type: ignore[arg-type]
        Case("cwcomp", shape, config, couple, dtype, layout).check(backend, "cuda")
