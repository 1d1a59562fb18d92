"""linear_step on Triton against the fp64 reference: interpreted here, compiled where a GPU is."""

from __future__ import annotations

import pytest
import torch

from ffengine.ops.params import LinearCall
from tests.linear_step_cases import CASES, INTERPRETED, SMALL, check


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype", "rows"), [
    *SMALL.values(), *((c, d, r) for c in CASES for d in c.dtypes for r in c.tiles)])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_device(backend: str, case: object, dtype: torch.dtype, rows: int | None) -> None:
    check(case, dtype, rows, backend, "cuda")


@pytest.mark.gpu
def test_kernels_on_a_device() -> None:
    """A wide tile: every program of a grid, row tails, column tails."""
    from ffengine.kernels import linear_step as kernels

    x, a = torch.randn(999, 3000, device="cuda"), torch.randn(999, 777, device="cuda")
    bias, scale = torch.randn(777, device="cuda"), torch.empty(999, device="cuda")
    out, partial = torch.empty_like(a), torch.empty(16, 777, device="cuda")
    kernels.prepare((x, a, out, bias, scale), LinearCall(rms=True, eps=1e-5))
    torch.testing.assert_close(out, a * scale[:, None] + bias)
    torch.testing.assert_close(scale, 1 / (x.pow(2).mean(1).sqrt() + 1e-5))
    before = out.clone()
    kernels.finish((out, scale, partial), LinearCall(chunk=64))
    torch.testing.assert_close(partial.sum(0), before.sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out, before * scale[:, None])
