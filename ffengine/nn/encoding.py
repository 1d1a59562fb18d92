"""Label encodings: how a label enters the input of a positive/negative network.

Every encoding is a sum over disjoint elements, encode(x, k) = base(x) + mark(k): the first layer's
image part can be computed once for all labels (ffengine.nn.try_labels).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.checks import one_of
from ffengine.nn.drawing import normal, whole
from ffengine.typed import typed


class LabelEncoding(nn.Module):
    """Base of the encodings.

    Labels are int64 (N,), or rows (N, K) for soft or inverse labels.

    Args:
        num_classes: K.
        in_shape: (C, H, W) or (features,) of one sample before encoding.

    Attributes:
        shape: of one encoded sample.
    """

    shape: tuple[int, ...]
    #: Where in a flat input the label row stands as it is, if it does.
    columns: slice | None = None

    @typed("encoding")
    def __init__(self, num_classes: int, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"[encoding] expected 2 or more classes, got {num_classes}")
        self.num_classes, self.in_shape = num_classes, tuple(in_shape)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """A new (N, *shape): the image, zeros where the label goes."""
        raise TypeError(f"[encoding] {type(self).__name__} has no base")

    def mark(self, rows: torch.Tensor) -> torch.Tensor:
        """(M, *shape): the labels of rows (M, K), zeros where the image is."""
        raise TypeError(f"[encoding] {type(self).__name__} has no mark")

    def scale(self, x: torch.Tensor) -> torch.Tensor | float:
        """What label rows are multiplied by in this batch."""
        return 1.0

    def neutral_rows(self, n: int, like: torch.Tensor) -> torch.Tensor:
        """Label rows (n, K) that favour no class."""
        return like.new_full((n, self.num_classes), 1.0 / self.num_classes)

    def rows(self, labels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Labels as rows (N, K) of the input's dtype; rows pass as they are."""
        if labels.is_floating_point():
            return labels.to(like.dtype)
        return F.one_hot(labels, self.num_classes).to(like.dtype)

    def write(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Encode x and label rows (N, K), already scaled, into out (N, *shape)."""
        out.copy_(self.base(x)).add_(self.mark(rows))

    def place(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Encoded input (N, *shape) of x and label rows (N, K)."""
        out = x.new_empty(x.shape[0], *self.shape)
        self.write(out, x, rows * self.scale(x))
        return out

    def blank(self, x: torch.Tensor) -> torch.Tensor:
        """The image alone, as the first layer's input (backpropagation twins)."""
        return self.base(x)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Encoded input (N, *shape) of x and labels (N,) or (N, K)."""
        return self.place(x, self.rows(labels, x))

    def neutral(self, x: torch.Tensor) -> torch.Tensor:
        """Encoded input with no class favoured."""
        return self.place(x, self.neutral_rows(x.shape[0], x))


class Overlay(LabelEncoding):
    """The label as one-hot over the first K pixels (Hinton 2022, sec. 3.3).

    Args:
        value: what the label's pixel holds; "max": the largest pixel of the batch (Pezeshki).
        neutral_value: every label pixel of the neutral input, over `value` (Löwe: 0.1).

    Raises:
        ValueError: fewer pixels than classes, a value that is no number.
    """

    @typed("encoding")
    def __init__(self, num_classes: int, in_shape: tuple[int, ...],
                 value: float | Literal["max"] = 1.0, neutral_value: float = 0.1) -> None:
        super().__init__(num_classes, in_shape)
        self.shape = (math.prod(in_shape),)
        if self.shape[0] < num_classes:
            raise ValueError(f"[encoding] a label overlay needs {num_classes} pixels, got an "
                             f"image of {self.shape[0]}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value != "max" and not (number and math.isfinite(value)):
            raise ValueError("[encoding] an overlay's value expected a finite number or 'max', "
                             f"got {value!r}")
        self.value, self.neutral_value = value, neutral_value
        self.columns = slice(0, num_classes)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1).clone()
        x[:, :self.num_classes] = 0
        return x

    def mark(self, rows: torch.Tensor) -> torch.Tensor:
        return F.pad(rows, (0, self.shape[0] - self.num_classes))

    def write(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        out.copy_(x.flatten(1))
        out[:, :self.num_classes] = rows

    def blank(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)

    def scale(self, x: torch.Tensor) -> torch.Tensor | float:
        if self.value == "max":
            return x.max() if x.numel() else 1.0
        return float(self.value)

    def neutral_rows(self, n: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_full((n, self.num_classes), self.neutral_value)


class Concat(LabelEncoding):
    """The image's elements, then the label row (FFLib); the neutral row is zero (FFNN+C)."""

    @typed("encoding")
    def __init__(self, num_classes: int, in_shape: tuple[int, ...]) -> None:
        super().__init__(num_classes, in_shape)
        self.shape = (math.prod(in_shape) + num_classes,)
        self.columns = slice(self.shape[0] - num_classes, self.shape[0])

    def base(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x.flatten(1), (0, self.num_classes))

    def mark(self, rows: torch.Tensor) -> torch.Tensor:
        return F.pad(rows, (self.shape[0] - self.num_classes, 0))

    def write(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        out[:, :-self.num_classes] = x.flatten(1)
        out[:, -self.num_classes:] = rows

    def neutral_rows(self, n: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(n, self.num_classes)


class LabelChannel(LabelEncoding):
    """One more channel that shows the label's embedding, H x W (Trifecta, sec. 3).

    Args:
        learned: the embedding is trained by the first layer's loss; else it stays random.
        neutral: "mean" of the embeddings, or the embedding of a "random" label, drawn once (from
            torch's generator).

    Raises:
        ValueError: samples that are no maps.
    """

    neutral_label: torch.Tensor

    @typed("encoding")
    def __init__(self, num_classes: int, in_shape: tuple[int, ...], learned: bool = True,
                 neutral: Literal["mean", "random"] = "mean") -> None:
        super().__init__(num_classes, in_shape)
        if len(in_shape) != 3:
            raise ValueError(f"[encoding] a label channel needs maps (C, H, W), got {in_shape}")
        one_of("encoding", "neutral", neutral, ("mean", "random"))
        channels, height, width = in_shape
        self.shape = (channels + 1, height, width)
        self.learned, self.neutral_kind = learned, neutral
        # one draw for all samples and runs, so that neither a split nor a resume changes a score
        self.register_buffer("neutral_label", torch.zeros(1, dtype=torch.int64))
        whole(self.neutral_label, num_classes)
        self.weight = nn.Parameter(torch.empty(num_classes, height * width), requires_grad=learned)
        normal(self.weight, 1.0)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 1))

    def mark(self, rows: torch.Tensor) -> torch.Tensor:
        return F.pad(self._maps(rows)[:, None], (0, 0, 0, 0, self.shape[0] - 1, 0))

    def write(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        out[:, :-1] = x
        out[:, -1] = self._maps(rows)

    def _maps(self, rows: torch.Tensor) -> torch.Tensor:
        """The embeddings that label rows (N, K) name, (N, H, W)."""
        return (rows @ self.weight.detach().to(rows.dtype)).view(-1, *self.shape[1:])

    def neutral_rows(self, n: int, like: torch.Tensor) -> torch.Tensor:
        if self.neutral_kind == "mean":
            return super().neutral_rows(n, like)
        row = F.one_hot(self.neutral_label, self.num_classes).to(like.dtype)
        return row.expand(n, -1)
