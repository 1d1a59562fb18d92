"""Normalisation of a layer's input, with the gradients a local step needs (Trifecta, sec. 3).

The batch kinds are folded into the layer's weight, conv(g x̂ + b, W) = conv(x̂, g W) + conv(b, W):
the weight gradient against x̂ then also gives the affine gradients, without an input gradient
(ffengine.engine.affine).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.ops import pieces
from ffengine.ops.config import LocalPassConfig, Norm
from ffengine.ops.memory_accounting import is_fake
from ffengine.ops.overflow import LARGEST
from ffengine.ops.tracing import traced
from ffengine.reference import local_pass as reference
from ffengine.reference.norms import standardised
from ffengine.typed import typed

Kind = Literal["batch", "batch-running", "layer", "layer-no-mean"]
KINDS = ("batch", "batch-running", "layer", "layer-no-mean")


class Normalised(NamedTuple):
    """x̂ (shape of x), and its reciprocal standard deviation: (C,), or one a sample."""

    x_hat: torch.Tensor
    rstd: torch.Tensor


class PreNorm(nn.Module):
    """x̂ = (x - mean) rstd with an affine map, before a layer's weight.

    batch: statistics of the batch, per channel (torch's BatchNorm); batch-running: the running
    statistics in training too, so that samples share none; layer: LayerNorm over all elements
    of a sample, affine per element; layer-no-mean: x over its root mean square.

    Args:
        kind: one of the above.
        shape: of one sample, (C, H, W) or (features,).
    """

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None

    @typed("norm")
    def __init__(self, kind: Kind, shape: tuple[int, ...], eps: float = 1e-5,
                 momentum: float = 0.1) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"[norm] kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.eps, self.momentum = kind, eps, momentum
        #: Folded into the weight: statistics and affine map per channel.
        self.folded = kind.startswith("batch")
        shape = shape[:1] if self.folded else shape
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape) if self.folded else None)
        self.register_buffer("running_var", torch.ones(shape) if self.folded else None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the affine map: (C,) of a batch norm, else a sample's."""
        return tuple(self.weight.shape)

    @property
    def uses_batch_statistics(self) -> bool:
        """In training a sample's x̂ depends on the batch's other samples."""
        return self.kind == "batch"

    def normalise(self, x: torch.Tensor, training: bool) -> Normalised:
        """x̂ of x (N, *shape); with `training` the batch's statistics, and running ones move."""
        if not self.folded:
            return self._per_sample(x)
        assert self.running_mean is not None and self.running_var is not None
        own = training and self.kind == "batch"
        if training and not own:
            self._follow(x)
        if own and x.numel() <= x.shape[1]:
            raise ValueError("[norm] batch statistics expected more than one value a channel, got "
                             f"an input of {tuple(x.shape)}")
        x_hat, _, rstd = torch.native_batch_norm(
            x, None, None, self.running_mean, self.running_var, own, self.momentum, self.eps)
        return Normalised(x_hat, rstd if own else (self.running_var + self.eps).rsqrt())

    def _follow(self, x: torch.Tensor) -> None:
        """Move the running statistics, which normalise this very batch."""
        assert self.running_mean is not None and self.running_var is not None
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.to(self.running_mean.dtype)
        count = x.numel() // x.shape[1]
        self.running_mean.lerp_(wide.mean(dims), self.momentum)
        if count > 1:
            self.running_var.lerp_(wide.var(dims), self.momentum)

    def _per_sample(self, x: torch.Tensor) -> Normalised:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        x_hat, rstd = standardised(wide, self.eps, self.kind == "layer")
        return Normalised(x_hat.to(x.dtype), rstd)

    def affine(self, x_hat: torch.Tensor) -> torch.Tensor:
        """g x̂ + b."""
        like = (-1, *[1] * (x_hat.dim() - 2)) if self.folded else self.shape
        weight, bias = (p.detach().to(x_hat.dtype).view(like) for p in (self.weight, self.bias))
        return torch.addcmul(bias, weight, x_hat)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module as plain differentiable PyTorch (backpropagation twins, export)."""
        if not self.folded:
            x_hat, _ = standardised(x, self.eps, self.kind == "layer")
            return torch.addcmul(self.bias.to(x.dtype), self.weight.to(x.dtype), x_hat)
        own = self.training and self.kind == "batch"
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own,
                            self.momentum, self.eps)

    def input_gradient(self, dx_hat: torch.Tensor, made: Normalised,
                       training: bool) -> torch.Tensor:
        """dL/dx of dL/dx̂ (written over it), through the statistics where they are the input's own.

        Some rows at a time: no second map of the whole batch is made.
        """
        rows = pieces.rows_of(dx_hat, 4)
        rstd = made.rstd.view(1, -1, *[1] * (dx_hat.dim() - 2)) if self.folded else made.rstd
        parts = list(zip(torch.split(dx_hat, rows), torch.split(made.x_hat, rows), strict=True))
        if self.folded and not (training and self.kind == "batch"):
            return dx_hat.mul_(rstd.to(dx_hat.dtype))
        if self.folded:
            count = dx_hat.numel() // dx_hat.shape[1]
            dims = [d for d in range(dx_hat.dim()) if d != 1]
            along, mean = (total.div_(count) for total in _channel_sums(parts, dims))
            for d, x_hat in parts:
                d.addcmul_(x_hat, along.to(d.dtype), value=-1).sub_(mean.to(d.dtype)).mul_(
                    rstd.to(d.dtype))
            return dx_hat
        dims = list(range(1, dx_hat.dim()))
        for (d, x_hat), scale in zip(parts, torch.split(rstd, rows), strict=True):
            wide = d.to(scale.dtype)
            through = wide - x_hat * (wide * x_hat).mean(dims, keepdim=True)
            if self.kind != "layer-no-mean":
                through -= wide.mean(dims, keepdim=True)
            d.copy_(through.mul_(scale))
        return dx_hat


def _channel_sums(parts: list[tuple[torch.Tensor, torch.Tensor]],
                  dims: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of d x̂ and of d per channel, over pieces of rows, in fp32 (fp64)."""
    along, total = None, None
    for d, x_hat in parts:
        wide = d.to(torch.promote_types(d.dtype, torch.float32))  # once: a sum would copy it too
        a, b = (wide * x_hat).sum(dims, keepdim=True), wide.sum(dims, keepdim=True)
        along, total = (a, b) if along is None or total is None else (along + a, total + b)
    assert along is not None and total is not None
    return along, total


def input_scale(norm: Literal["layer", "none"] | Norm, mean: torch.Tensor, square: torch.Tensor,
                width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`normalise_input` as x -> alpha x + beta, from a sample's mean and mean square."""
    norm = norm if isinstance(norm, Norm) else Norm("layer")
    if norm.kind == "length":
        length = (square if norm.length == "rms" else square * width).sqrt()
        return 1 / (length + norm.eps), None
    rstd = (square - mean * mean + norm.eps).rsqrt()
    return rstd, -rstd * mean


def squares_overflow(x: torch.Tensor) -> bool:
    """The squares of a sample of x, all of them finite numbers on the CPU, may add up to infinity
    in fp32."""
    if x.device.type != "cpu" or x.dtype is torch.float64 or not x.numel() or (
            is_fake(x) or traced()):
        return False
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    return math.inf > max(high, -low) >= LARGEST / math.sqrt(x[:1].numel())


def normalise_input(x: torch.Tensor, norm: Literal["layer", "none"] | Norm,
                    ours: bool = False) -> torch.Tensor:
    """x with every sample normalised over all its elements; written over x if that is `ours`.

    Args:
        norm: "layer" (eps 1e-5, no affine), "none", or a Norm of kind layer or length.
    """
    if norm == "none":
        return x
    if squares_overflow(x):
        wide = normalise_input(x.double(), norm).to(x.dtype)
        return x.copy_(wide) if ours else wide
    if ours and isinstance(norm, Norm) and norm.kind == "length":
        length = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
        if norm.length == "rms":
            length = length / math.prod(x.shape[1:]) ** 0.5
        return x.div_(length + norm.eps)
    if ours:
        for part in torch.split(x, pieces.rows_of(x)):
            part.copy_(normalise_input(part, norm))
        return x
    if not isinstance(norm, Norm):
        return F.layer_norm(x, x.shape[1:])
    return reference.normalise(x, (0, x.shape[1]), LocalPassConfig(groups=1, norm=norm))
