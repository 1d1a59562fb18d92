"""What data sets check and change alike: whole numbers, sides, and the size of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RESIZE_CHUNK = 4096


def check_int(what: str, value: object, low: int, high: int | None = None) -> None:
    """TypeError or ValueError unless `value` is an int in low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"[data] {what} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"[data] {what} must be {bounds}, got {value}")


def sides_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an image_size; ValueError for what is none."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"[data] image_size must be a number or (H, W), got {size!r}")
    for side in sides:
        check_int("image_size", side, 1)
    return sides


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(N, C, H, W) resized bilinearly (with antialiasing where it shrinks), of the same dtype.

    uint8 is rounded back to uint8: a quarter of the memory, and what image libraries do.
    """
    height, width = sides_of(size)
    if images.shape[2:] == (height, width):
        return images
    out = images.new_empty(*images.shape[:2], height, width)
    for start in range(0, len(images), _RESIZE_CHUNK):
        part = images[start : start + _RESIZE_CHUNK].to(torch.float32)
        made = F.interpolate(
            part, size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
        integer = images.dtype == torch.uint8
        out[start : start + len(part)] = made.round_().clamp_(0, 255) if integer else made
    return out
