"""Callbacks: who is told of training as it goes, `Trainer.fit(..., callbacks=[...])`.

Numbers that they give become columns of the history, its CSV files and TensorBoard. What nobody
listens to is not measured: a step without listeners runs as if there were no callbacks at all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.instructions import Place
from ffengine.engine.program import Instruction
from ffengine.engine.run.history import Row
from ffengine.nn.network import LocalNet
from ffengine.ops.optimizer_step import step_dtype

#: The Trainer, whose module imports this one.
Trainer = Any
#: By column; a scalar tensor may stay on the device, None is an empty cell.
Numbers = Mapping[str, "float | torch.Tensor | None"]


class Callback:
    """Base of callbacks: override what you need; what you do not is never asked for.

    Whatever a method raises ends training, like Ctrl-C at that place: the last checkpoint stands.
    """

    def on_fit(self, trainer: Trainer) -> None:
        """Training is about to begin, or to go on; the place to refuse a trainer (ValueError)."""

    def on_instruction(self, at: Place, line: Instruction, seconds: float) -> None:
        """An instruction of a step has run (`ffengine plan MODEL --steps` lists them).

        Args:
            at, line: where in the step, and which: `line.op`, `line.index` its layer (or head).
            seconds: since the one before; on a GPU each instruction is then waited for.
        """

    def on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """A parameter has been updated by this gradient, before weight decay; its own to keep.

        Args:
            name: as in `net.named_parameters()`; once an update, so K times a step of K frames.
            gradient: fp32 (fp64), of the parameter's shape. Memory: one instruction's at a time,
                beside what the plan counts.
        """

    def on_step(self, trainer: Trainer, batch: Batch, report: BatchReport) -> Numbers | None:
        """A batch has been trained on. Numbers: columns of this step in steps.csv and TensorBoard.
        """

    def on_epoch(self, trainer: Trainer, row: Row) -> Numbers | None:
        """An epoch is done and validated. Numbers: further columns of its row of the history."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """The epoch's checkpoint is written, its row is in the history."""


EVENTS = ("on_fit", "on_instruction", "on_gradient", "on_step", "on_epoch", "on_checkpoint")


class Callbacks:
    """Those who listen, by event."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError("[callbacks] expected ffengine.Callback objects, got "
                                f"{type(callback).__name__}")
        self._who = {event: [c for c in callbacks if getattr(type(c), event) is not getattr(
            Callback, event)] for event in EVENTS}

    def on_fit(self, trainer: Trainer) -> None:
        for callback in self._who["on_fit"]:
            callback.on_fit(trainer)

    def on_step(self, trainer: Trainer, batch: Batch, report: BatchReport) -> None:
        found = merged([c.on_step(trainer, batch, report) for c in self._who["on_step"]])
        trainer.history.add_step(trainer.epoch, trainer.steps - 1, found)

    def on_epoch(self, trainer: Trainer, row: Row) -> dict[str, float | None]:
        found = merged([row.flat(), *(c.on_epoch(trainer, row) for c in self._who["on_epoch"])])
        found = {name: v for name, v in found.items() if name not in row.flat()}
        return {name: None if v is None else float(v) for name, v in found.items()}

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        for callback in self._who["on_checkpoint"]:
            callback.on_checkpoint(trainer, path)

    def attached(self, ctx: StepContext) -> StepContext:
        """The context, told to hand its instructions and gradients to those who listen."""
        if self._who["on_instruction"] or self._who["on_gradient"]:
            listener = Listener(ctx, self._who["on_instruction"], self._who["on_gradient"])
            ctx.hook, ctx.grads = listener.ran, listener.buffers
        return ctx


def merged(found: Sequence[Numbers | None]) -> dict[str, float | torch.Tensor | None]:
    """All columns; ValueError for one that two callbacks give."""
    columns: dict[str, float | torch.Tensor | None] = {}
    for numbers in found:
        for name, value in (numbers or {}).items():
            if name in columns:
                raise ValueError(f"[callbacks] expected every column once, got {name} twice")
            columns[name] = value
    return columns


class Listener:
    """Hands one step's instructions and gradients on."""

    def __init__(self, ctx: StepContext, instructions: list[Callback],
                 gradients: list[Callback]) -> None:
        self._instructions, self._gradients = instructions, gradients
        self.buffers = Gradients(ctx.net) if gradients else None
        self._last = now(ctx.net) if instructions else 0.0

    def ran(self, at: Place, line: Instruction) -> None:
        """The hook of `ffengine.engine.execute.perform`."""
        if self._instructions:
            seconds = now(at.ctx.net) - self._last
            for callback in self._instructions:
                callback.on_instruction(at, line, seconds)
        if self.buffers is not None:
            # tiles and micro-batches before the last only add to a sum
            done = at.finish and (at.ctx.sums is None or at.ctx.sums.last)
            for name, gradient in self.buffers.taken().items():
                for callback in self._gradients if done else ():
                    callback.on_gradient(name, gradient)
        if self._instructions:
            self._last = now(at.ctx.net)


def now(net: LocalNet) -> float:
    """Seconds; a GPU's work is done by then."""
    device = net.layer(0).weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Gradients:
    """Where a step's updates write gradients: room made when asked for, let go of when taken."""

    def __init__(self, net: LocalNet) -> None:
        self._net = net
        self._handed: dict[str, torch.Tensor] = {}

    def get(self, key: tuple[int | str, str], /) -> torch.Tensor | None:
        """Room for a gradient of (layer, "heads.N", "encoding" or "net"; parameter's name); None
        of a parameter that is not there."""
        owner, name = key
        if isinstance(owner, int):
            owner = f"layers.{owner}"
        full = name if owner == "net" else f"{owner}.{name}"
        path, _, last = full.rpartition(".")
        parameter = getattr(self._net.get_submodule(path), last)
        if parameter is None:
            return None
        room = torch.zeros_like(parameter, dtype=step_dtype(parameter.dtype), requires_grad=False)
        self._handed[full] = room
        return room

    def taken(self) -> dict[str, torch.Tensor]:
        """What was handed out since the last time, by the parameter's name."""
        found, self._handed = self._handed, {}
        return found
