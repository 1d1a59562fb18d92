"""Stopping cleanly: at the first number that is not finite, at Ctrl-C and at SIGTERM."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Mapping, Sequence
from itertools import islice
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch

from ffengine.ops.optimizer_step import step_dtype

#: What rounds to infinity in fp16.
HALF_LIMIT = 65520.0


class TrainingStopped(RuntimeError):
    """Training met a number it cannot go on with; one line says where."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM: the step was finished and, with a run folder, a checkpoint written.

    signal: which of them, signal.SIGINT or SIGTERM.
    """

    def __init__(self, text: str = "", signal: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.signal = signal


class _Record(NamedTuple):
    """One step: flags[0] samples finite, flags[1] labels in range, then the layers' losses."""

    epoch: int
    step: int
    layers: tuple[int, ...]
    flags: torch.Tensor


class FiniteCheck:
    """Looks for losses, of `depth` layers and then of heads, that are not finite, without slowing a
    GPU down.

    On the CPU every step is looked at. Elsewhere each step leaves one small vector on the device
    and they are read together every `every` steps, at an epoch's end, and for an epoch's first
    batch: labels out of range and bad samples are then found up to `every` steps late.
    """

    def __init__(self, device: torch.device, every: int = 50, depth: int = 1 << 30) -> None:
        self.host = device.type == "cpu"
        self.every, self.depth = 1 if self.host else every, depth
        self._records: list[_Record] = []

    def before(self, given: Sequence[torch.Tensor], dtype: torch.dtype, epoch: int,
               step: int) -> None:
        """On the CPU, bad samples are named before a weight has changed."""
        if self.host and not all(bool(finite(x, largest(x, dtype))) for x in given):
            raise TrainingStopped(bad_samples(epoch, step))

    def after(self, x: torch.Tensor, y: torch.Tensor, count: int, losses: list[torch.Tensor | None],
              epoch: int, step: int, now: bool, dtype: torch.dtype = torch.float32) -> None:
        """Note a step's losses; read what has gathered when it is time, or `now`."""
        self.note(self.flags(x, y, count, losses, dtype), losses, epoch, step, now)

    def flags(self, x: torch.Tensor, y: torch.Tensor, count: int,
              losses: list[torch.Tensor | None],
              dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What a step leaves on the device: see `_Record`."""
        if self.host:
            ok = [torch.ones((), device=x.device)] * 2
        else:
            ok = [finite(x, largest(x, dtype)).float(), ((y >= 0) & (y < count)).all().float()]
        return torch.stack([*ok, *(loss.float() for loss in losses if loss is not None)])

    def note(self, flags: torch.Tensor, losses: list[torch.Tensor | None], epoch: int, step: int,
             now: bool) -> None:
        """Keep a step's flags; read what has gathered when it is time, or `now`."""
        trained = tuple(i for i, loss in enumerate(losses) if loss is not None)
        self._records.append(_Record(epoch, step, trained, flags))
        if now or len(self._records) >= self.every:
            self.check()

    def check(self) -> None:
        """Raise TrainingStopped naming the first step and layer that went wrong."""
        records, self._records = self._records, []
        if not records:
            return
        found = iter(torch.cat([r.flags for r in records]).tolist())  # one wait for all of them
        for record in records:
            row = list(islice(found, len(record.flags)))
            if not row[0]:
                raise TrainingStopped(bad_samples(record.epoch, record.step))
            if not row[1]:
                raise TrainingStopped(f"[train] labels out of range in the batch of epoch "
                                      f"{record.epoch}, step {record.step}")
            for i, loss in zip(record.layers, row[2:], strict=True):
                if not abs(loss) < float("inf"):
                    what = f"layer {i}" if i < self.depth else f"head {i - self.depth}"
                    raise TrainingStopped(
                        f"[train] the loss of {what} became {loss} at step {record.step} of "
                        f"epoch {record.epoch}: expected finite numbers; try a lower --lr or a "
                        "wider --precision")


def finite(x: torch.Tensor, limit: float = math.inf) -> torch.Tensor:
    """Bool scalar: no NaN, no infinity, nothing of `limit` or above. By the extremes, which a NaN
    is: `isfinite(x).all()` holds twice the batch (|x| and three masks)."""
    low, high = torch.aminmax(x)
    return (low > -limit) & (high < limit)  # of a NaN neither holds


def largest(x: torch.Tensor, dtype: torch.dtype) -> float:
    """What samples x must stay below in a run that computes in `dtype`: a cast to it, and the sum
    of a sample's squares, are then finite."""
    squares = math.sqrt(torch.finfo(step_dtype(dtype)).max / max(x[:1].numel(), 1))
    limit = min(squares, HALF_LIMIT) if dtype is torch.float16 else squares
    return limit if limit <= torch.finfo(x.dtype).max else math.inf


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if there is none. Waits for a
    device once."""
    floats = {name: t.detach() for name, t in tensors.items()
              if t.is_floating_point() and t.numel() and t.element_size() > 1}
    found = torch.stack([finite(t) for t in floats.values()]).tolist() if floats else []
    return next((name for name, good in zip(floats, found, strict=True) if not good), None)


def bad_samples(epoch: int, step: int) -> str:
    return (f"[train] the input of layer 0 holds NaN or infinity, or what becomes so in the run's "
            f"precision, at step {step} of epoch {epoch}: expected finite samples, of finite "
            "squares")


class Interrupts:
    """`with Interrupts() as stop:` the first Ctrl-C, or SIGTERM of a batch system, only sets
    `stop.asked`, its number; a second one raises. In other threads than the main one, which get no
    signals, nothing changes.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
