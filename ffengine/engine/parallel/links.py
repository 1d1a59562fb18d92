"""Links between the stages of a pipeline: batches travel forward only, through bounded queues.

A stage holds at most so many batches that wait for it: a receive is posted when one of its credits
is free, and a send ends when the other side has posted the receive. Threads send and receive
beside the computation.

A message is a header, and for a batch its labels, the goodness of the layers that are done, and the
maps, in the run's own type:

    int64 (3 + 2 MOST_MAPS + L): kind, samples, maps; (letter, number) of each; K of every layer
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from ffengine.engine.batch import Arrived, Batch
from ffengine.engine.inputs import rows_of
from ffengine.engine.parallel.cutting import shape_of
from ffengine.engine.parallel.watch import Watch
from ffengine.engine.rows import empty
from ffengine.nn.layers import as_laid_out
from ffengine.nn.network import LocalNet
from ffengine.ops.optimizer_step import step_dtype

#: Kinds of messages: a batch, and three after which none follows: of the epoch, of training that
#: was interrupted, of the link.
BATCH, EPOCH, STOP, CLOSE = range(4)
#: A map and what skips layers beside it; more only where a head reads several layers.
MOST_MAPS = 32
#: Batches that a stage hands on and that the next one has not taken in.
HANDED_ON = 2


class Message(NamedTuple):
    """What travels: y int64 (N,), and what the stages before made of the samples."""

    kind: int
    y: torch.Tensor | None = None
    arrived: Arrived | None = None
    #: A GPU has made, or has received, the tensors when this is over.
    done: torch.cuda.Event | None = None


class Form:
    """How messages of a run lie on a link."""

    def __init__(self, net: LocalNet, dtype: torch.dtype, device: torch.device) -> None:
        self.net, self.dtype, self.device = net, dtype, device
        self.wide = step_dtype(dtype)
        self.length = 3 + 2 * MOST_MAPS + len(net.layers)

    def header(self, message: Message) -> torch.Tensor:
        """int64, on the CPU."""
        made = torch.zeros(self.length, dtype=torch.int64)
        made[0] = message.kind
        if message.y is not None and message.arrived is not None:
            maps, goodness = message.arrived.maps, message.arrived.goodness
            if len(maps) > MOST_MAPS:
                raise ValueError(f"[pipeline] a cut expected at most {MOST_MAPS} maps that travel, "
                                 f"got {len(maps)}")
            made[1], made[2] = len(message.y), len(maps)
            for k, name in enumerate(maps):
                made[3 + 2 * k], made[4 + 2 * k] = ord(name[0]), int(name[1:])
            for i, g in goodness.items():
                made[3 + 2 * MOST_MAPS + i] = g.shape[1]
        return made

    def room(self, header: torch.Tensor) -> Message:
        """Of a header's message."""
        kind, samples, count, *rest = (int(v) for v in header)
        if kind != BATCH:
            return Message(kind)
        rows, y = rows_of(self.net, samples), torch.empty(
            samples, dtype=torch.int64, device=self.device)
        goodness = {i: torch.empty(rows, k, dtype=self.wide, device=self.device)
                    for i, k in enumerate(rest[2 * MOST_MAPS:]) if k}
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        names = [f"{chr(rest[2 * k])}{rest[2 * k + 1]}" for k in range(count)]
        maps = {name: empty(like, rows, shape_of(self.net, name)) for name in names}
        return Message(kind, y, Arrived(maps, goodness))

    def tensors(self, message: Message) -> Iterator[torch.Tensor]:
        """A message's tensors in order, each as bytes in a row that share its memory."""
        if message.y is not None and message.arrived is not None:
            yield message.y.view(torch.uint8)
            for t in (*message.arrived.goodness.values(), *message.arrived.maps.values()):
                # channels_last lies in memory as (N, H, W, C)
                yield (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).reshape(-1).view(torch.uint8)

    def laid_out(self, maps: dict[str, torch.Tensor], goodness: dict[int, torch.Tensor],
                 y: torch.Tensor) -> Message:
        """A batch's message, its tensors as `tensors` wants them; in the order of the layers."""
        return Message(BATCH, y.contiguous(), Arrived(
            {name: as_laid_out(t) for name, t in maps.items()},
            {i: goodness[i].to(self.wide).contiguous() for i in sorted(goodness)}))


class Side(ABC):
    """What both ends of a link have: a thread, credits, and a stream of their own on a GPU."""

    def __init__(self, rank: int, group: dist.ProcessGroup, form: Form, watch: Watch,
                 credits: int) -> None:
        self.rank, self.group, self.form, self.watch = rank, group, form, watch
        self.credits = threading.Semaphore(credits)
        self.waiting: queue.Queue[Message] = queue.Queue()
        self.stream = (torch.cuda.Stream(form.device)  # type: ignore[no-untyped-call]
                       if form.device.type == "cuda" else None)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"link {rank}")
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.cuda.stream(self.stream), torch.no_grad():
                while self.turn() != CLOSE:
                    pass
        except (RuntimeError, ValueError):
            self.watch.lost(self.rank)

    @abstractmethod
    def turn(self) -> int:
        """Pass one message on; its kind."""

    def join(self, seconds: float | None = None) -> None:
        """Wait until the last message has passed, or its thread has failed; so long at most."""
        self._thread.join(seconds)


class Outlet(Side):
    """Hands batches on to the next stage."""

    def __init__(self, rank: int, group: dist.ProcessGroup, form: Form, watch: Watch) -> None:
        super().__init__(rank, group, form, watch, HANDED_ON)

    def hand_on(self, maps: dict[str, torch.Tensor], goodness: dict[int, torch.Tensor],
                y: torch.Tensor) -> None:
        """A batch: its maps, the goodness of the layers that are done, its labels."""
        self.put(self.form.laid_out(maps, goodness, y))

    def put(self, message: Message) -> None:
        """Hand on; waits while the next stage has `HANDED_ON` of them to take in."""
        self.watch.until(lambda seconds: self.credits.acquire(timeout=seconds),
                         f"rank {self.rank} to take a batch in")
        if self.stream is not None:
            message = message._replace(done=torch.cuda.current_stream().record_event())
        self.waiting.put(message)

    def turn(self) -> int:
        message = self.waiting.get()
        if self.stream is not None and message.done is not None:
            self.stream.wait_event(message.done)
        dist.send(self.form.header(message), self.rank, self.group)
        for flat in self.form.tensors(message):
            dist.send(flat, self.rank, self.group)
        if self.stream is not None:
            self.stream.synchronize()  # before the memory is somebody else's
        self.credits.release()
        return message.kind


class Inlet(Side):
    """Takes batches in from the stage before."""

    def get(self) -> Message:
        """The next message; its credit is free again."""
        found: list[Message] = []

        def ready(seconds: float) -> bool:
            try:
                found.append(self.waiting.get(timeout=seconds))
            except queue.Empty:
                return False
            return True

        self.watch.until(ready, f"a batch of rank {self.rank}")
        message = found[0]
        if message.done is not None and message.arrived is not None and message.y is not None:
            current = torch.cuda.current_stream()
            current.wait_event(message.done)
            for t in (message.y, *message.arrived.goodness.values(),
                      *message.arrived.maps.values()):
                t.record_stream(current)
        self.credits.release()
        return message

    def turn(self) -> int:
        self.credits.acquire()
        header = torch.empty(self.form.length, dtype=torch.int64)
        dist.recv(header, self.rank, self.group)
        message = self.form.room(header)
        for flat in self.form.tensors(message):
            dist.recv(flat, self.rank, self.group)
        if self.stream is not None:
            message = message._replace(done=self.stream.record_event())
        if message.kind != CLOSE:
            self.waiting.put(message)
        return message.kind

    def batches(self, stopped: Callable[[], None]) -> Iterator[Batch]:
        """An epoch's batches; the samples are of their shape, but without memory.

        Args:
            stopped: called where the first stage was interrupted.
        """
        shape = self.form.net.in_shape
        while True:
            message = self.get()
            if message.kind == STOP:
                stopped()
            if message.y is None:
                return
            nothing = torch.zeros((), device=self.form.device).expand(len(message.y), *shape)
            yield Batch(nothing, message.y, arrived=message.arrived)
            del message, nothing
