"""How useful a layer's features are: a multi-layer head a layer, trained by backpropagation.

Trifecta fig. 8: the trained network stays as it is; every head sees the features of its layer
alone. All heads learn from the same pass, so features are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.maps import Label, Samples, layer_maps
from ffengine.nn.network import LocalNet

#: Larger maps are averaged down to this side before a head sees them.
SIDE = 4


@dataclass(frozen=True)
class ProbeOptions:
    """hidden: units of each hidden layer of a head; Adam at `lr` for `epochs`; label: what
    networks that are shown one see; features: as the next layer sees them (z) or before their
    normalisation (h)."""

    hidden: tuple[int, ...] = (256,)
    epochs: int = 5
    lr: float = 1e-3
    label: Label = "neutral"
    features: str = "z"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, *self.hidden, 1) < 1 or not self.lr > 0:
            raise ValueError("[probes] expected widths and epochs of 1 or more and a rate above 0, "
                             f"got {self.hidden}, {self.epochs} and {self.lr}")
        if self.features not in ("z", "h"):
            raise ValueError(f"[probes] features expected z or h, got {self.features!r}")


class Probes:
    """One head a layer on a frozen network."""

    def __init__(self, net: LocalNet, options: ProbeOptions, backend: str = "auto") -> None:
        self.net, self.options, self.backend = net.eval(), options, backend
        self.heads: list[nn.Sequential] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def fit(self, epochs: Callable[[int], Samples]) -> None:
        """Train on `epochs(e)`, the (x, y) batches of epoch e."""
        for epoch in range(self.options.epochs):
            for x, y in epochs(epoch):
                rows = self._features(x, y)
                self._begin(rows)
                assert self.optimizer is not None
                self.optimizer.zero_grad()
                with torch.enable_grad():
                    losses = [F.cross_entropy(head(row), y)
                              for head, row in zip(self.heads, rows, strict=True)]
                    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()

    def accuracy(self, samples: Samples) -> list[float]:
        """Of every head, 0 to 1."""
        hits, seen = torch.zeros(len(self.heads), dtype=torch.int64), 0
        with torch.no_grad():
            for x, y in samples:
                rows = self._features(x, y)
                hits += torch.stack([(head(row).argmax(1) == y).sum()
                                     for head, row in zip(self.heads, rows, strict=True)]).cpu()
                seen += len(y)
        return [int(h) / max(seen, 1) for h in hits]

    def _features(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        found = layer_maps(self.net, x, y, label=self.options.label, backend=self.backend)
        return [flat(maps.z if self.options.features == "z" else maps.h) for maps in found]

    def _begin(self, rows: Sequence[torch.Tensor]) -> None:
        """Make the heads, once their inputs' sizes are known."""
        if self.heads:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            self.heads = [head(row.shape[1], self.options.hidden, self.net.num_classes).to(row)
                          for row in rows]
        self.optimizer = torch.optim.Adam(
            [p for h in self.heads for p in h.parameters()], lr=self.options.lr)


def flat(maps: torch.Tensor) -> torch.Tensor:
    """(N, features) of units, or of maps averaged down to SIDE by SIDE; a copy."""
    if maps.dim() > 2 and math.prod(maps.shape[2:]) > SIDE * SIDE:
        maps = F.adaptive_avg_pool2d(maps, SIDE)
    return maps.flatten(1).clone()


def head(inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them; inputs are brought to unit scale by BatchNorm."""
    parts: list[nn.Module] = [nn.BatchNorm1d(inputs, affine=False)]
    for width in hidden:
        parts += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, classes))
