"""`ImageSet`: images and labels in memory; `Splits`: the three of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Indices = Tensor | Sequence[int] | slice


@dataclass(eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images with labels, normalised when they are read.

    images: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].
    labels: (N,) int64.
    mean, std: one number per channel, of images in [0, 1].
    coarse_labels: (N,) int64 superclasses, or None.

    Raises TypeError for other dtypes, ValueError for shapes that do not fit together.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    coarse_labels: Tensor | None = None
    _constants: dict[tuple[torch.device, bool], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"[ImageSet] images must be uint8 or float32, got {self.images.dtype}")
        if self.images.dim() != 4:
            raise ValueError(
                f"[ImageSet] images must be (N, C, H, W), got {tuple(self.images.shape)}"
            )
        for name, labels in (("labels", self.labels), ("coarse_labels", self.coarse_labels)):
            if labels is None:
                continue
            if labels.dtype != torch.int64:
                raise TypeError(f"[ImageSet] {name} must be int64, got {labels.dtype}")
            if labels.shape != self.images.shape[:1]:
                raise ValueError(
                    f"[ImageSet] {name} must be ({len(self.images)},), got {tuple(labels.shape)}"
                )
        channels = self.images.shape[1]
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise ValueError(
                f"[ImageSet] mean and std need {channels} numbers, std above 0, "
                f"got {self.mean} and {self.std}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def device(self) -> torch.device:
        """Where images and labels are."""
        return self.images.device

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalised float32 image (C, H, W) and its label; IndexError past the ends."""
        # Checked here: on a CUDA device a bad index would be an assert that kills the context.
        if not -len(self) <= index < len(self):
            raise IndexError(f"[ImageSet] index must be in 0..{len(self) - 1}, got {index}")
        index %= len(self)
        x, y = self.batch(slice(index, index + 1))
        return x[0], int(y[0])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """What a torch DataLoader asks for: one gather a batch instead of one per sample."""
        x, y = self.batch(indices)
        return list(zip(x.unbind(0), y.tolist(), strict=True))

    def gather(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Stored images and labels at `indices`, on the set's device, not normalised.

        A slice gives views of the set; anything else gives copies.
        """
        if isinstance(indices, slice):
            return self.images[indices], self.labels[indices]
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        return self.images[rows], self.labels[rows]

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """(x float32 (B, C, H, W) normalised, y int64 (B,)) at `indices`, never views of the set.

        Raises IndexError for an index out of range (on the CPU).
        """
        images, labels = self.gather(indices)
        return self.normalise(images), labels.clone() if isinstance(indices, slice) else labels

    def normalise(self, images: Tensor) -> Tensor:
        """(image - mean) / std as new float32; uint8 is first taken from 0..255 to [0, 1]."""
        scale, shift = self._scale_shift(images.device, images.dtype == torch.uint8)
        return (images * scale).sub_(shift)

    def _scale_shift(self, device: torch.device, integer: bool) -> tuple[Tensor, Tensor]:
        # Kept per device: building them anew would copy from the host for every batch.
        key = (device, integer)
        if key not in self._constants:
            unit = 255.0 if integer else 1.0
            scale, shift = (
                torch.tensor(values, dtype=torch.float32, device=device)
                for values in (
                    [1.0 / (unit * s) for s in self.std],
                    [m / s for m, s in zip(self.mean, self.std, strict=True)],
                )
            )
            self._constants[key] = (scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1))
        return self._constants[key]

    def subset(self, indices: Indices) -> ImageSet:
        """A new set of the samples at `indices`."""
        images, labels = self.gather(indices)
        coarse = self.coarse_labels
        if coarse is not None:
            rows = indices if isinstance(indices, slice) else torch.as_tensor(indices)
            coarse = coarse[rows]
        return ImageSet(images, labels, self.mean, self.std, coarse)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on `device`; itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        coarse = None if self.coarse_labels is None else self.coarse_labels.to(device)
        return ImageSet(self.images.to(device), self.labels.to(device), self.mean, self.std, coarse)


@dataclass(frozen=True)
class Splits:
    """A data set ready for training; `shape` is (C, H, W).

    classes: names in the order of labels, where they are known. label: what results on it are
    called; "" is its name. settled: options of one's own data as they were resolved here, with
    which the same, or another, data set is read alike.
    """

    name: str
    train: ImageSet
    valid: ImageSet
    test: ImageSet
    num_classes: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...] | None = None
    label: str = ""
    settled: Mapping[str, Any] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """The name that results are told under."""
        return self.label or self.name

    @property
    def fine_to_coarse(self) -> Tensor | None:
        """(num_classes,) int64: the superclass of each class; None without coarse labels.

        A class that has no training sample gets -1.
        """
        coarse = self.train.coarse_labels
        if coarse is None:
            return None
        table = torch.full((self.num_classes,), -1, dtype=torch.int64, device=coarse.device)
        table[self.train.labels] = coarse
        return table
