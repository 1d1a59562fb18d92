"""Rows of a batch: a tile's, of one half or of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Rows start..stop; of paired halves those of both, positives first."""

    start: int
    stop: int
    half: int = 0  # rows of a half; 0: no halves

    @property
    def count(self) -> int:
        """How many there are."""
        return (self.stop - self.start) * (2 if self.half else 1)

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """The tile's rows of a map; a view unless they lie apart."""
        if not self.half:
            return t[self.start:self.stop]
        if self.stop - self.start == self.half:
            return t
        return torch.cat([t[self.start:self.stop], t[self.half + self.start:self.half + self.stop]])

    def parts(self, n: int) -> list[tuple[bool, slice]]:
        """Where they lie in n samples' pairs, whose negative rows follow all positive ones:
        (of the negatives, samples)."""
        if self.half:
            both = slice(self.start, self.stop)
            return [(False, both), (True, both)]
        cut = min(max(n, self.start), self.stop)
        found = [(False, slice(self.start, cut)), (True, slice(cut - n, self.stop - n))]
        return [(negative, at) for negative, at in found if at.stop > at.start]

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write the tile's rows into those of a map."""
        starts = (0, self.half) if self.half else (0,)
        for at, rows in zip(starts, torch.split(part, self.stop - self.start), strict=True):
            whole[at + self.start:at + self.stop].copy_(rows)


def empty(like: torch.Tensor, rows: int, shape: tuple[int, ...],
          dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows of maps, laid out, on the device of another and of its dtype unless told."""
    layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    return torch.empty((rows, *shape), dtype=dtype or like.dtype, device=like.device,
                       memory_format=layout)
