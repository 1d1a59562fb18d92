"""How sparse a vector of weights is: four measures of 0 (all equal) to 1 (one entry alone).

FFLib's paper, sec. 2.5, formulas 9 to 12, over all n entries x_i of a tensor:

    S_L1 = 1 + 1 / log2(n)   sum p_i log2 p_i,    p_i = |x_i| / |x|_1                        (9)
    S_L2 = 1 + 1 / log2(n^2) sum q_i log2 q_i,    q_i = x_i^2 / |x|_2^2                      (10)
    S_H  = (sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1)                                         (11)
    S_G  = 1 - 2 sum |x|_(i) / |x|_1 (n - i + 1/2) / n,    |x| ascending, i = 1 .. n         (12)

S_L2's n^2 is the paper's and its code's: it lies in [1/2, 1]. At an entry of exactly 0 the
published code has 0 log 0 = NaN; `zeros="limit"` takes the limit, 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Kind = Literal["hoyer", "l1", "l2", "gini"]
KINDS: tuple[Kind, ...] = ("hoyer", "l1", "l2", "gini")
Zeros = Literal["limit", "nan"]


def hoyer(x: torch.Tensor) -> float:
    """S_H of a tensor of 2 elements or more; NaN where all are 0."""
    a = _magnitudes(x, "hoyer")
    root = math.sqrt(a.numel())
    return (root - float(a.sum() / a.square().sum().sqrt())) / (root - 1)


def l1_negative_entropy(x: torch.Tensor, zeros: Zeros = "limit") -> float:
    """S_L1 of a tensor of 2 elements or more; NaN where all are 0."""
    a = _magnitudes(x, "l1")
    return 1 + _negative_entropy(a / a.sum(), zeros) / math.log2(a.numel())


def l2_negative_entropy(x: torch.Tensor, zeros: Zeros = "limit") -> float:
    """S_L2 of a tensor of 2 elements or more; NaN where all are 0."""
    squares = _magnitudes(x, "l2").square()
    return 1 + _negative_entropy(squares / squares.sum(), zeros) / math.log2(squares.numel() ** 2)


def gini(x: torch.Tensor) -> float:
    """S_G of a tensor of 2 elements or more; NaN where all are 0."""
    a = _magnitudes(x, "gini").sort().values
    n = a.numel()
    above = torch.arange(n, 0, -1, dtype=a.dtype, device=a.device) - 0.5
    return 1 - 2 * float((a / a.sum() * above).sum() / n)


def sparsity(x: torch.Tensor, kind: Kind, zeros: Zeros = "limit") -> float:
    """The measure `kind` of all elements of x, in fp64.

    Args:
        x: any shape, floating point, 2 elements or more.
        kind: hoyer | l1 | l2 | gini.
        zeros: what 0 log 0 is in the entropies: its "limit", or "nan" as in the published code.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: fewer than 2 elements, or an unknown kind or zeros.
    """
    if kind == "hoyer":
        return hoyer(x)
    if kind == "gini":
        return gini(x)
    if kind not in KINDS:
        raise ValueError(f"[sparsity] kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return (l1_negative_entropy if kind == "l1" else l2_negative_entropy)(x, zeros)


def statistics(x: torch.Tensor) -> tuple[float, float, float, float]:
    """(min, max, mean, unbiased standard deviation) of all elements of x, in fp64 (table 4)."""
    a = _values(x, "statistics")
    return float(a.min()), float(a.max()), float(a.mean()), float(a.std())


def _magnitudes(x: torch.Tensor, what: str) -> torch.Tensor:
    return _values(x, what).abs()


def _values(x: torch.Tensor, what: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"[sparsity] {what} expected a floating-point tensor, got {came}")
    if x.numel() < 2:
        raise ValueError(f"[sparsity] {what} expected 2 elements or more, got {x.numel()}")
    return x.detach().double().flatten()


def _negative_entropy(p: torch.Tensor, zeros: Zeros) -> float:
    if zeros not in ("limit", "nan"):
        raise ValueError(f"[sparsity] zeros must be limit or nan, got {zeros!r}")
    terms = torch.special.xlogy(p, p) if zeros == "limit" else p * p.log()
    return float(terms.sum()) / math.log(2)
