"""Seeded held-out splits.

numpy's RandomState is used because its streams are frozen by numpy's own promise: a split is the
same in every version and on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPLITS = ("random", "last")


def _quotas(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Largest-remainder share of `total` for each class, int64, never above its count."""
    exact = counts * (total / counts.sum())
    quotas: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    short = total - int(quotas.sum())
    order = np.argsort(-(exact - quotas), kind="stable")
    quotas[order[:short]] += 1
    return quotas


def stratified(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, held out) int64 indices, ascending; each class in proportion to its size.

    labels: (N,) int64, with held_out <= N.
    """
    random = np.random.RandomState(seed)
    values = labels.cpu().numpy()
    classes, counts = np.unique(values, return_counts=True)
    mask = np.zeros(len(values), dtype=bool)
    for name, quota in zip(classes, _quotas(counts, held_out), strict=True):
        members = np.flatnonzero(values == name)
        mask[random.permutation(members)[:quota]] = True
    return torch.from_numpy(np.flatnonzero(~mask)), torch.from_numpy(np.flatnonzero(mask))


def hold_out(labels: Tensor, held_out: int, seed: int, how: str) -> tuple[Tensor, Tensor]:
    """(kept, held out) indices; `how` is "random" (stratified, seeded) or "last".

    Raises ValueError unless 0 <= held_out < N and `how` is one of the two.
    """
    if how not in SPLITS:
        raise ValueError(f"[data] valid_split must be one of {', '.join(SPLITS)}, got {how!r}")
    total = len(labels)
    if not 0 <= held_out < total:
        raise ValueError(
            f"[data] valid must leave some of the {total} training samples, got {held_out}"
        )
    if how == "last":
        rows = torch.arange(total)
        return rows[: total - held_out], rows[total - held_out :]
    return stratified(labels, held_out, seed)
