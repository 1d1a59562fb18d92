"""Accuracy of a network on a loader, within the memory a training step is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ffengine.engine.batch import as_batch
from ffengine.engine.shapes import NetSizes
from ffengine.nn.network import LocalNet


class Samples:
    """A loader's (x, y) on a device, x in the compute dtype, in pieces of at most `rows`.

    Inference couples nothing across the batch, so pieces change no score.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, dtype: torch.dtype,
                 rows: int) -> None:
        self.loader, self.device, self.dtype, self.rows = loader, device, dtype, rows

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for item in self.loader:
            batch = as_batch(item, None)
            y = batch.y.to(self.device)
            for start in range(0, y.shape[0], self.rows):
                x = batch.x[start:start + self.rows].to(self.device, self.dtype)
                yield x, y[start:start + self.rows]


def rows_within(sizes: NetSizes, room: int) -> int:
    """Samples whose widest layer of inference fits `room` bytes; one at least."""
    each = max(s.x_bytes + s.shortcut_in_bytes + s.transform_bytes + 2 * s.a_bytes + s.out_bytes
               + s.pooled_branch_bytes for s in sizes.layers)
    return max(1, room // (each + sizes.input_bytes // max(sizes.batch, 1)))


def accuracy(net: LocalNet, samples: Iterable[tuple[torch.Tensor, torch.Tensor]],
             backend: str = "auto") -> float:
    """Share of samples whose class has the highest goodness summed over the network's range."""
    start, end = net.layer_range
    hits, total = None, 0
    for x, y in samples:
        with torch.no_grad():
            goodness = net.goodness(x, end=end, backend=backend)
        right = (torch.stack(goodness[start:]).sum(0).argmax(1) == y).sum()
        hits = right if hits is None else hits + right
        total += y.shape[0]
    return int(hits) / total if hits is not None and total else 0.0


def layer_accuracy(net: LocalNet, samples: Iterable[tuple[torch.Tensor, torch.Tensor]],
                   backend: str = "auto") -> list[float]:
    """The same by each layer's goodness alone."""
    hits, total = None, 0
    for x, y in samples:
        with torch.no_grad():
            goodness = torch.stack(net.goodness(x, backend=backend))
        right = (goodness.argmax(2) == y).sum(1)
        hits = right if hits is None else hits + right
        total += y.shape[0]
    return [h / total for h in hits.tolist()] if hits is not None and total else []
