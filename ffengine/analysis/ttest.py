"""Are two groups of runs different: t-tests and Cohen's d.

Two samples (FFLib, table 5, whose published code does not take the variances to be equal), or
pairs of runs with the same seed (NetworkFF, sec. IV-C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ffengine.needs import need

Kind = Literal["welch", "student", "paired"]


@dataclass(frozen=True)
class Comparison:
    """t and two-sided p of the difference of means, first group minus second.

    d: Cohen's, the difference in pooled standard deviations; of pairs, in standard deviations of
    the pairs' differences (d_z). Infinite, or NaN without any difference, where nothing deviates.
    """

    kind: Kind
    difference: float
    t: float
    freedom: float
    p: float
    d: float


def compare(first: Sequence[float], second: Sequence[float], kind: Kind = "welch") -> Comparison:
    """Of two groups of numbers, e.g. accuracies of runs over seeds.

    Raises:
        ValueError: fewer than two numbers in a group, pairs of unequal number, an unknown kind.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if kind not in ("welch", "student", "paired"):
        raise ValueError(f"[ttest] kind expected one of welch, student, paired, got {kind!r}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"[ttest] expected two runs or more in each group, got {len(a)} and "
                         f"{len(b)}")
    if kind == "paired" and len(a) != len(b):
        raise ValueError(f"[ttest] pairs expected as many runs in each group, got {len(a)} and "
                         f"{len(b)}")
    difference = float(a.mean() - b.mean())
    if kind == "paired":
        scale = float(np.std(a - b, ddof=1))
        t, freedom = _ratio(difference, scale / math.sqrt(len(a))), float(len(a) - 1)
        return Comparison(kind, difference, t, freedom, _two_sided(t, freedom),
                          _ratio(difference, scale))
    va, vb, n, m = float(a.var(ddof=1)), float(b.var(ddof=1)), len(a), len(b)
    pooled = ((n - 1) * va + (m - 1) * vb) / (n + m - 2)
    if kind == "student" or va + vb == 0:
        error, freedom = math.sqrt(pooled * (1 / n + 1 / m)), float(n + m - 2)
    else:
        error = math.sqrt(va / n + vb / m)
        freedom = (va / n + vb / m)**2 / ((va / n)**2 / (n - 1) + (vb / m)**2 / (m - 1))
    t = _ratio(difference, error)
    return Comparison(kind, difference, t, freedom, _two_sided(t, freedom),
                      _ratio(difference, math.sqrt(pooled)))


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.copysign(math.inf, part) if part else math.nan


def _two_sided(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's distribution."""
    return float(2 * need("scipy.stats", "[ttest]").t.sf(abs(t), freedom))
