"""The trainer: an ordinary loop over any DataLoader, around the engine's step.

`step` trains on one batch; `fit` adds epochs, validation, history, checkpoints and callbacks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ffengine.engine import micro
from ffengine.engine.admission import admitted, check_losses
from ffengine.engine.ambient import left_outside
from ffengine.engine.batch import Batch, as_batch, batches_from, checked, label_count
from ffengine.engine.capture import CapturedStep
from ffengine.engine.clock import clock_of
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.denormals import flushed
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.budget import parse_bytes
from ffengine.engine.memory.limit import AllocatorLimit, enforced, limit_for
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planning import Planning
from ffengine.engine.memory.plans import Job, Memory
from ffengine.engine.optim import floor_bytes, halved_weights, optimizer_of, round_weights
from ffengine.engine.run import checkpoint, evaluation, saving
from ffengine.engine.run.arguments import with_old_keywords
from ffengine.engine.run.callbacks import Callback, Callbacks
from ffengine.engine.run.history import EpochSums, History, Row, mean
from ffengine.engine.run.overtraining import Overtraining
from ffengine.engine.run.process import device_for
from ffengine.engine.run.progress import Progress
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.run.settings import LearningRate, SchedulerFactory, Settings
from ffengine.engine.run.stopping import FiniteCheck, Interrupts
from ffengine.engine.schedules.schedule import Schedule, of
from ffengine.nn.network import LocalNet
from ffengine.ops import backends, product_rule
from ffengine.typed import typed

DEFAULT = Memory()


class Trainer:
    """Trains a network by its local losses; see `step` and `fit`.

    Args:
        net: the network, moved to `device` and to the weights' dtype.
        epochs, lr: where absent, the recipe's. The rate falls from lr to lr_min on a cosine, per
            epoch; a changed lr keeps their ratio.
        batch_size: lets the plan be made, and a budget refused, before the first batch.
        precision: fp64 (reference only) | fp32 | bf16 | fp16; weights stay fp32 below fp64.
        memory_budget: "440MB", "256MiB" or bytes that a training step may hold at once. The
            fastest plan that fits is taken, by measured costs; with batch_size, and neither states
            nor weights given, fewer bits where none fits (precision_fallback.py). On a GPU it
            is the allocator's limit too (limit.py).
        backend: of the ops; "auto" picks what is fastest here.
        device: default is where the net is.
        seed: of what training draws: dropout, negatives, roundings of bf16 and 8-bit numbers. First
            weights are of `torch.manual_seed` before the network is made, the order of samples of
            the loader (`ff.data.loader(seed=)`).
        out: run folder for history and checkpoints, without a run or with the one that `resume`
            then takes; None writes nothing.
        progress: bar and one line an epoch on standard error.
        recipe: optimizer, weight decay and all else; default is the one that came with the net.
        memory: precisions of states and weights, micro-batches, how plans are ranked.
        schedule: whose turn it is; default is the network's own, else every layer on every batch.
        scheduler: factory of a torch.optim.lr_scheduler in place of the cosine, stepped per epoch.

    Attributes:
        sip: select the layer range on the validation loader after each epoch; by default in
            networks that leave it open (net.selects_range).
        notes: plain values kept in checkpoints as they are, e.g. the data set.
    """

    @with_old_keywords
    @typed("trainer")
    def __init__(self, net: LocalNet, *, epochs: int | None = None, lr: float | None = None,
                 batch_size: int | None = None, precision: str = "fp32",
                 memory_budget: str | int | None = None, backend: str = "auto",
                 device: torch.device | str | None = None, seed: int = 0,
                 out: str | os.PathLike[str] | None = None, progress: bool = True,
                 recipe: Recipe | None = None, memory: Memory = DEFAULT,
                 schedule: Schedule | None = None,
                 scheduler: SchedulerFactory | None = None) -> None:
        recipe = recipe or net.recipe or Recipe()
        self.settings = Settings.resolve(
            recipe, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed, precision=precision,
            states=memory.states or "fp32", weights=memory.weights or "fp32")
        self.budget = parse_bytes(memory_budget)
        self.device = device_for(net, device)
        self.dtype = self.settings.dtype
        self.backend = backend
        backends.resolve("trainer", backend, self.device.type, self.dtype)
        self.net = net.to(device=self.device, dtype=self.settings.weight_dtype)
        if self.settings.weights == "bf16":
            round_weights(self.net)
        check_losses(self.net)
        self.schedule = of(self.net, schedule)
        self.schedule.begin(self.net, self.settings.epochs)
        if self.budget is not None and not self.schedule.planned:
            raise ValueError("[trainer] memory_budget expected layer-local training, got a network "
                             "trained by one loss, whose memory no plan describes")
        self.micro_batch = memory.micro_batch
        if self.micro_batch is not None:
            micro.check(self.schedule, self.net, self.micro_batch)
        self.planning = Planning(
            Job(self.net, self.schedule, self.settings, self.device.type, backend), self.budget,
            micro_batch=memory.micro_batch, plan=memory.plan, costs=memory.costs)
        if batch_size is not None:
            fixed = bool(memory.states or memory.weights)
            self.settings = self.planning.begin(batch_size, fixed=fixed)
            if self.settings.weights == "bf16":  # the budget took it
                round_weights(self.net)
        self.optimizer = optimizer_of(self.net, self.settings.optim(), seed=self.settings.seed,
                                      owners=self.schedule.owners(), active=self.schedule.active(0))
        #: Numbers that kernels on a GPU read from its memory.
        self.clock = clock_of(self.optimizer, self.device, self.schedule.updates)
        self.rate = LearningRate(self.optimizer, self.settings, scheduler)
        self.progress, self.sip = progress, net.selects_range
        self.notes: dict[str, Any] = {}
        #: Told of training while `fit` runs.
        self.callbacks = Callbacks()
        #: Features that a layer-wise schedule keeps between its stages.
        self.stored: Any = None
        #: Where training stands: epoch, batches of it done, and steps in all.
        self.epoch, self.iteration, self.steps = 0, 0, 0
        self.best_accuracy: float | None = None
        self.peak_bytes, self.ended, self._meter_next = 0, False, False
        self.write_into(out)
        self._limit: AllocatorLimit | None = None
        self._shuffle, self.sums = torch.get_rng_state(), EpochSums()
        self.finite = FiniteCheck(self.device, depth=len(self.net.layers))
        usual = recipe.epochs / self.settings.epochs  # layer-wise, epochs are counted per layer
        self.overtraining = Overtraining(self.schedule.total * usual)

    def write_into(self, out: str | os.PathLike[str] | None) -> None:
        """Keep history and checkpoints in this run folder, as `out` does."""
        self.out = None if out is None else Path(out)
        self.claimed: Path | None = None
        self.history = History(self.out)

    @property
    def epochs(self) -> int:
        """Epochs of the whole run; layer-wise schedules count the recipe's per layer."""
        return self.schedule.total

    @property
    def plan(self) -> Plan | None:
        """The plan of the largest batch met, in the phase that needs most."""
        return None if self.planning.base is None else self.planning.base.largest

    @property
    def floor_bytes(self) -> int:
        """Parameters and optimizer states, in the phase that has most of them."""
        phases, owners = self.schedule.phases(), self.schedule.owners()
        return floor_bytes(self.net, self.settings.optim(), phases, owners)

    def plan_for(self, batch: int) -> Plan:
        """Of a batch size; smaller batches keep the cuts of the largest one met."""
        return self.planning.plans(batch).largest

    @left_outside
    def step(self, batch: Any, y: torch.Tensor | None = None, *, epoch: int | None = None,
             iteration: int | None = None) -> BatchReport:
        """Train on one batch the layers whose turn it is.

        Args:
            batch, y: samples and labels; or a `Batch`, or a mapping with its fields, alone.
            epoch: whose learning rate and turn; default is the current one.
            iteration: the batch's number in the epoch; default counts on.

        Returns:
            BatchReport: losses and goodness per layer, None if idle, on the device until read.

        Raises:
            TypeError, ValueError: a batch the network cannot take; no weight has changed. On a
                GPU the range of labels is read at an epoch's first batch, else found late.
            TrainingStopped: the loss, or the samples, are not finite.
        """
        item = admitted(self, batch, y, epoch, iteration)
        first = self.iteration == 0
        # stored features hold both halves' rows
        plan = self.planning.plans(item.y.shape[0]).at(self.epoch)
        self.rate.move_to(self.schedule.rate_epoch(self.epoch))
        report = self._train(item, plan)
        self.finite.after(item.x, item.y, label_count(self.net), report.mean_losses, self.epoch,
                         self.steps, first, self.dtype)
        self.steps += 1
        self.iteration += 1
        return report

    def _context(self, item: Batch) -> StepContext:
        rows = rows_of(self.net, item.x.shape[0]) if item.features is None else (
            item.features.shape[0])
        return self.callbacks.attached(StepContext(
            self.net, self.optimizer, item.y, rows, self.settings.seed, self.steps, self.backend,
            self.schedule.turn(self.epoch, self.iteration),
            clock=self.clock.dropout if self.clock else None))

    @left_outside
    def capture(self, x: torch.Tensor, y: torch.Tensor) -> CapturedStep:
        """The step on batches of this size as a CUDA graph, after two ordinary ones on (x, y)."""
        return CapturedStep(self, x, y)

    def begin_update(self, plan: Plan) -> None:
        """What an update finds on the device beside weights and states."""
        kept = halved_weights(self.net, self.dtype) if plan.roomy else ()
        self.optimizer.keep_halves(kept, self.dtype)
        if self.clock is not None:
            self.clock.begin(self.steps)

    def update(self, item: Batch, plan: Plan) -> BatchReport:
        """One update, from the whole batch or from its micro-batches; `begin_update` was called."""
        def step(ctx: StepContext, part: Batch) -> BatchReport:
            return self.schedule.train(ctx, part, plan, self.dtype)

        if self._limit is None:
            self._limit = limit_for(self.budget, [
                *self.net.parameters(), *self.optimizer.state_tensors(),
                *self.optimizer.half_tensors(), *item.tensors()], self.device)
        with enforced(self._limit, self.device), flushed(self.device), product_rule.exact(
                self.device.type):
            if self.micro_batch is None:
                return step(self._context(item), item)
            return micro.train(self._context, item, self.micro_batch, step)

    def meter_next(self) -> None:
        """Meter the next step, which is slower for it: `peak_bytes` then covers it."""
        self._meter_next = True

    def _train(self, item: Batch, plan: Plan) -> BatchReport:
        self.begin_update(plan)
        if not self._meter_next:
            return self.update(item, plan)
        self._meter_next = False
        held = [*self.optimizer.half_tensors(), *(self.stored.tensors() if self.stored else ())]
        with MemoryMeter(parameter=self.net.parameters(), state=self.optimizer.state_tensors(),
                         feature=[*item.tensors(), *held]) as meter:
            report = self.update(item, plan)
        self.peak_bytes = max(self.peak_bytes, meter.report.peak_bytes)
        return report

    @typed("train")
    @left_outside
    def fit(self, train_loader: Iterable[Any], valid_loader: Iterable[Any] | None = None, *,
            until: int | None = None, callbacks: Sequence[Callback] = ()) -> History:
        """Train from where the trainer stands up to epoch `until` (default: all of them).

        Batches come from any iterable of (x, y); with `set_epoch` (ours, DistributedSampler) it is
        told the epoch. With a validation loader the layer range is selected by SIP after each
        epoch. Ctrl-C, or SIGTERM, finishes the step, writes a checkpoint and raises
        TrainingInterrupted. `callbacks` are told of steps, epochs and checkpoints; see Callback.

        Raises:
            ValueError: another run lies in `out`.
            TrainingStopped: naming layer, step and epoch; the last checkpoint stays as it was.
        """
        saving.claim(self)
        until = self.epochs if until is None else until
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        phase = None
        self.callbacks = Callbacks(callbacks)
        try:
            self.callbacks.on_fit(self)
            with Interrupts() as stop:
                while self.epoch < until and not self.ended:
                    if phase != (phase := self.schedule.phase(self.epoch)):
                        self._meter_next = self.device.type == "cpu"
                    with Progress(train_loader, self.epoch, self.epochs, self.iteration,
                                  enabled=self.progress) as bar:
                        self._epoch(train_loader, valid_loader, stop, bar)
        finally:
            self.callbacks = Callbacks()
            self.history.close()
            if self.stored is not None:
                self.stored.close()
                self.stored = None
        return self.history

    def _stage(self, loader: Iterable[Any]) -> Iterable[Any]:
        """What this epoch reads; a layer-wise schedule changes it with its stage."""
        self.optimizer.activate(self.schedule.active(self.epoch))
        read: Iterable[Any] = self.schedule.loader(self, loader, self.epoch)
        return read

    def shuffle_state(self) -> torch.Tensor:
        """torch's generator as the current epoch found it: loaders that shuffle with it resume."""
        return torch.get_rng_state() if self.iteration == 0 else self._shuffle

    def _epoch(self, train_loader: Iterable[Any], valid_loader: Iterable[Any] | None,
               stop: Interrupts, bar: Progress) -> None:
        began = time.perf_counter()
        lr = self.rate.move_to(self.schedule.rate_epoch(self.epoch))
        read = self._stage(train_loader)
        self._shuffle = torch.get_rng_state()
        seen, clock = 0, began
        for item in batches_from(read, self.epoch, self.iteration):
            metered = self._meter_next
            samples = self.train_on(item)
            if metered:
                clock = time.perf_counter()  # a metered step is not timed
            else:
                seen += samples
            bar.advance(self.sums, seen / max(time.perf_counter() - clock, 1e-9), self.peak_bytes)
            if stop.asked:
                self._interrupted(stop.asked)
        saving.check_finite(self)
        if self.sums.samples == 0:
            raise ValueError("[train] expected a loader with at least one batch, got none")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        ended = time.perf_counter()
        speed = seen / max(ended - clock, 1e-9) if seen else self.sums.samples / (ended - began)
        valid = None if valid_loader is None else evaluation.validated(self, valid_loader)
        shown = evaluation.first_samples(train_loader) if self.sums.pairs else []
        seconds = time.perf_counter() - began
        self._finish_epoch(lr, self.evaluate(shown) if shown else None, valid, seconds, speed, bar)
        if stop.asked:
            self._interrupted(stop.asked)

    def _interrupted(self, signal: int) -> None:
        saving.interrupted(self, signal)

    def train_on(self, item: Any) -> int:
        """`step` on a loader's next batch, and what it adds to the epoch's sums; its samples."""
        batch = checked(as_batch(item, None), self.net, self.device)
        report = self.step(batch, iteration=self.iteration)
        self.sums.add(report, batch.y, *evaluation.training_hits(self.net, report, batch.y))
        self.callbacks.on_step(self, batch, report)
        return batch.y.shape[0]

    def _finish_epoch(self, lr: float, shown: float | None, valid: float | None, seconds: float,
                      speed: float, bar: Progress) -> None:
        losses, (start, end) = self.sums.losses(), self.net.layer_range
        passed, pairs = self.sums.accuracy(), self.sums.pairs
        row = Row(self.epoch, lr, mean(losses), losses, shown if pairs else passed, valid, seconds,
                  speed, self.peak_bytes, start, end, passed if pairs else None)
        row.extra = self.callbacks.on_epoch(self, row)
        self.ended = self.schedule.epoch_done(self.epoch, passed)
        self.epoch, self.iteration, self.sums = self.epoch + 1, 0, EpochSums()
        self.optimizer.activate(self.schedule.active(self.epoch))  # a checkpoint is of what follows
        improved = valid is not None and (self.best_accuracy is None or valid > self.best_accuracy)
        self.best_accuracy = valid if improved else self.best_accuracy
        self.overtraining.look(row.epoch, valid, self.best_accuracy)
        self.history.add(row)
        if self.out is not None:
            latest = self.save()
            if improved:
                checkpoint.copy(latest, self.out / checkpoint.BEST)
        bar.finish(row)
        if self.out is not None:
            self.callbacks.on_checkpoint(self, latest)

    @left_outside
    def evaluate(self, loader: Iterable[Any]) -> float:
        """Accuracy (0 to 1) of the class scores on a loader of (x, y)."""
        return evaluation.accuracy(self.net, evaluation.samples_of(self, loader), self.backend)

    @left_outside
    def evaluate_layers(self, loader: Iterable[Any]) -> list[float | None]:
        """Accuracy of each layer's goodness alone; None of one trained on super-classes."""
        samples = evaluation.samples_of(self, loader)
        return evaluation.layer_accuracy(self.net, samples, self.backend)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint, atomically; default is latest.safetensors of the run folder.

        Raises:
            TrainingStopped: losses, weights or states are not finite; the file stays as it was.
        """
        if path is None and self.out is None:
            raise ValueError("[checkpoint] expected a path, or a trainer with a run folder (out=)")
        if path is None:
            saving.claim(self)
        saving.check_finite(self)
        target = Path(path) if path is not None else Path(self.out or "") / checkpoint.LATEST
        checkpoint.save(target, saving.tensors(self), saving.description(self))
        return target

    @typed("trainer")
    def resume(self, run: str | os.PathLike[str]) -> None:
        """Go on where a checkpoint stands, bit for bit; more `epochs` than it had are welcome.

        Raises:
            ValueError: damaged, another network, or other settings: what differs is named and
                nothing in this trainer has changed.
        """
        saving.restore(self, checkpoint.load(run))
