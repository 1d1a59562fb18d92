"""FFRNN (Hinton 2022, sec. 3.4; FFLib): layers that also see the layer above, over frames.

    h_i' = beta relu(n(h_{i-1}) F_i^T + n(h_{i+1}) B_i^T + b_i) + (1 - beta) h_i,

n(v) = v / (|v| + 1e-4); the bottom is the image, the top the one-hot label. F_i and B_i lie side by
side in one weight, so that a frame of a layer is one product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ffengine.nn.differentiable import Call, direct
from ffengine.nn.heads import LinearHead
from ffengine.nn.layers import LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.nn.readout import above
from ffengine.ops.config import LocalPassConfig, Norm
from ffengine.ops.local_pass import local_pass
from ffengine.ops.tracing import traced
from ffengine.reference.local_pass import local_pass as reference_pass
from ffengine.typed import typed

LENGTH = Norm("length", eps=1e-4, length="l2")
Hidden = Sequence[torch.Tensor]


class RecurrentNet(LocalNet):
    """Hidden layers between an image and a label.

    Args:
        widths: units per hidden layer.
        config: of every layer; its norm is not used.
        beta: share of the new activation in a state.
        frames: (first, last) frame whose goodness counts, both exclusive, frames counted from 0
            (FFLib: 3 < t < 8); `last` frames are run.
        theta: a frame's goodness enters the mean as softplus(g - theta) (FFLib), None: as it is.
    """

    makes_pairs = True

    @typed("recurrent")
    def __init__(self, widths: Sequence[int], *, config: LocalPassConfig, num_classes: int,
                 in_shape: tuple[int, ...], beta: float = 0.7, frames: tuple[int, int] = (3, 8),
                 negatives: str = "inverse", theta: float | None = None, **options: Any) -> None:
        low, high = frames
        if not 0 <= low < high - 1:
            raise ValueError("[recurrent] frames expected K_low >= 0 and K_low + 1 < K_high, got "
                             f"K_low={low} and K_high={high}")
        if negatives == "masked":
            raise ValueError("[recurrent] negatives expected labels, got masked")
        around = [math.prod(in_shape), *widths, num_classes]
        config = replace(config, norm=Norm("none"), blend=beta)
        layers = [LocalLinear(around[i] + around[i + 2], width, config=config,
                              init="torch")
                  for i, width in enumerate(widths)]
        super().__init__(layers, num_classes=num_classes, in_shape=in_shape, input_norm="none",
                         layer_range=(0, len(widths) - 1), negatives=negatives, **options)
        self.beta, self.frames, self.theta = beta, (low, high), theta
        # one fixed draw for every image and label: predictions are deterministic
        for i, width in enumerate(widths):
            self.register_buffer(f"hidden_{i}", torch.rand(1, width))

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of every layer."""
        return tuple(self.layer(i).units for i in range(len(self.layers)))

    def input_of(self, i: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The states below and above layer i, side by side."""
        return (self.layer(i).weight.shape[1],)

    def initial(self) -> list[torch.Tensor]:
        """The states a prediction starts from, (1, units) per layer."""
        return [self.get_buffer(f"hidden_{i}") for i in range(len(self.layers))]

    def around(self, i: int, unit: Sequence[torch.Tensor]) -> torch.Tensor:
        """What layer i sees: the normalised states below and above it, side by side."""
        return torch.cat([unit[i], unit[i + 2]], 1)

    def ends(self, x: torch.Tensor, rows: torch.Tensor, hidden: Hidden) -> list[torch.Tensor]:
        """The states of image, layers and label; the layers' broadcast over the rows."""
        n = rows.shape[0]
        return [x.flatten(1), *(t.to(x.dtype).expand(n, -1) for t in hidden), rows]

    def new_state(self, i: int, u: torch.Tensor, h: torch.Tensor,
                  backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
        """(h_i', goodness (N, 1)) of layer i from what it sees, see `around`, and its own state."""
        layer = self.layer(i)
        a = layer.preactivation(u)
        if traced():
            z, g = reference_pass(a, config=layer.config, h_prev=h)[:2]
        else:
            z, g = local_pass(a, config=layer.config, h_prev=h.to(a.dtype).contiguous(), out=a,
                              backend=backend)[:2]
        assert z is not None
        return z, g

    def sweep_once(self, h: list[torch.Tensor], unit: list[torch.Tensor],
                   backend: str = "auto") -> None:
        """The initial sweep, bottom up, in place: a layer sees the new state below it."""
        for i in range(len(self.layers)):
            h[i + 1], _ = self.new_state(i, self.around(i, unit), h[i + 1], backend)
            unit[i + 1] = length_normalised(h[i + 1])

    def play(self, x: torch.Tensor, rows: torch.Tensor, hidden: Hidden,
             backend: str = "auto") -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """(goodness (N, 1), state (N, units)) of every layer, frame by frame, of images x with
        label rows (N, K)."""
        h = self.ends(x, rows, hidden)
        unit = [length_normalised(t) for t in h]
        self.sweep_once(h, unit, backend)
        for _ in range(self.frames[1]):
            made = [self.new_state(i, self.around(i, unit), h[i + 1], backend)
                    for i in range(len(self.layers))]
            h[1:-1] = [z for z, _ in made]
            unit[1:-1] = [length_normalised(z) for z, _ in made]
            yield [g for _, g in made], h[1:-1]

    def frame_goodness(self, x: torch.Tensor, rows: torch.Tensor, hidden: Hidden,
                       backend: str = "auto") -> list[list[torch.Tensor]]:
        """Goodness (N, 1) per frame and layer of images x with label rows (N, K)."""
        return [goodness for goodness, _ in self.play(x, rows, hidden, backend)]

    def unrolled(self, x: torch.Tensor, call: Call = direct) -> torch.Tensor:
        """All states (N, sum of units) after the frames, no label on top; autograd follows.

        call: of every frame.
        """
        rows = x.new_zeros(x.shape[0], self.num_classes)
        below, *states, above = self.ends(x, rows, self.initial())
        below, above = length_normalised(below), length_normalised(above)
        for _ in range(self.frames[1]):
            states = list(call(self._plain_frame, below, above, *states))
        return torch.cat(states, 1)

    def _plain_frame(self, below: torch.Tensor, above: torch.Tensor,
                     *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The layers' states after a frame, from those before it and the normalised ends."""
        unit = [below, *(length_normalised(t) for t in states), above]
        made = []
        for i, state in enumerate(states):
            layer, u = self.layer(i), self.around(i, unit)
            bias = None if layer.bias is None else layer.bias.to(u.dtype)
            a = F.linear(u, layer.weight.to(u.dtype), bias)
            made.append(self.beta * F.relu(a) + (1 - self.beta) * state)
        return tuple(made)

    def differentiable_logits(self, x: torch.Tensor, call: Call = direct,
                              layout: torch.memory_format = torch.preserve_format) -> torch.Tensor:
        """Of the backpropagation twin: its head on the unrolled states."""
        scores: torch.Tensor = self.heads[0](self.unrolled(x, call))
        return scores

    def head_features(self, head: LinearHead, x: torch.Tensor, *, backend: str = "auto",
                      training: bool = False) -> torch.Tensor:
        """What a head sees: all states after the frames."""
        with torch.no_grad():
            return self.unrolled(x)

    def logits(self, x: torch.Tensor, *, backend: str = "auto") -> list[torch.Tensor]:
        """Logits (N, K) of every head."""
        return [h(self.unrolled(x)) for h in self.heads]

    def goodness(self, x: torch.Tensor, *, end: int | None = None, backend: str = "auto",
                 training: bool = False, hidden: Hidden | None = None) -> list[torch.Tensor]:
        """Goodness (N, K) per class and layer, the mean over the frames that count, above theta.

        Args:
            hidden: initial states (K, units) per layer, one row a label; default: the fixed ones.
        """
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(f"[network] expected input (N, {', '.join(map(str, self.in_shape))}), "
                             f"got {tuple(x.shape)}")
        end = len(self.layers) - 1 if end is None else end
        if traced():
            return self._all_labels(x, hidden, backend)[:end + 1]
        step = max(1, CHUNK_ROWS // self.num_classes)
        parts = [self._all_labels(x[start:start + step], hidden, backend)
                 for start in range(0, max(x.shape[0], 1), step)]
        return [torch.cat(rows) for rows in zip(*parts, strict=True)][:end + 1]

    def _all_labels(self, x: torch.Tensor, hidden: Hidden | None,
                    backend: str) -> list[torch.Tensor]:
        n, k = x.shape[0], self.num_classes
        images = x.flatten(1).unsqueeze(1).expand(-1, k, -1).flatten(0, 1)
        rows = torch.eye(k, dtype=x.dtype, device=x.device).expand(n, k, k).flatten(0, 1)
        start = self.initial() if hidden is None else [
            t.expand(n, *t.shape).flatten(0, 1) for t in hidden]
        low, high = self.frames
        frames = self.frame_goodness(images, rows, start, backend)[low + 1:high]
        seen = [torch.stack([f[i] for f in frames]) for i in range(len(self.layers))]
        return [(g if self.theta is None else above(g, self.theta)).mean(0).view(n, k)
                for g in seen]


#: (image, label) rows in flight while labels are tried.
CHUNK_ROWS = 640


def lengths(v: torch.Tensor) -> torch.Tensor:
    """(N, 1): what n(v) divides each row by."""
    length: torch.Tensor = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return length + LENGTH.eps


def length_normalised(v: torch.Tensor) -> torch.Tensor:
    """n(v), per row."""
    return v / lengths(v)


def label_rows(y: torch.Tensor, num_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """Labels (N,) as one-hot rows; rows (N, K) as they are."""
    return y.to(dtype) if y.is_floating_point() else F.one_hot(y, num_classes).to(dtype)
