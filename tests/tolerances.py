"""The one tolerance rule of the suite (no per-test numbers, no reruns, never looser in CI).

error(kernel vs fp64) <= 2 * error(reference in the same dtype vs fp64) + c * sqrt(reduction
length), c = eps(dtype) * max|reference|.

Of two results in one dtype, neither of them exact, each may be off by c * sqrt(reduction length).
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


def assert_alike(one: torch.Tensor, other: torch.Tensor, *, reduction: int,
                 what: str = "result") -> None:
    """Fail if two computations of the same numbers, in one dtype, differ by more than the rule."""
    assert one.shape == other.shape, f"{what}: shape {one.shape}, expected {other.shape}"
    assert one.dtype is other.dtype, f"{what}: {one.dtype}, expected {other.dtype}"
    if one.numel() == 0:
        return
    error = (one.double() - other.double()).abs().max().item()
    limit = 2 * EPS[one.dtype] * other.abs().max().item() * math.sqrt(reduction)
    assert error <= limit, f"{what}: they differ by {error:.3e} > {limit:.3e}"
