"""Seeded augmentations of whole batches.

Each is called as ``op(x, generator)`` with x float32 (B, C, H, W) in [0, 1] on any device, draws
one set of random numbers per sample and gives a tensor of the same shape (RandomCrop: of its
size), dtype, device and range. x is never written to. Numbers are drawn on the generator's own
device, so a CPU generator gives the same batch on every device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ffengine.data import colour
from ffengine.typed import typed


class Op(Protocol):
    """Any callable of this form may stand in a `Compose` or be a loader's `augment`."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor: ...


def _uniform(x: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(B,) uniform in low..high, of x's dtype and device."""
    drawn = torch.rand(len(x), generator=generator, device=generator.device)
    return (low + (high - low) * drawn).to(x.device, x.dtype)


def _require(good: bool, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"[augment] {expected}, got {got}")


@dataclass(frozen=True)
class RandomCrop:
    """Pads with zeros by `padding` on every side, then cuts out `size` (default: x's own)."""

    padding: int = 4
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _require(self.padding >= 0, "padding must be at least 0", self.padding)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, channels, h, w = x.shape
        height, width = self.size or (h, w)
        spare_h, spare_w = h + 2 * self.padding - height, w + 2 * self.padding - width
        _require(
            min(spare_h, spare_w) >= 0 and min(height, width) > 0,
            f"size must fit in {h}x{w} padded by {self.padding}",
            (height, width),
        )
        padded = F.pad(x, (self.padding,) * 4)
        device = generator.device
        top = torch.randint(spare_h + 1, (n,), generator=generator, device=device).to(x.device)
        left = torch.randint(spare_w + 1, (n,), generator=generator, device=device).to(x.device)
        rows = top[:, None] + torch.arange(height, device=x.device)
        columns = left[:, None] + torch.arange(width, device=x.device)
        sample = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[None, :, None, None]
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirrors a sample left to right with probability `p`."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.p <= 1, "p must be in 0..1", self.p)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        chosen = _uniform(x, 0.0, 1.0, generator) < self.p
        return torch.where(chosen[:, None, None, None], x.flip(-1), x)


@dataclass(frozen=True)
class RandomRotation:
    """Rotates about the centre by up to `degrees` either way; corners fill with zeros."""

    degrees: float = 15.0

    def __post_init__(self) -> None:
        _require(0 <= self.degrees <= 180, "degrees must be in 0..180", self.degrees)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        angle = _uniform(x, -self.degrees, self.degrees, generator)
        return x.clone() if self.degrees == 0 else affine(x, angle, torch.ones_like(angle))


@dataclass(frozen=True)
class RandomScale:
    """Magnifies about the centre by a factor in low..high; borders fill with zeros."""

    low: float = 0.9
    high: float = 1.1

    def __post_init__(self) -> None:
        _require(0 < self.low <= self.high, "need 0 < low <= high", (self.low, self.high))

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        factor = _uniform(x, self.low, self.high, generator)
        if self.low == self.high == 1:
            return x.clone()
        return affine(x, torch.zeros_like(factor), factor)


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast, saturation, hue, in this order.

    The first three multiply by a factor in max(0, 1 - value)..1 + value; hue turns the colour
    circle by a part in -hue..hue of it, hue <= 0.5. Saturation and hue need three channels.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        strengths = (self.brightness, self.contrast, self.saturation)
        _require(min(strengths) >= 0, "jitter must be at least 0", strengths)
        _require(0 <= self.hue <= 0.5, "hue must be in 0..0.5", self.hue)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.saturation or self.hue:
            _require(x.shape[1] == 3, "saturation and hue need 3 channels", x.shape[1])
        out = x.clone()
        for change, strength in (
            (colour.brightness, self.brightness),
            (colour.contrast, self.contrast),
            (colour.saturation, self.saturation),
        ):
            # Drawn even when unused, so that one strength does not change the others' numbers.
            factor = _uniform(x, max(0.0, 1 - strength), 1 + strength, generator)
            if strength:
                out = change(out, factor)
        turn = _uniform(x, -self.hue, self.hue, generator)
        return colour.hue(out, turn) if self.hue else out


@dataclass(frozen=True)
class Compose:
    """The operations one after the other, on one generator."""

    ops: Sequence[Op]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        for op in self.ops:
            x = op(x, generator)
        return x


def build(
    *,
    crop: int = 0,
    flip: bool = False,
    rotation: float = 0.0,
    scale: tuple[float, float] | None = None,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Compose | None:
    """A `Compose` from plain numbers (as a recipe has them); None if nothing is asked for."""
    ops: list[Op] = []
    if crop:
        ops.append(RandomCrop(crop))
    if flip:
        ops.append(RandomHorizontalFlip())
    if rotation:
        ops.append(RandomRotation(rotation))
    if scale is not None:
        ops.append(RandomScale(*scale))
    if brightness or contrast or saturation or hue:
        ops.append(ColourJitter(brightness, contrast, saturation, hue))
    return Compose(tuple(ops)) if ops else None


#: Word of `by_name` -> the numbers it stands for alone; None: how strong has to be said.
_WORDS: dict[str, tuple[float, ...] | None] = {
    "crop": (4.0,), "flip": (), "rotate": (15.0,), "scale": (0.9, 1.1),
    "brightness": None, "contrast": None, "saturation": None, "hue": None,
}


@typed("augment")
def by_name(text: str) -> Compose | None:
    """A `Compose` from words joined by "+", such as "crop4+flip+rotate15"; "none" gives None.

    crop4: pixels of padding (alone: 4). flip: left to right, half of the time. rotate15: degrees
    either way at most (alone: 15). scale0.9-1.1: lowest and highest factor (alone: these).
    brightness0.4, contrast0.4, saturation0.4, hue0.1: strengths of `ColourJitter`. Whatever the
    order of the words, the operations run in that of `build`.

    Raises ValueError in one line for an unknown or repeated word and for bad numbers.
    """
    if text.strip() == "none":
        return None
    asked: dict[str, tuple[float, ...]] = {}
    for part in text.split("+"):
        word, numbers = _word(part.strip())
        _require(word not in asked, "expected each word once", repr(text))
        asked[word] = numbers
    crop, rotation = asked.pop("crop", (0.0,))[0], asked.pop("rotate", (0.0,))[0]
    _require(crop.is_integer(), "expected a whole number of pixels to crop", crop)
    flip, scale = asked.pop("flip", None) is not None, asked.pop("scale", None)
    colours = {word: numbers[0] for word, numbers in asked.items()}
    return build(crop=int(crop), flip=flip, rotation=rotation,
                 scale=None if scale is None else (scale[0], scale[1]), **colours)


def _word(part: str) -> tuple[str, tuple[float, ...]]:
    """("scale", (0.9, 1.1)) from "scale0.9-1.1"."""
    number = r"\d+(?:\.\d+)?"
    found = re.fullmatch(rf"([a-z]+)((?:{number}(?:-{number})*)?)", part)
    if found is None or found[1] not in _WORDS:
        raise ValueError(
            f"[augment] expected words out of {', '.join(_WORDS)}, joined by +, got {part!r}"
        )
    usual = _WORDS[found[1]]
    if not found[2] and usual is not None:
        return found[1], usual
    numbers = tuple(float(n) for n in found[2].split("-") if n)
    expected = 1 if usual is None else len(usual)
    _require(len(numbers) == expected, f"numbers after {found[1]} must be {expected}", repr(part))
    return found[1], numbers


def affine(x: Tensor, degrees: Tensor, scale: Tensor) -> Tensor:
    """x (B, C, H, W) rotated counter-clockwise and magnified about its centre, bilinearly.

    degrees, scale: (B,). Outside of x is zero.
    """
    if not len(x):
        return x.clone()  # affine_grid refuses an empty batch
    h, w = x.shape[2:]
    radians = degrees * (math.pi / 180)
    cos, sin = radians.cos() / scale, radians.sin() / scale
    # The grid's unit is half a side, so turning a picture that is not square mixes two units.
    zero = torch.zeros_like(cos)
    theta = torch.stack([cos, -sin * (h / w), zero, sin * (w / h), cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
