"""Settings and state of an optimizer step, and a convolution's geometry, for `weight_update`.

The codes are those of csrc/params.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

OPTIM_CODES = {"sgd": 0, "adam": 1, "adamw": 2}


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with the semantics of torch.optim (bias correction included)."""

    kind: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.kind not in OPTIM_CODES:
            raise ValueError(
                f"[optimizer] kind must be one of {', '.join(OPTIM_CODES)}, got {self.kind!r}")
        if self.nesterov and (self.kind != "sgd" or self.momentum <= 0):
            raise ValueError("[optimizer] nesterov expected sgd with momentum > 0, got "
                             f"{self.kind} with momentum={self.momentum}")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("momentum", self.momentum),
                            ("weight_decay", self.weight_decay)):
            if not value >= 0:
                raise ValueError(f"[optimizer] {name} must be 0 or more, got {value}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"[optimizer] betas must lie in [0, 1), got {self.betas}")

    @property
    def states(self) -> int:
        """How many state tensors of the weight's shape the optimizer keeps."""
        return (1 if self.momentum else 0) if self.kind == "sgd" else 2


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution's kernel, stride, zero padding and channel groups."""

    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.kernel) < 1 or self.stride < 1 or self.padding < 0 or self.groups < 1:
            raise ValueError("[conv] expected kernel >= 1, stride >= 1, padding >= 0, groups >= 1, "
                             f"got kernel={self.kernel} stride={self.stride} "
                             f"padding={self.padding} groups={self.groups}")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(P, Q) of an input of this size."""
        return ((height + 2 * self.padding - self.kernel[0]) // self.stride + 1,
                (width + 2 * self.padding - self.kernel[1]) // self.stride + 1)


LINEAR = ConvGeometry((1, 1))


@dataclass
class OptimState:
    """State of one weight: m (Adam's first moment, SGD's momentum), v, steps taken."""

    m: torch.Tensor | None
    v: torch.Tensor | None
    step: int = 0

    @classmethod
    def create(cls, weight: torch.Tensor, config: OptimConfig) -> OptimState:
        """Zeros in the weight's dtype (fp32, or fp64) and memory layout."""
        m, v = (torch.zeros_like(weight, requires_grad=False) if config.states > i else None
                for i in range(2))
        return cls(m, v)


@dataclass(frozen=True, slots=True)
class OptimCall:
    """An optimizer step's numbers, as the kernels read them (csrc/params.h: OptimParams)."""

    kind: int
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    nesterov: bool
    step: int


def optim_call(optim: OptimConfig, step: int) -> OptimCall:
    """The flat form of `optim` at its `step`-th update (1 at the first)."""
    return OptimCall(OPTIM_CODES[optim.kind], optim.lr, optim.weight_decay, *optim.betas,
                     optim.eps, optim.momentum, optim.nesterov, step)
