"""Any torch data sets, read once into tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ffengine.data.image_set import Splits
from ffengine.data.numbers import channels_first
from ffengine.data.own import PARTS, rows_of, splits_of
from ffengine.data.scale import OFF, SET
from ffengine.data.sizes import resize


def splits(train: Dataset[Any], test: Dataset[Any] | None = None, *, valid: int | None = None,
           image_size: int | tuple[int, int] | None = None, seed: int = 0, normalize: Any = SET,
           name: str = "own") -> Splits:
    """Any torch data sets of (image, label), torchvision's as they are, as `Splits`.

    Every sample is read once, so a random transform acts once; a DataLoader of such a data set
    goes into `Trainer.fit` as it is. Class names are the data set's `classes`, where it has them.
    Images are PIL images or uint8 (in 0..255), or float tensors: in [0, 1] they are scaled as
    `normalize` says, outside they have been scaled, and stay as they are. valid: samples of `train`
    to hold out, default a tenth; test: default none.

    Raises TypeError or ValueError in one line naming the sample that is something else.
    """
    stores = [gathered(part, image_size) for part in (train, test) if part is not None]
    kinds = [f"{x.dtype} {tuple(x.shape[1:])}" for x, _ in stores]
    if len(set(kinds)) > 1:
        raise ValueError("[data] expected training and test images of one shape and dtype, got "
                         f"{' and '.join(kinds)}")
    labels = {"train": stores[0][1],
              "test": stores[1][1] if test is not None else stores[0][1].new_empty(0)}
    names = getattr(train, "classes", None)
    classes = tuple(map(str, names)) if isinstance(names, (list, tuple)) else None
    count = int(labels["train"].max()) + 1 if classes is None else len(classes)
    for part, found in labels.items():
        if len(found) and int(found.max()) >= count:
            raise ValueError(f"[data] expected in {part} labels below {count}, the training "
                             f"samples' classes, got {int(found.max())}")
    rows = rows_of(labels, None, valid, seed)
    order = torch.cat([rows[part] for part in PARTS])
    images = torch.cat([x for x, _ in stores])
    scaled = images.dtype != torch.uint8 and not (images.min() >= 0 and images.max() <= 1)
    return splits_of(name, images[order], torch.cat(list(labels.values()))[order],
                     [len(rows[part]) for part in PARTS], OFF if scaled else normalize,
                     None, count, classes, {}, None)


def gathered(dataset: Dataset[Any], image_size: int | tuple[int, int] | None = None
             ) -> tuple[Tensor, Tensor]:
    """(images uint8 or float32 (N, C, H, W), labels int64 (N,)) of (image, label) samples.

    An image is a PIL image (grey stays grey, all else becomes RGB), a tensor or array (H, W),
    (C, H, W) or, of an array, (H, W, C); uint8, or floating point, of which all must be finite.

    Raises TypeError or ValueError naming the sample that is something else.
    """
    if not isinstance(dataset, Dataset) and not hasattr(dataset, "__getitem__"):
        raise TypeError(f"[data] expected a torch.utils.data.Dataset of (image, label), got "
                        f"{type(dataset).__name__}")
    images: list[Tensor] = []
    labels: list[int] = []
    for index, sample in enumerate(_samples(dataset)):
        if not isinstance(sample, (tuple, list)) or len(sample) < 2:
            raise TypeError(f"[data] sample {index}: expected (image, label), got "
                            f"{type(sample).__name__}")
        image = _image(index, sample[0])
        images.append(image if image_size is None else resize(image[None], image_size)[0])
        labels.append(_label(index, sample[1]))
    if not images:
        raise ValueError("[data] expected a data set with samples, got none")
    kinds = {(image.dtype, tuple(image.shape)) for image in images}
    shapes = sorted({shape for _, shape in kinds})
    if len(shapes) > 1 and {s[0] for s in shapes} == {1, 3} and len({s[1:] for s in shapes}) == 1:
        images = [image.expand(3, -1, -1) for image in images]
    elif len(kinds) > 1:
        raise ValueError("[data] expected images of one size and dtype, or image_size to resize "
                         f"them to, got {' and '.join(map(str, shapes[:2]))}")
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _samples(dataset: Any) -> Iterator[Any]:
    """In order; a map-style data set need not stop iterating by itself."""
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return (dataset[i] for i in range(len(dataset)))
    return iter(dataset)


def _image(index: int, found: Any) -> Tensor:
    """uint8 or float32 (C, H, W)."""
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(found, pillow.Image):
        if found.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"):
            raise ValueError(f"[data] sample {index}: expected an image of 8 bits a channel in "
                             f"grey or RGB, got mode {found.mode}")
        found = np.array(found.convert("L" if found.mode in ("1", "L", "LA") else "RGB"))
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(
            channels_first(found[None])[0] if found.ndim == 3 else found))
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        came = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"[data] sample {index}: expected a PIL image, a tensor (C, H, W) or an "
                        f"array, got {came}")
    image = found if found.dim() == 3 else found[None]
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"[data] sample {index}: expected an image of uint8 or floating point, got "
                        f"{image.dtype}")
    if image.dtype == torch.uint8:
        return image
    if not image.isfinite().all():
        raise ValueError(f"[data] sample {index}: expected finite numbers, got others")
    return image.to(torch.float32)


def _label(index: int, found: Any) -> int:
    number = found.item() if isinstance(found, (Tensor, np.ndarray, np.generic)) and (
        found.size == 1 if isinstance(found, (np.ndarray, np.generic)) else found.numel() == 1
    ) else found
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise TypeError(f"[data] sample {index}: expected a label that is a whole number from 0, "
                        f"got {found!r}")
    return number
