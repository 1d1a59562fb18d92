"""Signal Integrating and Pruning: which layers' goodness is summed (DeeperForward, sec. 3.4).

The accuracy of the summed goodness of every range start..end of layers follows from one pass over
held-out data: ranges are differences of cumulative sums of the L goodness matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ffengine.nn.network import LocalNet


@dataclass(frozen=True)
class SipResult:
    """The best range, inclusive; accuracies lie in [0, 1]."""

    start: int
    end: int
    accuracy: float
    #: (L, L) accuracy of the range start (row) .. end (column); 0 below the diagonal.
    table: torch.Tensor
    #: Accuracy of each layer alone.
    layer_accuracy: torch.Tensor


def select(net: LocalNet, loader: Iterable[tuple[torch.Tensor, torch.Tensor]], *,
           backend: str = "auto", dtype: torch.dtype | None = None,
           apply: bool = True) -> SipResult:
    """Find the best range on held-out (x, y) batches and, with `apply`, give it to `net`.

    Ties keep the smallest end, then the smallest start, as the published code does.

    Args:
        dtype: compute dtype; the weights' own if None.
    """
    weight = next(net.parameters())
    correct: torch.Tensor | None = None  # on the device until the last batch is in
    seen, training = 0, net.training
    net.eval()
    with torch.no_grad():
        for x, y in loader:
            x = x.to(device=weight.device, dtype=dtype or weight.dtype)
            goodness = torch.stack(net.goodness(x, backend=backend))
            hits = range_hits(goodness, y.to(weight.device))
            correct = hits if correct is None else correct + hits
            seen += len(y)
    net.train(training)
    if correct is None or seen == 0:
        raise ValueError("[sip] expected at least one sample to select on, got none")
    correct = correct.cpu()
    start, end = best_range(correct)
    if apply:
        net.set_range(start, end)
    table = correct.double() / seen
    return SipResult(start, end, float(table[start, end]), table, table.diagonal().clone())


def range_hits(goodness: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(L, L) counts of samples that the range start..end gets right, of goodness (L, N, K).

    Every range adds up its own layers, in fp64, so that exact ties (dead layers) stay ties.
    """
    depth = goodness.shape[0]
    hits = torch.zeros(depth, depth, dtype=torch.int64, device=goodness.device)
    for start in range(depth):
        scores = goodness[start:].double().cumsum(0)
        hits[start, start:] = (scores.argmax(2) == y).sum(1)
    return hits


def best_range(correct: torch.Tensor) -> tuple[int, int]:
    """(start, end) with the most hits; the smallest end, then the smallest start, on ties."""
    by_end = correct.triu().t().contiguous()
    best = int(by_end.flatten().argmax()) if bool(by_end.any()) else 0
    end, start = divmod(best, correct.shape[0])
    return start, end


def prune(net: LocalNet) -> LocalNet:
    """A copy of `net` without the layers past the end of its range; its scores are the same."""
    smaller = copy.deepcopy(net)
    smaller.cut(smaller.layer_range[1] + 1)
    return smaller
