"""How the ops' maps lie in memory, and where their results go."""

from __future__ import annotations

import torch

from ffengine.ops.config import LocalPassConfig


def nchw(a: torch.Tensor) -> tuple[int, int, int, int]:
    """a's sizes; those of (N, C, *spatial) as one row of pixels."""
    n, c, *spatial = a.shape
    if len(spatial) == 2:
        return n, c, spatial[0], spatial[1]
    return n, c, 1, numel(tuple(spatial))


def numel(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    total = 1
    for s in shape:
        total *= s
    return total


def memory_layout(a: torch.Tensor) -> torch.memory_format | None:
    """contiguous, channels_last, or None of other strides."""
    if a.is_contiguous():
        return torch.contiguous_format
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def pooled_shape(shape: tuple[int, ...], config: LocalPassConfig) -> tuple[int, ...]:
    """Shape of z, of a's."""
    if config.pool == "none":
        return tuple(shape)
    return (*shape[:2], shape[2] // 2, shape[3] // 2)


def destination(out: torch.Tensor | None, overwrite: bool, shape_z: tuple[int, ...],
                 a: torch.Tensor, layout: torch.memory_format,
                 slices: bool = False) -> torch.Tensor:
    """Where a kernel writes z; `slices`: it can write into a slice of a map."""
    if overwrite:
        return a
    if out is not None and (out.is_contiguous(memory_format=layout) or (
            slices and map_channels(out, layout))):
        return out
    return torch.empty(shape_z, dtype=a.dtype, device=a.device, memory_format=layout)


def map_channels(z: torch.Tensor, layout: torch.memory_format) -> int | None:
    """Channels of the dense map in `layout` that z (N, C, *spatial) is a slice of, C where z is
    dense; None where its strides are those of no such map."""
    if z.is_contiguous(memory_format=layout):
        return z.shape[1]
    pixels = numel(tuple(z.shape[2:]))
    if pixels == 0 or (z.dim() == 4 and 1 in z.shape[2:]):
        return None  # strides of a size of one say nothing
    if layout is torch.channels_last:
        wide = z.stride(3)
        strides: tuple[int, ...] = (wide * pixels, 1, wide * z.shape[3], wide)
    else:
        wide = z.stride(0) // pixels
        inner = torch.empty(z.shape[1:], device="meta").stride()
        strides = (wide * pixels, *inner)
    return wide if wide > z.shape[1] and z.stride() == strides else None
