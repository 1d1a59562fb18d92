"""What units do on samples, shown with their true labels: activation, and part in the goodness."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ffengine.nn.maps import Samples, layer_maps, over_pixels
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet, label_rows


def activations(net: LocalNet, x: torch.Tensor, y: torch.Tensor,
                backend: str = "auto") -> Iterator[torch.Tensor]:
    """h (N, C, ...) of layer after layer, before its feature normalisation, of samples x
    (N, *in_shape) shown with labels y (N,) int64. Of a recurrent network the states' sum over its
    frames."""
    if isinstance(net, RecurrentNet):
        yield from over_frames(net, x, label_rows(y, net.num_classes, x.dtype), backend)
        return
    yield from (maps.h for maps in layer_maps(net, x, y, label="true", backend=backend))


def over_frames(net: RecurrentNet, x: torch.Tensor, rows: torch.Tensor,
                backend: str) -> list[torch.Tensor]:
    """Sum over the frames of every layer's states, with label rows (N, K)."""
    depth = range(len(net.layers))
    totals = [torch.zeros(x.shape[0], net.layer(i).units, dtype=x.dtype, device=x.device)
              for i in depth]
    for _, states in net.play(x, rows, net.initial(), backend):
        for total, state in zip(totals, states, strict=True):
            total += state
    return totals


@torch.no_grad()
def mean_activity(net: LocalNet, samples: Samples, backend: str = "auto") -> list[torch.Tensor]:
    """(C,) fp64 a layer: the mean of h over samples (and a channel's pixels)."""
    sums, count = [torch.zeros((), dtype=torch.float64)] * len(net.layers), 0
    for x, y in seen(net, samples):
        count += y.shape[0]
        for i, h in enumerate(activations(net, x, y, backend)):
            sums[i] = sums[i] + by_unit(h).sum(0).cpu()
    return [total / check_seen(count) for total in sums]


@torch.no_grad()
def goodness_parts(net: LocalNet, samples: Samples, seed: int = 0,
                   backend: str = "auto") -> list[torch.Tensor]:
    """(C,) fp64 a layer: what a unit adds to the separation of positive from negative goodness.

    The unit's part of its group's goodness (h or h²) on positive samples less that on negative
    ones, as training wants it: of its own class and of the others where the layer has class groups;
    with the true label and with one wrong label drawn from `seed` where a label is shown. Of a
    network that knows neither (backpropagation) the mean part.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = net.encoding is not None or isinstance(net, RecurrentNet)
    parts = [Parts(net, i, shown) for i in range(len(net.layers))]
    count = 0
    for x, y in seen(net, samples):
        count += y.shape[0]
        for i, h in enumerate(activations(net, x, y, backend)):
            parts[i].add(h, y, True)
        if shown:
            shift = torch.randint(1, net.num_classes, y.shape, generator=generator,
                                  device="cpu").to(y.device)
            wrong = (y + shift) % net.num_classes
            for i, h in enumerate(activations(net, x, wrong, backend)):
                parts[i].add(h, y, False)
    check_seen(count)
    return [p.difference() for p in parts]


class Parts:
    """Sums of a layer's units' parts in the goodness, on their positive and negative samples."""

    def __init__(self, net: LocalNet, i: int, shown: bool) -> None:
        layer = net.layer(i)
        offsets = layer.config.offsets(layer.units)
        self.layer, self.squares = layer, layer.config.goodness != "mean"
        sizes = torch.tensor(offsets).diff()
        #: The group of each unit, where groups are classes.
        self.group = None if shown or len(sizes) < 2 else torch.repeat_interleave(
            torch.arange(len(sizes)), sizes)
        self.sign = 1.0 if net.readout.maximize else -1.0
        self.sums = torch.zeros(2, layer.units, dtype=torch.float64)
        self.counts = torch.zeros(2, layer.units, dtype=torch.float64)

    def add(self, h: torch.Tensor, y: torch.Tensor, positive: bool) -> None:
        e = by_unit(h.square() if self.squares else h).cpu()
        y = self.layer.labels(y).cpu()
        mine = torch.full(e.shape, positive) if self.group is None else (
            y[:, None] == self.group[None])
        for side, rows in enumerate((mine, ~mine)):
            self.sums[side] += (e * rows).sum(0)
            self.counts[side] += rows.sum(0)

    def difference(self) -> torch.Tensor:
        means = self.sums / self.counts.clamp(min=1)
        return self.sign * (means[0] - means[1])


def by_unit(h: torch.Tensor) -> torch.Tensor:
    """(N, C) fp64: a channel's mean over its pixels, a unit's value as it is."""
    return over_pixels(h.double())


def seen(net: LocalNet, samples: Samples) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches as the network takes them."""
    weight = net.layer(0).weight
    dtype = torch.float32 if weight.dtype is torch.bfloat16 else weight.dtype
    for x, y in samples:
        yield x.to(weight.device, dtype), y.to(weight.device)


def check_seen(count: int) -> int:
    if not count:
        raise ValueError("[prune] expected at least one sample to rank units by, got none")
    return count
