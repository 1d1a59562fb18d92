"""A training batch: what callers may hand to Trainer.step, and the checks it has to pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import torch

from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops.config import Loss
from ffengine.ops.host import send
from ffengine.ops.memory_accounting import tensors_in


@dataclass
class Arrived:
    """What the stage before sent of a batch: maps by their buffers, goodness by layer."""

    maps: dict[str, torch.Tensor]
    goodness: dict[int, torch.Tensor]


@dataclass
class Batch:
    """Samples and labels, and what some variants need beside them (None: drawn from the seed)."""

    x: torch.Tensor
    y: torch.Tensor
    #: Labels (N,), label rows (N, K), or images of x's shape.
    negatives: torch.Tensor | None = None
    #: Initial hidden states of a recurrent network: (positive, negative), one (1, units) a layer.
    hidden: Any = None
    #: Rows as the first layer that trains sees them; layers below it are not run.
    features: torch.Tensor | None = None
    #: Goodness summed over the layers below, one value a row (collaborative FF).
    below: torch.Tensor | None = None
    #: In a pipeline's later stages; the samples themselves are not there then.
    arrived: Arrived | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return list(tensors_in(*vars(self).values()))


def whole(pieces: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The pieces as one tensor; an only one as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def joined(pieces: list[torch.Tensor], halves: bool) -> torch.Tensor:
    """The pieces' rows as one tensor; with `halves` every piece holds rows of both, and so does
    the whole: positives first."""
    if not halves or len(pieces) == 1:
        return whole(pieces)
    return torch.cat([t for half in zip(*(p.chunk(2) for p in pieces), strict=True) for t in half])


def as_batch(batch: Any, y: torch.Tensor | None) -> Batch:
    """A Batch from `step(x, y)`, `step((x, y))`, `step({"x": …, "y": …})` or `step(Batch(…))`."""
    if y is not None:
        if isinstance(batch, (Batch, Mapping)):
            raise TypeError("[train] expected step(batch) or step(x, y), got a batch and y")
        return Batch(batch, y)
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        known = [f.name for f in fields(Batch)]
        unknown = [str(k) for k in batch if k not in known]
        missing = [k for k in ("x", "y") if k not in batch]
        if unknown or missing:
            came = ", ".join(map(str, batch)) or "nothing"
            raise TypeError("[train] expected a batch with x, y and optionally "
                            f"{', '.join(known[2:])}, got {came}")
        return Batch(**batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return Batch(*batch)
    raise TypeError(f"[train] expected a batch of samples and labels, got {type(batch).__name__}")


def checked(batch: Batch, net: LocalNet, device: torch.device) -> Batch:
    """The batch on `device`, after every check that costs no sync with it.

    Raises:
        TypeError, ValueError: one line; no weight has changed.
    """
    x, y = batch.x, batch.y
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"[train] samples must be a floating-point tensor, got {came}")
    if not isinstance(y, torch.Tensor) or y.dtype is not torch.int64:
        came = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"[train] labels must be an int64 tensor, got {came}")
    _check_extras(batch, net)
    if batch.features is not None:
        return replace(batch, y=send(y, device).contiguous(),
                       features=send(batch.features, device))
    if tuple(x.shape[1:]) != net.in_shape or x.shape[0] < 1:
        raise ValueError(f"[train] samples must be (N, {', '.join(map(str, net.in_shape))}) with "
                         f"N >= 1, got {tuple(x.shape)}")
    if tuple(y.shape) != (x.shape[0],):
        raise ValueError(f"[train] labels must be ({x.shape[0]},), got {tuple(y.shape)}")
    if y.device.type == "cpu":
        check_range(y, label_count(net))
    negatives = None if batch.negatives is None else send(batch.negatives, device)
    x, y = send(x, device), send(y, device)
    return replace(batch, x=x, y=y.contiguous(), negatives=negatives)


def _check_extras(batch: Batch, net: LocalNet) -> None:
    """ValueError for negatives or states that the network has no use for, or of another shape."""
    recurrent = isinstance(net, RecurrentNet)
    for name, wanted in (("negatives", paired(net)), ("hidden", recurrent)):
        if getattr(batch, name) is not None and not wanted:
            raise ValueError(f"[train] {name} expected by none of this network's layers: its loss "
                             "needs samples and labels only")
    if batch.negatives is not None:
        _check_negatives(batch.negatives, batch.x, net)
    if batch.hidden is not None:
        wanted_shapes = [(1, width) for _ in range(2) for width in getattr(net, "widths", ())]
        try:
            came: Any = [tuple(t.shape) for half in batch.hidden for t in half]
        except (TypeError, AttributeError):
            came = type(batch.hidden).__name__
        if came != wanted_shapes:
            raise ValueError("[train] hidden expected two lists (positive, negative) of states "
                             f"(1, units), in all {wanted_shapes}, got {came}")


def _check_negatives(other: torch.Tensor, x: torch.Tensor, net: LocalNet) -> None:
    """ValueError unless the network can pair its samples with these."""
    n, k = x.shape[0], net.num_classes
    labels = net.encoding is not None or isinstance(net, RecurrentNet)
    images = not labels
    said = [f"int64 labels ({n},), label rows ({n}, {k})"] if labels else []
    said += ["images of the samples' shape"] if images else []
    if not isinstance(other, torch.Tensor):
        raise TypeError(f"[train] negatives expected {' or '.join(said)}, got "
                        f"{type(other).__name__}")
    shape = tuple(other.shape)
    if other.is_floating_point():
        fits = (labels and shape == (n, k)) or (images and shape == tuple(x.shape))
    else:
        fits = labels and other.dtype is torch.int64 and shape == (n,)
    if not fits:
        raise ValueError(f"[train] negatives expected {' or '.join(said)}, got {other.dtype} "
                         f"{shape}")
    if not other.is_floating_point() and other.device.type == "cpu":
        check_range(other, k)


def binary(net: LocalNet) -> bool:
    """Layers tell positive from negative rows, rather than classes."""
    loss = net.layer(0).config.loss
    return net.encoding is not None or (isinstance(loss, Loss) and loss.binary)


def paired(net: LocalNet) -> bool:
    """A step makes positive and negative rows of a batch of samples."""
    return net.encoding is not None or net.makes_pairs


def check_range(y: torch.Tensor, count: int) -> None:
    """ValueError unless every label lies in [0, count)."""
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or high >= count:
        raise ValueError(f"[train] labels must lie in [0, {count}), got {low if low < 0 else high}")


def label_count(net: LocalNet) -> int:
    """Labels a batch may hold: the classes; positive and negative where no encoding pairs them."""
    return 2 if binary(net) and not paired(net) else net.num_classes


def batches_from(loader: Any, epoch: int, start: int) -> Iterator[Any]:
    """An epoch's batches from number `start` on; our loader starts there, others are skipped."""
    for part in (loader, getattr(loader, "sampler", None)):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
    if start and hasattr(loader, "batches"):
        return iter(loader.batches(start))
    return islice(iter(loader), start, None)
