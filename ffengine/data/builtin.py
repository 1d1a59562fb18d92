"""The two data sets that need no file: `digits` and `synthetic`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ffengine.data.split import stratified
from ffengine.needs import need

# Of the 1257 training images of the fixed split below, in [0, 1] (float64, rounded).
DIGITS_MEAN = (0.3060,)
DIGITS_STD = (0.3765,)
_DIGITS_TEST, _DIGITS_VALID = 360, 180


def digits() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(images float32 (1797, 1, 8, 8) in [0, 1], labels int64, split name -> indices).

    The split is 1257 / 180 / 360, stratified, and always the same. ImportError without
    scikit-learn, which has them.
    """
    bundle = need("sklearn.datasets", "[data] digits").load_digits()
    # Pixels are the integers 0..16, so sixteenths are exact in float32 and uint8 would not be.
    images = torch.from_numpy(bundle.images).to(torch.float32).div_(16).unsqueeze(1)
    labels = torch.from_numpy(bundle.target).to(torch.int64)
    rest, test = stratified(labels, _DIGITS_TEST, seed=0)
    kept, held = stratified(labels[rest], _DIGITS_VALID, seed=1)
    return images, labels, {"train": rest[kept], "valid": rest[held], "test": test}


def synthetic(
    *, shape: tuple[int, int, int], num_classes: int, counts: tuple[int, int, int], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """[(images uint8 (N, C, H, W), labels int64 (N,))] for each N of `counts`.

    A class is a smooth pattern; a sample is its pattern at a random strength plus pixel noise, so
    a small network learns it and none is born knowing it. Classes are balanced to within one.
    """
    random = np.random.RandomState(seed)
    channels, height, width = shape
    coarse = random.standard_normal((num_classes, channels, min(4, height), min(4, width)))
    patterns = F.interpolate(
        torch.from_numpy(coarse), size=(height, width), mode="bilinear", align_corners=False
    ).numpy()
    made = []
    for count in counts:
        labels = random.permutation(np.arange(count) % num_classes)
        strength = random.uniform(0.5, 1.5, size=(count, 1, 1, 1))
        noise = random.standard_normal((count, *shape))
        values = 0.5 + 0.12 * strength * patterns[labels] + 0.12 * noise
        pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
        made.append((torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))))
    return made
