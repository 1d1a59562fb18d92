"""Dry runs: the engine's own step on tensors without memory, under the memory meter.

A network, its schedule and its optimizer are copied onto dry tensors: every allocation happens, in
its order, and nothing is computed. What a plan says is therefore what the meter will read.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import nn

from ffengine.engine import label_channel
from ffengine.engine.accumulator import GradientAccumulator
from ffengine.engine.batch import Batch, paired
from ffengine.engine.compiling import Layers, compile_step, joining, read_by_heads, source
from ffengine.engine.context import StepContext
from ffengine.engine.execute import layer_turn, perform
from ffengine.engine.inputs import input_rows
from ffengine.engine.instructions import Place, Tensors, zeros_like_parameters
from ffengine.engine.memory.dry_tensor import Dry
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.memory.plan import Arriving, Entrance, Plan, TurnBytes, one_tile
from ffengine.engine.optim import halved_weights, optimizer_of
from ffengine.engine.program import Facts, Instruction, Mode, freed
from ffengine.engine.rows import Rows
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn.layers import LocalConv2d, LocalLinear, as_laid_out
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops.config import Loss
from ffengine.ops.host import keeping_constants
from ffengine.ops.memory_accounting import tensors_in
from ffengine.ops.optimizer_step import step_dtype
from ffengine.ops.weight_update import OptimConfig

#: Takes an instruction that has run, and the bytes that live after it.
Told = Callable[[Instruction, int], None]
#: What turns hold that were run dry so far, by everything that decides what they hold.
_turns: dict[Any, TurnBytes] = {}


class DryRun:
    """A network that trains by a schedule, on dry tensors, in one epoch and one turn of it.

    Args:
        net: on any device, meta too; nothing of it changes.
        schedule: tied to `net`.
        optim: the run's optimizer settings.
        dtype: of the activations.
        samples: of a batch.
        when: (epoch, iteration), whose turn it is.
        stored: the rows come from features that a layer-wise schedule kept.
        micro: the batch is the last piece of a larger one, whose gradients add up.
        device: type of the device that the run will be on.
        backend: of the ops.
        roomy: as of the plan.
    """

    def __init__(self, net: LocalNet, schedule: Schedule, optim: OptimConfig, dtype: torch.dtype,
                 samples: int, when: tuple[int, int] = (0, 0), *, stored: bool = False,
                 micro: bool = False, device: str = "cpu", backend: str = "auto",
                 roomy: bool = False) -> None:
        self.mode = Dry()
        self.dtype, self.device, self.backend, self.roomy = dtype, device, backend, roomy
        self.samples, self.rows, self.stored = samples, samples * (1 + paired(net)), stored
        with self.on():
            memo = {id(t): self._like(t) for t in (*net.parameters(), *net.buffers())}
        self.net, self.schedule = copy.deepcopy((net, schedule), memo)
        with self.on():
            for i in range(len(self.net.layers)):
                layer = self.net.layer(i)
                if not isinstance(layer.config.loss, Loss):
                    layer.config = replace(layer.config, loss=_some_loss)
            self.optimizer = optimizer_of(self.net, optim, owners=self.schedule.owners(),
                                          active=self.schedule.active(when[0]))
            self.optimizer.keep_halves(halved_weights(self.net, dtype) if roomy else (), dtype)
            for weight in self.net.parameters():
                self.optimizer.half_of(weight, dtype)  # up to date, as a step finds it
            self.when, self.turn = when, self.schedule.turn(*when)
            self.sums = self._sums() if micro else None
            self._clock = self._empty((1,), torch.int32) if device == "cuda" else None
        #: The first layer that is run.
        self.first = self.turn.start if stored else 0
        self._keys: dict[int, tuple[Any, ...]] = {}
        self._seen: dict[tuple[int, int, Arriving, Mode], TurnBytes] = {}
        self.read_by_heads = read_by_heads(self.net, self.turn)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, tensors are dry, and kernels only declare their scratch."""
        with keeping_constants(None), self.mode, torch.no_grad():
            yield

    def _like(self, t: torch.Tensor) -> torch.Tensor:
        made = self._empty(t.shape, t.dtype).as_strided(t.shape, t.stride())
        return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _sums(self) -> GradientAccumulator:
        """Sums of the gradients that this turn makes."""
        made, turn = GradientAccumulator(), self.turn
        made.share, made.last = 0.5, True
        for name in self.schedule.active(self.when[0]):
            part, _, rest = name.partition(".")
            i, crosses = int(rest.split(".")[0]) if part in ("layers", "heads") else 0, (
                self.schedule.crosses and part == "layers")
            parameter = self.net.get_parameter(name)
            if part not in ("layers", "heads") or i in (
                    turn.layers if part == "layers" else turn.heads):
                made.of(parameter)
            if crosses and i + 1 in turn.layers:
                made.of(parameter, "next")
        return made

    @property
    def floor_bytes(self) -> int:
        """Parameters, and the optimizer states of this epoch."""
        return sum(t.numel() * t.element_size() for t in self._floor())

    def _floor(self) -> list[torch.Tensor]:
        return [*self.net.parameters(), *self.optimizer.state_tensors()]

    def _meter(self, *known: torch.Tensor) -> MemoryMeter:
        return MemoryMeter(parameter=self._floor(),
                           feature=[*known, *self.optimizer.half_tensors()],
                           gradient=() if self.sums is None else self.sums.tensors())

    def batch(self) -> Batch:
        """A batch as a loader gives it, or as a stage reads it from its store."""
        y = self._empty((self.samples,), torch.int64)
        if not self.stored:
            shape = (self.samples, *self.net.in_shape)
            return Batch(self._empty(shape, torch.float32), y, negatives=(
                self._empty(shape, torch.float32) if self._wants_images else None))
        shape = self.schedule.stored_shape(self.schedule.phase(self.when[0]))
        rows = as_laid_out(self._empty((self.rows, *shape)))
        return Batch(rows, y, features=rows, below=self._empty((self.rows,), torch.float32))

    @property
    def _wants_images(self) -> bool:
        """Its negatives are images that only the caller has."""
        net = self.net
        return (net.makes_pairs and net.encoding is None and net.negatives != "masked"
                and not isinstance(net, RecurrentNet))

    def context(self, y: torch.Tensor) -> StepContext:
        return StepContext(self.net, self.optimizer, y, self.rows, backend=self.backend,
                           turn=self.turn, sums=self.sums, clock=self._clock)

    @property
    def facts(self) -> Facts:
        """Of the programs of this turn."""
        return Facts(self.turn, self.rows, self.first, self.roomy, self.sums is not None,
                     self._clock is not None)

    def step(self, plan: Plan, told: Told | None = None) -> int:
        """Peak of a whole step; `told` of every instruction and of the bytes that live after it."""
        with self.on():
            item = self.batch()
            with self._meter(*item.tensors()) as meter:
                # what an epoch gathers is all there from the second step on
                for _ in range(1 if self.schedule.resumes_within else 2):
                    ctx = self.context(item.y)
                    if told is not None:
                        ctx.hook = lambda at, line: told(line, meter.live_bytes)
                    self.schedule.train(ctx, item, plan, self.dtype)
        return meter.report.peak_bytes

    def entrance(self) -> Entrance:
        """What a step holds outside its segments."""
        plan = one_tile(range(self.first, self.turn.depth), self.rows)
        parts = compile_step(self.net, plan, self.facts, self.schedule.writer).parts
        before = list(itertools.takewhile(lambda part: isinstance(part, Instruction), parts))
        after = [part for part in parts[len(before):] if isinstance(part, Instruction)]
        with self.on():
            item = self.batch()
            with self._meter(*item.tensors()) as meter:
                ctx = self.context(item.y)
                at = Place(ctx, self.dtype, Rows(0, self.rows))
                tensors: Tensors = {"batch": item}
                for line in before:
                    perform(at, cast(Instruction, line), tensors)
                live = meter.live_bytes - self.floor_bytes
                for i in self.turn.layers:
                    self._leave(ctx, i)
                for line in after:
                    perform(at, line, {name: self._empty(
                        (self.rows, *self.net.shapes[int(name[1:])])) if line.op == "head"
                        else self._tiles(1) for _, name in line.reads})
        return Entrance(live, meter.report.peak_bytes - self.floor_bytes)

    def _leave(self, ctx: StepContext, i: int) -> None:
        """What layer i has left for the step's report when its rows have gone through it."""
        layer, wide = self.net.layer(i), step_dtype(self.dtype)
        groups = len(layer.config.offsets(layer.weight.shape[0])) - 1
        ctx.note(i, self._empty((self.rows,), wide), self._empty((self.rows, groups), wide))
        ctx.coef[i] = self._tiles(groups)

    def _tiles(self, columns: int) -> list[torch.Tensor]:
        """What several tiles have left, small values a row: whoever reads it puts it together."""
        return [self._empty((rows, columns), step_dtype(self.dtype))
                for rows in (self.rows // 2, self.rows - self.rows // 2)]

    def layer(self, i: int, tile: int, arriving: Arriving, shortcut: tuple[int, ...] | None,
              mode: Mode) -> TurnBytes:
        """Layer i's turn on a tile of so many rows.

        Args:
            shortcut: per-sample shape of the shortcut that is live before it.
            mode: as of `Layers.layer`.
        """
        at = (i, tile, arriving, mode)
        if at not in self._seen:
            made = functools.partial(self._layer, i, tile, arriving, shortcut, mode)
            if type(self.net.layer(i)) not in (LocalConv2d, LocalLinear):
                self._seen[at] = made()  # nobody knows what its class decides
            else:
                key = (*self._key(i), tile, tile < self.rows, arriving, shortcut, mode)
                self._seen[at] = _turns[key] if key in _turns else made()
                _turns[key] = self._seen[at]
        return self._seen[at]

    def _layer(self, i: int, tile: int, arriving: Arriving, shortcut: tuple[int, ...] | None,
               mode: Mode) -> TurnBytes:
        with self.on():
            x = None if arriving.x == "encoded" else f"x{i}"
            brought: list[torch.Tensor] = []
            beside = None if arriving.shortcut is None else x if arriving.shortcut == "x" else "s"
            tensors: Tensors = {}
            held = {name for name, word in (("s", arriving.shortcut), (x, arriving.x))
                    if word == "held" and name is not None}
            if x is not None:
                ctx = self.context(self._empty((self.rows,), torch.int64))
                tensors[x] = as_laid_out(self._empty((tile, *self.net.shapes[i])))
            else:
                item = self.batch()
                ctx = self.context(item.y)
                made_of = tensors[source(self.net)] = input_rows(ctx, item, self.dtype)
                brought = cast(Batch, made_of.item).tensors()
                held.add(source(self.net))
            if beside == "s" and shortcut is not None:
                tensors["s"] = as_laid_out(self._empty((tile, *shortcut)))
            made = self.schedule.writer(self.net, self.facts, x, beside)
            made.layer(i, tile, mode)
            assert made.x is not None
            for name in _unmade(made.lines, tensors):  # goodness of layers at rest
                tensors[name] = self._empty((tile, 1), step_dtype(self.dtype))
                held.add(name)
            ends = {made.x, *([made.shortcut] if made.shortcut else []),
                    *(name for name, _ in made.keeps(i))}
            lines, _ = freed(made.lines, self.rows, frozenset(held | ends))
            tiled = tile < self.rows and i in self.turn.layers and self.sums is None and (
                mode != "pass")
            sums = zeros_like_parameters(self.net.layer(i)) if tiled else ()
            if tiled:
                tensors[f"g{i}"] = sums
                held.add(f"g{i}")
            mine = {name for name in (x, "s") if name in tensors and name not in held}
            known = tensors_in({name: t for name, t in tensors.items() if name not in mine},
                               brought, ctx.y, *self.net.layer(i).buffers())
            with self._meter(*known) as meter:
                before = meter.live_bytes
                for name in mine:
                    meter.track(tensors[str(name)])
                layer_turn(Place(ctx, self.dtype, Rows(0, tile)), i, lines, tensors)
                after, leaving = meter.live_bytes - before, self._leaving(i, made, held)
        own = sum(_bytes(tensors[name]) for name, word in zip(
            (made.x, made.shortcut), leaving, strict=True) if word == "own" and name in tensors)
        return TurnBytes(meter.report.peak_bytes - before, after - own, leaving)

    def _leaving(self, i: int, made: Layers, held: set[str]) -> Arriving:
        x: Literal["own", "held"] = "held" if i in made.read else "own"
        if made.shortcut is None:
            return Arriving(x)
        if made.shortcut == made.x:
            return Arriving(x, "x" if x == "own" else "held")
        return Arriving(x, "held" if made.shortcut in held else "own")

    def _entering(self, i: int) -> tuple[Any, ...]:
        """What decides how rows are made that layer i encodes."""
        net, encoding = self.net, self.net.encoding
        return () if i != self.first else (
            self.samples, self.stored, net.in_shape, net.input_norm, net.makes_pairs,
            self._wants_images, encoding and (type(encoding), encoding.shape, net.num_classes))

    def _key(self, i: int) -> tuple[Any, ...]:
        """Turns of two layers with one key hold the same, on the same maps."""
        if i in self._keys:
            return self._keys[i]
        net, layer, turn = self.net, self.net.layer(i), self.turn
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        shown = label_channel.learned(net) if i == 0 else None
        trained = [*layer.parameters(), *(() if shown is None else shown.parameters())]
        optim = [replace(self.optimizer.config(p), lr=1.0) for p in trained if p.requires_grad]
        self._keys[i] = (
            tuple((n, tuple(t.shape), t.stride(), t.dtype, t.requires_grad)
                  for n, t in tensors.items()),
            layer.config, layer.dropout, layer.batch_coupling, layer.geometry,
            layer.pre_norm and layer.pre_norm.kind, tuple(optim), net.wires[i], net.shapes[i],
            shown and tuple(shown.weight.shape),
            net.shortcut_live_after(i, joining(net, turn)), net.propagate, self.schedule.writer,
            len(self.schedule.writer(net, self.facts).keeps(i)),
            i in turn.layers, i >= turn.start, i + 1 < turn.depth,
            i in self.read_by_heads, self._entering(i), self.sums is None, self.dtype, self.device,
            self.backend, self.roomy, torch.get_num_threads())
        return self._keys[i]


def _unmade(lines: Sequence[Instruction], there: Container[str]) -> list[str]:
    """Buffers that the lines read and neither make nor find."""
    made = {name for line in lines for name in line.writes}
    return [name for line in lines for _, name in line.reads
            if name not in made and name not in there]


def _bytes(t: torch.Tensor) -> int:
    return t.untyped_storage().nbytes()


def _some_loss(g: torch.Tensor, y: object) -> torch.Tensor:
    """Stands in for a caller's own loss, which may read values."""
    return g.sum(1)
