"""The CUDA kernels of batch_pass on a CUDA device against the fp64 reference."""

from __future__ import annotations

import pytest
import torch

from ffengine.ops.config import BatchNorm, Peer, cwc, pvn, sparsemax, symba
from tests.batch_pass_cases import CL, NCHW, Case, cases, peer_settings, settings

pytestmark = pytest.mark.gpu

POOL = {"pool": "max2"}
#: Where the CUDA kernels take another way: windows in vectors, rows of two pixels, channels that
#: several blocks share.
CASES = cases() | {case.id: case for case in (
    *(Case(f"{order}-vectors-{name}", (2, 16, height, 16), settings(goodness="mean_sq", **POOL),
           BatchNorm(order=order), torch.bfloat16, layout)  # type: ignore[arg-type]
      for order, height in (("pool_norm", 4), ("norm_pool", 5))
      for layout, name in ((NCHW, "nchw"), (CL, "nhwc"))),
    Case("two-pixel-rows", (2, 100, 4, 4), settings(), dtype=torch.bfloat16, layout=CL),
    Case("shared-channels", (2, 1100, 2, 3), settings(goodness="mean_sq"), layout=CL),
    Case("wide-linear", (3, 5000), settings(groups=10)),
    Case("wide-rows-of-two", (2, 2500, 1, 2), settings(), dtype=torch.float16, layout=CL),
    Case("long-runs", (2, 4, 40, 40), settings(goodness="sum_sq"), dtype=torch.bfloat16),
    Case("pairs-of-many", (40, 120), settings(groups=1, goodness="mean_sq", loss=symba())),
    Case("unequal-of-many", (33, 70, 2, 4), settings(groups=(0, 1, 34, 70), loss=cwc(), **POOL),
         BatchNorm(order="norm_pool")),
    Case("many-groups", (17, 300), settings(groups=300, goodness="sum_sq", loss=sparsemax())),
    Case("no-affine-of-many", (20, 90), settings(groups=9, loss=pvn()), affine=False),
    Case("peer-vectors", (40, 200), peer_settings(), Peer(), torch.bfloat16),
)}


@pytest.mark.parametrize("case", CASES)
def test_small(case: str) -> None:
    CASES[case].check("cuda", "cuda")


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ["pool_norm", "norm_pool"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(128, 80, 32, 32), (128, 480, 16, 16)], ids=str)
def test_cwcomp(shape: tuple[int, ...], backend: str, order: str,
                layout: torch.memory_format) -> None:
    config = settings(groups=10, goodness="mean_sq", pool="max2")
    for dtype in (torch.float32, torch.bfloat16):
        coupling = BatchNorm(1e-4, order=order)  # type: ignore[arg-type]
        Case("cwcomp", shape, config, coupling, dtype, layout).check(backend, "cuda")
