"""Accuracy of a network on a loader, within the memory a training step is allowed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from ffengine.data.batches import Loader
from ffengine.engine.batch import as_batch
from ffengine.engine.context import BatchReport
from ffengine.engine.memory.shapes import NetSizes, measure
from ffengine.engine.run.state import TrainingRun
from ffengine.nn.network import LocalNet
from ffengine.typed import check

#: Training samples that a network of positive and negative rows is tested on after an epoch.
SHOWN = 1000


class Samples:
    """A loader's (x, y) on a device, x in the compute dtype, in pieces of at most `rows`.

    Inference shares nothing across the batch, so pieces change no score; but for an overlay whose
    value is the batch's largest pixel (Pezeshki's code), which is then the piece's.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, dtype: torch.dtype,
                 rows: int) -> None:
        check("data", "a loader", loader, Iterable[Any])
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
               + s.shortcut_out_bytes for s in sizes.layers)
    return max(1, room // (each + sizes.input_bytes))


def samples_of(run: TrainingRun, loader: Iterable[Any]) -> Samples:
    """The loader in pieces that need no more memory than a training step."""
    rows = sys.maxsize  # of a piece: with batch statistics pieces would change the scores
    if not run.net.batch_statistics:
        plan = run.plan or run.plan_for(run.settings.batch_size)
        sizes = measure(run.net, 1, run.dtype, states=0, device=run.device.type,
                        backend=run.backend)
        rows = rows_within(sizes, plan.working_bytes)
    return Samples(loader, run.device, run.dtype, rows)


def accuracy(net: LocalNet, samples: Iterable[tuple[torch.Tensor, torch.Tensor]],
             backend: str = "auto") -> float:
    """Share of samples whose class has the highest score."""
    hits, total = None, 0
    for x, y in samples:
        right = (net.scores(x, backend=backend).argmax(1) == y).sum()
        hits = right if hits is None else hits + right
        total += y.shape[0]
    return int(hits) / total if hits is not None and total else 0.0


def validated(run: TrainingRun, loader: Iterable[Any]) -> float:
    """Accuracy on the loader, by the layer range that SIP selects there (which sets it), or by the
    one there is."""
    if not run.sip:
        return accuracy(run.net, samples_of(run, loader), run.backend)
    from ffengine.adapt import sip  # which imports the engine

    return sip.select(run.net, samples_of(run, loader), backend=run.backend,
                      dtype=run.dtype).accuracy


def class_accuracy(net: LocalNet, samples: Iterable[tuple[torch.Tensor, torch.Tensor]],
                   backend: str = "auto") -> tuple[float, list[float | None]]:
    """(share of all samples, of each class's samples) whose class has the highest score; None of
    a class without samples.
    """
    right, labels = [], []
    for x, y in samples:
        right.append((net.scores(x, backend=backend).argmax(1) == y).cpu())
        labels.append(y.cpu())
    if not labels:
        return 0.0, [None] * net.num_classes
    y, hit = torch.cat(labels), torch.cat(right)
    return int(hit.sum()) / max(len(y), 1), share_by_class(y, hit, net.num_classes)


def share_by_class(labels: torch.Tensor, right: torch.Tensor,
                   classes: int) -> list[float | None]:
    """Share of `right` (N,) among the samples (N,) of each class; None of a class without any."""
    counts = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[right], minlength=classes)
    return [h / n if n else None for h, n in zip(hits.tolist(), counts.tolist(), strict=True)]


def layer_accuracy(net: LocalNet, samples: Iterable[tuple[torch.Tensor, torch.Tensor]],
                   backend: str = "auto") -> list[float | None]:
    """The same by each layer's goodness alone; None of a layer that tells no classes, because it
    is trained on super-classes.
    """
    hits, total = None, 0
    for x, y in samples:
        with torch.no_grad():
            goodness = net.goodness(x, backend=backend)
        right = torch.stack([right_by(net, i, g, y).sum() for i, g in enumerate(goodness)])
        hits = right if hits is None else hits + right
        total += y.shape[0]
    if hits is None or not total:
        return []
    return [h / total if net.layer(i).label_map is None else None
            for i, h in enumerate(hits.tolist())]


def right_by(net: LocalNet, i: int, goodness: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(N,) bool: layer i's goodness (N, K) tells the label (or its super-class)."""
    best = goodness.argmax(1) if net.readout.maximize else goodness.argmin(1)
    return best == net.layer(i).labels(y)


def training_hits(net: LocalNet, report: BatchReport,
                  y: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(samples a training step got right by what it had computed anyway, whether they are pairs).

    By the scores it made, by goodness summed over the layers of the range that trained (or the last
    that did; its super-class, where it is trained on those), or by the first head that trained. Of
    positive and negative halves a pair is right whose positive has more goodness (less, where the
    loss lowers it): that tells nothing of classes.
    """
    trained = [(i, g) for i, g in enumerate(report.goodness) if g is not None]
    start, end = net.layer_range
    if report.scores is not None:
        return (report.scores.argmax(1) == y).sum(), False
    if not trained:
        logits = [made[1] for made in report.heads if made is not None]
        return ((logits[-1].argmax(1) == y).sum() if logits else torch.zeros_like(y[0])), False
    i, last = trained[-1]
    within = [g for j, g in trained if start <= j <= end and g.shape == last.shape] or [last]
    total = torch.stack(within).sum(0)
    if last.shape[1] == 1 and last.shape[0] == 2 * y.shape[0]:
        ahead = total[:y.shape[0], 0] - total[y.shape[0]:, 0]
        return ((ahead if net.readout.maximize else -ahead) > 0).sum(), True
    if last.shape[1] != net.num_classes or net.layer(i).label_map is not None:
        return right_by(net, i, last, y).sum(), False
    return (total.argmax(1) == y).sum(), False


def first_samples(loader: Any, count: int = SHOWN) -> list[Any]:
    """Batches of a loader's first `count` samples, the same whenever asked for; of a loader that
    only iterates, whose order may be drawn, none.
    """
    if isinstance(loader, Loader):
        return [loader.image_set.batch(slice(0, count))]
    if isinstance(loader, Sequence):
        sizes = accumulate(as_batch(item, None).y.shape[0] for item in loader)
        return [item for item, size in zip(loader, sizes, strict=False)
                if size - as_batch(item, None).y.shape[0] < count]
    return []
