"""`loader`: deterministic, vectorised batches of an `ImageSet`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ffengine.data.image_set import ImageSet
from ffengine.data.seeding import generator
from ffengine.typed import typed

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@typed("data")
def loader(
    image_set: ImageSet,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    drop_last: bool = False,
    device: torch.device | str | None = None,
    on_device: bool = False,
    prefetch: bool = True,
    augment: Augment | None = None,
) -> Loader:
    """An iterable of (x float32 (B, C, H, W), y int64 (B,)), normalised, on `device`.

    shuffle: the order is a function of (seed, epoch) alone, so a resumed run sees the same one;
        `set_epoch` chooses the epoch, iterating does not advance it.
    device: default is where the set is.
    on_device: move the whole set there first; nothing is copied from the host per batch.
    prefetch: on a CUDA device, without on_device, prepare the next batch on a side stream while
        the current one is used.
    augment: ``augment(x, generator)`` on images in [0, 1] before they are normalised, on `device`;
        its generator is a function of (seed, epoch, batch index).

    Raises TypeError or ValueError for a batch_size that is not a positive int.
    """
    return Loader(
        image_set,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        epoch=epoch,
        drop_last=drop_last,
        device=device,
        on_device=on_device,
        prefetch=prefetch,
        augment=augment,
    )


class Loader:
    """What `loader` makes; see there."""

    def __init__(
        self,
        image_set: ImageSet,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        epoch: int,
        drop_last: bool,
        device: torch.device | str | None,
        on_device: bool,
        prefetch: bool,
        augment: Augment | None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"[loader] batch_size must be an int, got {batch_size!r}")
        if batch_size < 1:
            raise ValueError(f"[loader] batch_size must be at least 1, got {batch_size}")
        self.device = image_set.device if device is None else torch.device(device)
        self.image_set = image_set.to(self.device) if on_device else image_set
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch
        self.drop_last = drop_last
        self.prefetch = prefetch
        self.augment = augment

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.image_set), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that iterations started from now on belong to."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `start` on: how a run resumes within an epoch."""
        source, target = self.image_set.device, self.device
        if target.type == "cuda" and source.type == "cpu" and self.prefetch:
            return self._prefetched(start, self.epoch)
        return self._plain(start, self.epoch)

    def order(self, epoch: int) -> Tensor | None:
        """(N,) int64 on the set's device: the samples' order; None when it is that of the set."""
        drawn = self._drawn(epoch)
        return None if drawn is None else drawn.to(self.image_set.device)

    def _drawn(self, epoch: int) -> Tensor | None:
        """`order`, on the CPU: drawn there whatever the device, so that all see the same one."""
        if not self.shuffle:
            return None
        return torch.randperm(len(self.image_set), device="cpu",
                              generator=generator("order", self.seed, epoch))

    def indices(self, start: int = 0) -> Iterator[Tensor]:
        """The rows of the set that `batches(start)` reads: (B,) int64 on the CPU, batch by batch.

        For reading something else of the same samples in the same order, such as stored features;
        an augmentation has no part in it.
        """
        return self._indices(start, self.epoch)

    def _indices(self, start: int, epoch: int) -> Iterator[Tensor]:
        order = self._drawn(epoch)
        if order is None:
            order = torch.arange(len(self.image_set), device="cpu")
        for index in range(start, len(self)):
            yield order[index * self.batch_size : (index + 1) * self.batch_size]

    def _rows(self, order: Tensor | None, index: int) -> Tensor | slice:
        span = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return span if order is None else order[span]

    def _finish(self, images: Tensor, epoch: int, index: int) -> Tensor:
        """Stored images, already on the device -> augmented and normalised float32."""
        if self.augment is not None:
            # A copy in either case: an augmentation that writes in place must not reach the set.
            unit = images / 255 if images.dtype == torch.uint8 else images.clone()
            images = self.augment(unit, generator("augment", self.seed, epoch, index))
        return self.image_set.normalise(images)

    def _plain(self, start: int, epoch: int) -> Iterator[Batch]:
        order = self.order(epoch)
        for index in range(start, len(self)):
            rows = self._rows(order, index)
            images, labels = self.image_set.gather(rows)
            if isinstance(rows, slice):
                labels = labels.clone()  # else a caller's in-place change would reach the set
            yield self._finish(images.to(self.device), epoch, index), labels.to(self.device)

    def _prefetched(self, start: int, epoch: int) -> Iterator[Batch]:
        """Batch i+1 is gathered, copied and finished on a side stream before batch i is given out.

        The images travel as stored (uint8: a quarter of the bytes) from pinned memory.
        """
        order = self.order(epoch)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        ready: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
        for index in range(start, len(self)):
            images, labels = self._pinned(self._rows(order, index))
            with torch.cuda.stream(side):
                x = self._finish(images.to(self.device, non_blocking=True), epoch, index)
                y = labels.to(self.device, non_blocking=True)
                done = side.record_event()
            if ready is not None:
                yield self._handed_over(*ready)
            ready = (x, y, done)
        if ready is not None:
            yield self._handed_over(*ready)

    def _pinned(self, rows: Tensor | slice) -> Batch:
        images, labels = self.image_set.gather(rows)
        return images.pin_memory(), labels.pin_memory()

    def _handed_over(self, x: Tensor, y: Tensor, done: torch.cuda.Event) -> Batch:
        """The consumer's stream waits for the batch; the allocator learns that it uses it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        x.record_stream(current)
        y.record_stream(current)
        return x, y
