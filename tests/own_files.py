"""One's own data in small: folders of images that differ in size, format and mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

#: Class -> brightness of its images.
CLASSES = {"ant": 40, "bee": 120, "owl bird": 210}
KINDS = (("RGB", ".png"), ("L", ".jpg"), ("P", ".bmp"), ("RGBA", ".png"), ("1", ".png"),
         ("RGB", ".JPEG"), ("LA", ".png"))


def flat(value: int, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> Image.Image:
    """One grey value, (H, W); black or white where the mode has no more."""
    made = Image.fromarray(np.full((*size, 3), value, np.uint8))
    return made.quantize(4) if mode == "P" else made.convert(mode, dither=Image.Dither.NONE)


def halved(name: str, size: tuple[int, int], mode: str) -> Image.Image:
    """Bright at the left, at the top, or in the middle: a picture that tells its class."""
    height, width = size
    pixels = np.full((*size, 3), 30, np.uint8)
    where = {"ant": np.s_[:, :width // 2], "bee": np.s_[:height // 2]}
    pixels[where.get(name, np.s_[height // 4:-(height // 4), width // 4:-(width // 4)])] = 220
    made = Image.fromarray(pixels)
    return made.quantize(4) if mode == "P" else made.convert(mode, dither=Image.Dither.NONE)


def pictures(root: Path, train: int = 14, test: int = 7, grey: bool = False,
             telling: bool = False) -> Path:
    """train/CLASS and test/CLASS with so many images each; all grey, or of every kind; each of one
    value, or `telling` of halves.
    """
    random = np.random.RandomState(0)
    for part, count in (("train", train), ("test", test)):
        for name, value in CLASSES.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                mode, suffix = ("L", ".png") if grey else KINDS[i % len(KINDS)]
                height, width = random.randint(5, 40, 2)
                made = halved(name, (height, width), mode) if telling else (
                    flat(value, (height, width), mode))
                made.save(folder / f"{i:02d}{suffix}")
    return root


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(numbers (count, 4) in columns of different units, classes 0..2 that the first two tell)."""
    random = np.random.RandomState(seed)
    labels = np.arange(count) % 3
    values = random.standard_normal((count, 4)) * (1, 100, 1, 0.01) + (0, 1000, -5, 0)
    values[:, 0] += 8 * (labels == 1)
    values[:, 1] += 800 * (labels == 2)
    return values, labels


def table(path: Path, count: int = 60, seed: int = 0) -> Path:
    """A csv of `rows`, its label column in the middle and in words."""
    values, labels = rows(count, seed)
    lines = ["a,b,Class,c,d"]
    for (a, b, c, d), label in zip(values, labels, strict=True):
        lines.append(f"{a:.6g},{b:.6g},{list(CLASSES)[label]},{c:.6g},{d:.6g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path
