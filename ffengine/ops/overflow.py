"""Activations so large that their squares overflow: a normalisation would divide by infinity and
leave zeros without a word."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from ffengine.ops.config import LocalPassConfig
from ffengine.ops.layout import numel

#: The root of fp32's largest number: a square above it is infinite.
LARGEST = 1.8e19


class Overflowed(ValueError):
    """Squares of activations are not finite, and the activations are gone."""


def check_variance(running: torch.Tensor | None) -> None:
    """Overflowed if running variances (C,) on the CPU took in an infinite one."""
    if running is not None and running.device.type == "cpu" and np.isinf(
            running.detach().numpy()).any():
        raise Overflowed("[batch_pass] expected activations whose variance is finite, got an "
                         "infinite running variance")


def goodness_limit(config: LocalPassConfig, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """What the goodness of a sample must stay below for the squares of its activations, of shape
    (C, *spatial), to have a finite sum in fp32 (fp64): activations are not negative, so that sum is
    at most (their own sum) squared."""
    most = torch.finfo(dtype if dtype is torch.float64 else torch.float32).max
    offsets = config.offsets(shape[0])
    groups = len(offsets) - 1
    width = max(b - a for a, b in pairwise(offsets)) * numel(shape[1:])
    return {"mean": math.sqrt(most) / (width * groups), "mean_sq": most / (width * groups),
            "sum_sq": most / groups}[config.goodness]


def overflows(g: torch.Tensor, config: LocalPassConfig, shape: tuple[int, ...]) -> bool:
    """A goodness (N, K) on the CPU is above the limit."""
    if config.norm.kind == "none" or not g.numel():
        return False
    held = g.detach() if g.requires_grad else g
    most = float(np.abs(held.numpy()).max())  # numpy's scratch is no tensor
    # no limit is below this one, which takes a microsecond
    return most * numel(shape) >= LARGEST and most >= goodness_limit(config, shape, g.dtype)
