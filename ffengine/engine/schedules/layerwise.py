"""Layer-wise schedules: a layer sees the whole data set for its epochs before the next one starts.

    stage i:  features of layers 0 .. i-1, frozen: recomputed, kept in RAM or on disk
              every epoch: layer i alone trains on them
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch

from ffengine.data.batches import Loader
from ffengine.engine.batch import Batch, paired
from ffengine.engine.context import StepContext, Turn
from ffengine.engine.inputs import entrance, rows_of
from ffengine.engine.memory.budget import megabytes
from ffengine.engine.memory.store import FeatureStore, choose_store, free_disk
from ffengine.engine.schedules.schedule import Schedule
from ffengine.engine.schedules.training import Budgeted, Training
from ffengine.nn.layers import as_laid_out
from ffengine.nn.network import LocalNet
from ffengine.ops.host import send
from ffengine.typed import typed

Features = Literal["auto", "recompute", "ram", "disk"]


class Layerwise(Schedule):
    """Layers `start`, start + 1, ... train one after the other, then the heads.

    Args:
        start: the first layer that trains; those below were trained before (append layers to a
            trained network and go on).
        stop_at: end training with the first layer whose training accuracy reaches this; the
            layers above are left out of the scores.
        features: where a stage's input is kept; "auto": as the memory budget allows.
    """

    by_stages = True

    @typed("schedule")
    def __init__(self, start: int = 0, stop_at: float | None = None,
                 features: Features = "auto") -> None:
        if features not in ("auto", "recompute", "ram", "disk"):
            raise ValueError("[schedule] features expected auto, recompute, ram or disk, got "
                             f"{features!r}")
        if stop_at is not None and not 0 < stop_at <= 1:
            raise ValueError(f"[schedule] stop_at expected an accuracy in (0, 1], got {stop_at}")
        self.start, self.stop_at, self.features = start, stop_at, features

    def begin(self, net: LocalNet, epochs: int) -> None:
        if not 0 <= self.start < len(net.layers):
            raise ValueError(f"[schedule] layer-wise training expected to start at a layer of 0.."
                             f"{len(net.layers) - 1}, got {self.start}")
        if net.propagate != "stale" and len(net.heads):
            raise ValueError("[schedule] layer-wise training expected propagate=stale, got "
                             f"{net.propagate}: a frozen layer has one set of weights")
        if self.stop_at is not None and len(net.heads):
            raise ValueError("[schedule] stop_at expected a network without heads, which train "
                             f"last, got {len(net.heads)}")
        super().begin(net, epochs)

    @property
    def stages(self) -> int:
        """Layers that train, and one more for the heads."""
        return len(self.net.layers) - self.start + bool(len(self.net.heads))

    @property
    def total(self) -> int:
        return self.epochs * self.stages

    def stage(self, epoch: int) -> int:
        """The layer whose turn it is; the depth of the network: the heads'."""
        return self.start + min(epoch // self.epochs, self.stages - 1)

    def phase(self, epoch: int) -> int:
        return self.stage(epoch)

    def turn(self, epoch: int, iteration: int) -> Turn:
        layer, depth = self.stage(epoch), len(self.net.layers)
        if layer == depth:
            return Turn((), 0, heads=tuple(range(len(self.net.heads))))
        return Turn((layer,), layer + 1, start=layer)

    def rate_epoch(self, epoch: int) -> int:
        return epoch % self.epochs if epoch < self.total else self.epochs

    def active(self, epoch: int) -> list[str]:
        stage = self.stage(epoch)
        prefix = f"layers.{stage}." if stage < len(self.net.layers) else "heads."
        # the first layer's loss trains a learned label channel
        also = "encoding." if stage == 0 else prefix
        return [n for n in super().active(epoch) if n.startswith((prefix, also))]

    def phases(self) -> list[list[str]]:
        return [self.active(stage * self.epochs) for stage in range(self.stages)]

    def epoch_done(self, epoch: int, accuracy: float) -> bool:
        stage = self.stage(epoch)
        if self.stop_at is None or accuracy < self.stop_at or stage >= len(self.net.layers):
            return False
        self.net.set_range(min(self.net.layer_range[0], stage), stage)
        return True

    def loader(self, run: Training, loader: Any, epoch: int) -> Any:
        """What an epoch reads: the loader itself, or its order over stored features."""
        stage = self.stage(epoch)
        if run.iteration == 0 and epoch == (stage - self.start) * self.epochs:
            self.stage_started(run, loader, epoch)
            if stage == self.start and storable(loader):
                self.expect(run.planning, len(loader.image_set), loader.batch_size, loader.shuffle,
                            run.out)
        kept = run.stored
        if kept is not None and kept.stage != stage:
            kept.close()
            run.stored = kept = None
        if kept is not None:
            return kept.over(loader)
        if not storable(loader) or not self.keeps_input(stage, loader.shuffle):
            return loader
        if run.out is not None:
            run.out.mkdir(parents=True, exist_ok=True)
        kind = self.chosen_store(run.planning, len(loader.image_set), loader.batch_size, epoch,
                                 run.out)
        if kind == "recompute":
            return loader
        run.stored = Stored(run, loader, self, stage, kind)
        seen = self.seen_bytes(run.planning, stage, len(loader.image_set), loader.batch_size,
                               loader.shuffle, kind)
        run.planning.keeps(epoch, sum(t.nbytes for t in run.stored.tensors()), seen)
        return run.stored.over(loader)

    def expect(self, planning: Budgeted, samples: int, batch_size: int, shuffle: bool,
               folder: Path | None = None) -> None:
        if folder is not None:  # which the run makes when it starts
            folder = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
        for stage in range(self.start, self.start + self.stages):
            epoch = (stage - self.start) * self.epochs
            if self.keeps_input(stage, shuffle) and (
                    self.chosen_store(planning, samples, batch_size, epoch, folder) == "ram"):
                below = (1 + self.pairs) * samples * planning.settings.weight_dtype.itemsize
                planning.keeps(epoch, samples * self.row_bytes(planning, stage) + below,
                               self.seen_bytes(planning, stage, samples, batch_size, shuffle))

    def row_bytes(self, planning: Budgeted, stage: int) -> int:
        """Of what a stage sees of a sample, of both halves where there are."""
        return (1 + self.pairs) * math.prod(
            self.stored_shape(stage)) * planning.settings.dtype.itemsize

    def seen_bytes(self, planning: Budgeted, stage: int, samples: int, batch_size: int,
                   shuffle: bool, kind: Features = "ram") -> int:
        """Of what a stage sees of a sample, as far as a batch is no copy of the store's rows: on a
        CPU, in the set's order, of pairs the whole set at once."""
        neighbours = not shuffle and (not self.pairs or batch_size >= samples)
        return self.row_bytes(planning, stage) * (
            neighbours and kind == "ram" and planning.device == "cpu")

    def chosen_store(self, planning: Budgeted, samples: int, batch_size: int, epoch: int,
                     folder: Path | None) -> Features:
        """Where the stage's input is kept: what the caller asked for, or the budget allows."""
        stage, kind = self.stage(epoch), self.features
        if kind != "auto":
            return kind
        row_bytes = self.row_bytes(planning, stage)
        room = planning.room(batch_size, epoch)
        kind = choose_store(samples, row_bytes, room, free_disk(folder))
        if room is not None and kind != "ram":
            where = "on disk" if kind == "disk" else "made again every epoch"
            planning.give_up(f"what layer {stage} sees is {where} instead of in RAM: saves "
                             f"{megabytes(samples * row_bytes)}")
        return kind

    def stage_started(self, run: Training, loader: Any, epoch: int) -> None:
        """Told before the first epoch of a stage."""

    def stored_rows(self, run: Training, stage: int,
                    batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the stage's input for all rows of a batch, the goodness summed below it)."""
        net = run.net
        ctx = StepContext(net, run.optimizer, batch.y, rows_of(net, batch.x.shape[0]),
                          run.settings.seed, 0, run.backend)
        rows = entrance(ctx, batch, run.dtype)
        last: deque[torch.Tensor] = deque(maxlen=1)
        goodness = net.run(rows, end=stage - 1, backend=run.backend, features=last)
        below = torch.stack(goodness).sum(0)[:, 0] if goodness[0].shape[1] == 1 else None
        return last[0], below

    @property
    def pairs(self) -> bool:
        return paired(self.net)

    def keeps_input(self, stage: int, shuffle: bool) -> bool:
        """What the stage sees can be kept: no shortcut crosses, and every sample keeps its
        negative."""
        net = self.net
        return (self.features != "recompute" and 0 < stage < len(net.layers)
                and all(w.join == "none" and not w.branch for w in net.wires)
                and (not self.pairs or net.negatives == "inverse" or (
                    net.negatives == "permuted" and not shuffle)))


def storable(loader: object) -> TypeGuard[Loader]:
    """Samples are the same in every epoch: those of our loader without augmentation."""
    return isinstance(loader, Loader) and loader.augment is None


class Stored:
    """A stage's input for every sample of a set; positive and negative halves where there are."""

    def __init__(self, run: Training, loader: Loader, schedule: Layerwise, stage: int,
                 kind: str) -> None:
        self.stage, pairs, count = stage, schedule.pairs, len(loader.image_set)
        shape = schedule.stored_shape(stage)
        #: Of all samples, of pairs all positive rows and then all negative ones.
        self.store = FeatureStore.create(kind, (1 + pairs) * count, shape, run.dtype, run.out,
                                         channels_last=len(shape) == 3)
        #: Sum over the layers below of their goodness, a row each half (collaborative FF).
        self.below = torch.zeros(1 + pairs, count, dtype=run.settings.weight_dtype,
                                 device=run.device)
        plain = Loader(loader.image_set, batch_size=loader.batch_size, shuffle=False, seed=0,
                       epoch=0, drop_last=False, device=loader.device, on_device=False,
                       prefetch=False, augment=None)
        start = 0
        with torch.no_grad():
            for x, y in plain:
                rows, below = schedule.stored_rows(run, stage, Batch(x, y))
                n = x.shape[0]
                for half in range(1 + pairs):
                    mine = slice(half * n, (half + 1) * n)
                    self.store.write(half * count + start, rows[mine].to(run.dtype))
                    if below is not None:
                        self.below[half, start:start + n] = below[mine]
                start += n

    def over(self, loader: Loader) -> StoredLoader:
        return StoredLoader(self, loader)

    def tensors(self) -> list[torch.Tensor]:
        """What lies in RAM, for the meter."""
        return [self.below, *self.store.tensors()]

    def close(self) -> None:
        self.store.close()


class StoredLoader:
    """A loader's order over stored features instead of its samples."""

    def __init__(self, stored: Stored, loader: Loader) -> None:
        self.stored, self.loader = stored, loader

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        labels, device = self.loader.image_set.labels, self.loader.device
        for rows in self.loader.indices(start):
            halves, count = self.stored.below.shape
            both = torch.cat([rows + half * count for half in range(halves)])
            features = send(as_laid_out(self.stored.store.look(both)), device)
            below = self.stored.below.flatten()[send(both, self.stored.below.device)]
            yield Batch(features, send(labels[rows], device), features=features, below=below)
