"""A pipeline: every process trains consecutive layers of one network, by the trainer's own loop.

    trainer = PipelineTrainer(net, Pipeline(stages=2), batch_size=64)    # on every rank
    trainer.fit(train_loader, valid_loader)                              # rank 0's are read

A local update waits for no backward pass, so layer l trains on batch t beside layer l - 1 on batch
t + 1 (DeeperForward, app. G and fig. 4). Every layer sees the features that it sees in one process:
weights are the same, bit for bit, where the tiles are.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch

from ffengine.engine.batch import Batch, batches_from
from ffengine.engine.context import StepContext
from ffengine.engine.memory.budget import parse_bytes
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planning import Planning
from ffengine.engine.memory.plans import Job, Memory
from ffengine.engine.optim import floor_bytes, outline
from ffengine.engine.parallel import balance, ranks, sharing
from ffengine.engine.parallel.cutting import Piece, piece_of
from ffengine.engine.parallel.links import CLOSE, EPOCH, STOP, Form, Inlet, Message, Outlet
from ffengine.engine.parallel.pipeline import Pipeline
from ffengine.engine.parallel.watch import GRACE, StageFailed, Watch
from ffengine.engine.run import checkpoint, saving
from ffengine.engine.run.callbacks import Callback
from ffengine.engine.run.history import EpochSums, History
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.schedule import Schedule, of
from ffengine.engine.trainer import DEFAULT, Trainer
from ffengine.nn.network import LocalNet


class PipelineTrainer(Trainer):
    """The trainer of one stage; every rank makes one, of the same network and options.

    Rank 0 has the first stage. It reads the data, and between epochs it has the whole network: it
    evaluates, keeps history and checkpoints, and shows progress. Within an epoch every rank holds
    its own layers' parameters and states only.

    Args:
        pipeline: stages, queues, timeout.
        memory_budget: of this rank's device; ranks may have different ones. Plans are made for it,
            bits are not given up: states and weights default to fp32.
        memory: as Trainer's, without micro_batch.
        options: as Trainer's.

    Raises:
        ValueError: a network that cannot be cut, cuts that fit no budget, other ranks that do not
            come or have other code, options or weights.
    """

    def __init__(self, net: LocalNet, pipeline: Pipeline, *, schedule: Schedule | None = None,
                 memory_budget: str | int | None = None, batch_size: int | None = None,
                 device: torch.device | str | None = None, recipe: Recipe | None = None,
                 memory: Memory = DEFAULT, progress: bool = True, **options: Any) -> None:
        pipeline.check(net, schedule)
        if memory.micro_batch is not None:
            raise ValueError("[pipeline] expected whole batches, which travel, got micro_batch="
                             f"{memory.micro_batch}")
        plan, costs = memory.plan, memory.costs
        device = own_device(torch.device(device) if device else next(net.parameters()).device)
        self.pipeline = pipeline
        self.ranks = ranks.join(pipeline.stages, device, pipeline.timeout)
        schedule = copy.copy(of(net, schedule))
        schedule.piece = Piece(range(0))  # no states before it is known whose they are
        recipe = recipe or net.recipe or Recipe()
        if batch_size is not None:
            recipe = replace(recipe, batch_size=batch_size)
        super().__init__(net, schedule=schedule, device=device, recipe=recipe, memory=replace(
            memory, states=memory.states or "fp32", weights=memory.weights or "fp32", plan=None),
            progress=progress and self.ranks.rank == 0, **options)
        self.budget = parse_bytes(memory_budget)
        self.ranks.agree(ranks.digest(
            self.net, options=[asdict(self.settings), asdict(pipeline)],
            network=checkpoint.architecture(self.net), schedule=type(schedule).__name__))
        #: The layers of every stage, and predicted seconds of their turns on a batch.
        self.stages, self.seconds = self._dealt(plan, costs)
        self.piece = piece_of(self.net, self.stages[self.ranks.rank], pipeline.queue)
        self._settle(plan, costs)
        #: Of every rank at an epoch's end, on rank 0: peak of a step, and resident bytes.
        self.memory: list[tuple[int, int]] = []
        self._watch: Watch | None = None
        self._inlet: Inlet | None = None
        self._outlet: Outlet | None = None
        self._whole, self._saves, self._until = True, False, 0

    def _dealt(self, plan: Plan | None, costs: str) -> tuple[list[range], list[float]]:
        """Whose layers are whose, the same on every rank; ValueError where nothing fits."""
        size, job = self.settings.batch_size, self._job(None)
        self._network = Planning(job, plan=plan, costs=costs)
        self._network.begin(size, fixed=True)
        planner, seconds = self._network.planner(size), None
        for turn in range(self.ranks.size):  # what is timed beside others' work is timed wrongly
            if turn == self.ranks.rank:
                seconds = balance.layer_seconds(
                    job, size, planner, self._network.plans(size).largest,
                    measure=costs == "measured" and self.pipeline.layers is None)
            self.ranks.everyone()
        found, wrong = self.ranks.collect((self.budget, seconds)), None
        cuts: list[range] | None = None
        if found is not None:
            budgets, times = zip(*found, strict=True)
            cuts = balance.cuts(job, planner, budgets, times, self.pipeline)
            wrong = None if cuts else balance.unfit(job, planner, budgets, self.pipeline)
        self.ranks.refuse(wrong)
        told: tuple[list[range], list[float]] = self.ranks.tell(cuts and (cuts, [
            sum(seconds[i] for i in layers)
            for layers, (_, seconds) in zip(cuts, found or (), strict=True)]))
        return told

    def _job(self, piece: Piece | None) -> Job:
        """What is planned for: the network without memory, of which a rank holds a part only."""
        schedule = self.schedule.of(piece)
        schedule.net = outline(self.net)
        return Job(schedule.net, schedule, self.settings, self.device.type, self.backend)

    def _settle(self, plan: Plan | None, costs: str) -> None:
        """Plan and states of this rank's layers alone."""
        self.schedule.piece = self.piece
        self.schedule.begin(self.net, self.settings.epochs)  # programs are the piece's from here
        self.optimizer.activate(self.schedule.active(self.epoch))
        self.planning = Planning(self._job(self.piece), self.budget, costs=costs)
        if self.budget is None or plan is not None:
            self.planning.follow(self._network)
        self.planning.begin(self.settings.batch_size, fixed=True)
        #: Every stage's, on rank 0.
        self.plans = self.ranks.collect(self.planning.plans(self.settings.batch_size).largest)

    @property
    def first(self) -> bool:
        """This is rank 0: it reads data, evaluates, and writes the run's files."""
        return self.ranks.rank == 0

    @property
    def floor_bytes(self) -> int:
        """Parameters and optimizer states of this rank's layers."""
        return floor_bytes(self.net, self.settings.optim(), self.schedule.phases(),
                           self.schedule.owners(), holds=self.piece.holds)

    def stage(self, rank: int) -> str:
        """A rank's stage, in words."""
        layers = self.stages[rank]
        return f"stage {rank} (layers {layers.start}-{layers.stop - 1})"

    def write_into(self, out: str | os.PathLike[str] | None) -> None:
        """Keep history and checkpoints in this run folder; rank 0's word counts."""
        super().write_into(out if self.first else None)

    def fit(self, train_loader: Iterable[Any] = (), valid_loader: Iterable[Any] | None = None, *,
            until: int | None = None, callbacks: Sequence[Callback] = ()) -> History:
        """As Trainer's, on all ranks; rank 0's loaders are read, and its Ctrl-C counts.

        Raises:
            StageFailed: a rank died, hung or failed; on every rank, naming it.
        """
        self._until = self.epochs if until is None else until
        try:
            return self._watched(train_loader, valid_loader, until, callbacks)
        except StageFailed:
            self.ranks.abort()
            for side in (self._outlet, self._inlet):
                if side is not None:
                    side.join(GRACE)
            self._outlet = self._inlet = None
            ranks.leave()
            raise

    def _watched(self, train_loader: Iterable[Any], valid_loader: Iterable[Any] | None,
                 until: int | None, callbacks: Sequence[Callback]) -> History:
        with Watch(self.ranks, self.stage, self.pipeline.timeout) as watch:
            self._watch = watch
            self._saves = self._together(lambda: self.ranks.tell(self.out is not None))
            self._open(watch)
            valid = Beating(self, valid_loader) if self.first and valid_loader is not None else None
            history = super().fit(train_loader if self.first else (), valid, until=until,
                                  callbacks=callbacks)
            self._close()
        self._watch = None
        return history

    def _open(self, watch: Watch) -> None:
        rank, groups = self.ranks.rank, self.ranks.groups
        form = Form(self.net, self.dtype, self.device)
        if rank > 0:
            self._inlet = Inlet(rank - 1, groups[rank % 2], form, watch, self.pipeline.queue)
        if rank + 1 < self.ranks.size:
            self._outlet = Outlet(rank + 1, groups[(rank + 1) % 2], form, watch)

    def _close(self) -> None:
        if self._outlet is not None:
            self._outlet.put(Message(CLOSE))
        for side in (self._outlet, self._inlet):
            if side is not None:
                side.join()
        self._outlet = self._inlet = None

    def _together(self, collective: Any) -> Any:
        """Do what all ranks do."""
        return collective() if self._watch is None else self._watch.call(collective, "other ranks")

    def beat(self) -> None:
        """This rank makes progress."""
        if self._watch is not None:
            self._watch.beat()

    def _context(self, item: Batch) -> StepContext:
        self.beat()
        ctx, outlet, y = super()._context(item), self._outlet, item.y
        if outlet is not None:
            ctx.send = lambda maps, goodness: outlet.hand_on(maps, goodness, y)
        return ctx

    def _stage(self, loader: Iterable[Any]) -> Iterable[Any]:
        sharing.shed(self.net, self.piece)
        self._whole = False
        return Reading(self, super()._stage(loader))

    def meet(self) -> None:
        """An epoch's batches are through all stages: rank 0 has all weights, losses and hits."""
        mine = sharing.weights_of(self.net, self.piece) if not self.first else {}
        found = self._together(lambda: self.ranks.collect(
            (mine, self.sums.export(), (self.peak_bytes, sharing.resident_bytes()))))
        self._whole = True
        if found is not None:
            for weights, _, _ in found:
                sharing.fill(self.net, weights)
            self.sums = sharing.sums_of([sums for _, sums, _ in found])
            self.memory = [memory for _, _, memory in found]
            self.peak_bytes = max(peak for peak, _ in self.memory)

    def stopped(self, signal: int = SIGINT) -> None:
        """The first stage was interrupted; every stage stops at the same batch."""
        if self._outlet is not None:
            self._outlet.put(Message(STOP))
        self.meet()
        if self._saves and not self.first:
            self.save()
        super()._interrupted(signal)

    def _interrupted(self, signal: int) -> None:
        if self.first and self.epoch < self._until and not self.ended:
            self.stopped(signal)

    def evaluate(self, loader: Iterable[Any]) -> float:
        """Accuracy (0 to 1) of the class scores on a loader of (x, y); on rank 0, outside of
        epochs."""
        return super().evaluate(Beating(self, loader))

    def _finish_epoch(self, *seen: Any) -> None:
        if self.first:
            super()._finish_epoch(*seen)
        else:
            self.epoch, self.iteration, self.sums = self.epoch + 1, 0, EpochSums()
            self.optimizer.activate(self.schedule.active(self.epoch))
            if self._saves:
                self.save()
        layer_range, self.ended = self._together(
            lambda: self.ranks.tell((self.net.layer_range, self.ended)))
        self.net.set_range(*layer_range)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint as one process would, atomically; all ranks call it, rank 0 writes."""
        saving.check_finite(self)
        if not self._whole:
            self.meet()
        states, values = self.optimizer.export_state()
        mine = {} if self.first else {name: t.cpu() for name, t in states.items()}
        found = self._together(lambda: self.ranks.collect(
            (mine, values["steps"], self.planning.export())))
        target = Path(path) if path is not None else Path(self.out or "") / checkpoint.LATEST
        if found is not None:
            tensors, meta = saving.tensors(self), saving.description(self)
            for others, steps, _ in found:
                tensors |= {f"optimizer.{name}": t for name, t in others.items()}
                meta["optimizer"]["steps"] |= steps
            meta["plan"] = sharing.plan_of([plan for *_, plan in found], self.stages)
            checkpoint.save(target, tensors, meta)
        return target

    def resume(self, run: str | os.PathLike[str]) -> None:
        """Go on where a checkpoint of any number of stages stands, bit for bit; before `fit`, on
        every rank, each of which reads the file."""
        found = checkpoint.load(run)
        saving.restore(self, sharing.part(found, self.piece))
        last = self.ranks.rank == self.ranks.size - 1
        self.sums = sharing.share(self.sums, self.piece.layers, last=last)


class Beating:
    """A loader, every batch of which is progress."""

    def __init__(self, trainer: PipelineTrainer, loader: Iterable[Any]) -> None:
        self.trainer, self.loader = trainer, loader

    def __iter__(self) -> Iterator[Any]:
        for item in self.loader:
            self.trainer.beat()
            yield item


class Reading:
    """An epoch's batches on a rank: a loader's on the first, else the stage's before; at their end
    the ranks meet."""

    def __init__(self, trainer: PipelineTrainer, loader: Iterable[Any]) -> None:
        self.trainer, self.loader, self.epoch = trainer, loader, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is read next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return self.batches(0)

    def batches(self, start: int) -> Iterator[Any]:
        """From number `start` on; later stages are sent no others."""
        trainer = self.trainer
        if trainer._inlet is None:
            yield from batches_from(self.loader, self.epoch, start)
        else:
            yield from trainer._inlet.batches(trainer.stopped)
        if trainer._outlet is not None:
            trainer._outlet.put(Message(EPOCH))
        trainer.meet()


def own_device(device: torch.device) -> torch.device:
    """A GPU of this rank's own, where just any was asked for."""
    if device.type != "cuda" or device.index is not None:
        return device
    mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(mine)
    return mine
