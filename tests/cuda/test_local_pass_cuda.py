"""The CUDA kernels on a CUDA device against the fp64 reference: two sweeps, and the one-read kernel
where the device has clusters (the op chooses as it does for a user)."""

from __future__ import annotations

import pytest
import torch
from local_pass_cuda_cases import CASES, CLUSTER_CASES, Case, check, expand

from ffengine.ops.config import Dropout, LocalPassConfig
from ffengine.ops.local_pass import local_pass

pytestmark = pytest.mark.gpu


def run_cuda(*args, **kwargs):  # type: ignore[no-untyped-def]
    out = local_pass(*args, **kwargs, backend="cuda")
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize(("case", "dtype", "layout"), expand(CASES))
def test_small(case: Case, dtype: torch.dtype, layout: str) -> None:
    check(case, dtype, layout, "cuda", run_cuda)


@pytest.mark.parametrize(("case", "dtype", "layout"), expand(CLUSTER_CASES))
def test_samples_of_8_kb(case: Case, dtype: torch.dtype, layout: str) -> None:
    check(case, dtype, layout, "cuda", run_cuda)


RESNET17 = [(128, 100, 32, 32), (128, 200, 16, 16), (128, 400, 8, 8), (128, 800, 4, 4)]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("p", [0.0, 0.2], ids=["plain", "dropout"])
@pytest.mark.parametrize("shape", RESNET17, ids=["stage1", "stage2", "stage3", "stage4"])
def test_resnet17(shape: tuple[int, ...], p: float, layout: str) -> None:
    config = LocalPassConfig(groups=10, dropout=Dropout(p, seed=3, layer=1, step=2))
    for dtype in (torch.float32, torch.bfloat16):
        check(Case("resnet17", shape, config), dtype, layout, "cuda", run_cuda)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bit_identical_runs(layout: str) -> None:
    case = Case("again", (64, 100, 32, 32), LocalPassConfig(groups=10))
    gen = torch.Generator(device="cuda").manual_seed(1)
    a = torch.randn(case.shape, generator=gen, device="cuda")
    if layout == "nhwc":
        a = a.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (64,), generator=gen, device="cuda")
    first, second = (run_cuda(a, y, config=case.config, want_da=True) for _ in range(2))
    for one, other in zip(first[:5], second[:5], strict=True):
        assert torch.equal(one, other)


def test_unknown_label_is_nan_not_a_stray_read() -> None:
    a = torch.randn(2, 8, 4, 4, device="cuda")
    y = torch.tensor([1, 99], device="cuda")
    out = run_cuda(a, y, config=LocalPassConfig(groups=2), want_da=True)
    assert out.loss[1].isnan() and not out.loss[0].isnan()
