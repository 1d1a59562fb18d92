"""The one tolerance rule of the suite (no per-test numbers, no reruns, never looser in CI).

error(kernel vs fp64) <= 2 * error(reference in the same dtype vs fp64) + c * sqrt(reduction
length), c = eps(dtype) * max|reference|.
"""

from __future__ import annotations

import math

import torch

#: What results are stored in: fp32 kernels keep g, loss, coef in fp32 whatever the input.
EPS = {d: torch.finfo(d).eps for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def bound(exact: torch.Tensor, same_dtype: torch.Tensor, dtype: torch.dtype,
          reduction: int) -> float:
    """The largest admissible |kernel - exact|."""
    if exact.numel() == 0:
        return 0.0
    reference_error = (same_dtype.double() - exact).abs().max().item()
    return 2 * reference_error + EPS[dtype] * exact.abs().max().item() * math.sqrt(reduction)


def assert_close(kernel: torch.Tensor, exact: torch.Tensor, same_dtype: torch.Tensor, *,
                 reduction: int, what: str = "result") -> None:
    """Fail with the error and the bound if `kernel` breaks the rule."""
    assert kernel.shape == exact.shape, f"{what}: shape {kernel.shape}, expected {exact.shape}"
    if exact.numel() == 0:
        return
    error = (kernel.double() - exact).abs().max().item()
    limit = bound(exact, same_dtype, kernel.dtype, reduction)
    assert error <= limit, f"{what}: error {error:.3e} > bound {limit:.3e}"
