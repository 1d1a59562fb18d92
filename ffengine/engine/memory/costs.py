"""What a layer's turn costs on this machine, measured: what a memory budget is spent by.

    curve of a layer = seconds at tiles of 1, 2, 4, ... samples, for
        adding: a tile that adds to the run's gradient
        step:   what making that gradient, and stepping once with it, takes beside its tiles
        once:   what a tile that is the whole batch takes beside `adding`: no gradient, one step
        alone:  a whole batch of a layer that takes no tiles (pairs, batch statistics)
        pass:   a frozen layer that passes a tile on

Layers of one signature share a curve (curves.py keeps them). They rank plans and
predict a step's seconds; nothing else depends on them.
"""

from __future__ import annotations

import copy
import functools
import re
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ffengine.engine.batch import binary
from ffengine.engine.compiling import Layers
from ffengine.engine.context import StepContext, Turn
from ffengine.engine.execute import layer_turn
from ffengine.engine.instructions import Place, Tensors, zeros_like_parameters
from ffengine.engine.memory.curves import Curve, at, curves, over_tiles
from ffengine.engine.memory.plans import Job
from ffengine.engine.memory.shapes import is_whole
from ffengine.engine.optim import LocalOptimizer, own_settings
from ffengine.engine.program import Facts, freed
from ffengine.engine.rows import Rows
from ffengine.nn.layers import as_laid_out
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops import backends
from ffengine.ops.weight_update import OptimConfig

#: Largest tile that is timed; beyond it a curve goes on as a straight line.
LARGEST = {"cpu": 32, "cuda": 256}
#: Timed calls after the warm-up, unless they take longer than this many seconds together.
REPEATS, PATIENCE = 3, 0.1
#: Turns that do not step the optimizer.
STEPLESS = ("adding", "pass")
#: seconds(layer index, tile): of the layer's turns over the whole batch.
Seconds = Callable[[int, int], float]


class Costs:
    """Measured costs of a job's layers on a batch of so many rows."""

    def __init__(self, job: Job, rows: int) -> None:
        self.job, self.rows = job, rows
        self.largest = LARGEST.get(job.device, LARGEST["cpu"])
        self._kept: dict[tuple[int, bool, bool], Curve] = {}

    def at(self, epoch: int) -> Seconds | None:
        """Costs in the phase of an epoch; None where a layer's turn cannot be timed alone.

        A loss that crosses a layer boundary, and layers that see those above them, cannot.
        """
        if self.job.schedule.crosses or isinstance(self.job.net, RecurrentNet):
            return None
        turn = self.job.schedule.turn(epoch, 0)
        return lambda i, tile: self.seconds(i, tile, turn)

    def seconds(self, i: int, tile: int, turn: Turn) -> float:
        """Seconds of layer i's turns over the whole batch in tiles of `tile` samples."""
        if i >= turn.depth:
            return 0.0
        want_z, n = i + 1 < turn.depth, max(self.rows, 1)
        points = functools.partial(self._points, i, want_z)
        if i not in turn.layers:
            return over_tiles(points("pass"), n, tile)
        if tile >= n and (is_whole(self.job.net.layer(i)) or self.job.net.propagate == "updated"):
            return at(points("alone"), n)
        beside = points("once") if tile >= n else points("step")
        return max(0.0, over_tiles(points("adding"), n, tile) + beside[1])

    def _points(self, i: int, want_z: bool, kind: str) -> dict[int, float]:
        """A curve's points; measured where neither memory nor the file has those it takes."""
        key = (i, want_z, kind in STEPLESS)
        if key not in self._kept:
            self._kept[key] = curves().of(signature(self.job, *key))
        points, wanted = self._kept[key].setdefault(kind, {}), self._wanted(kind)
        if any(n not in points for n in wanted):
            with curves().lock:  # timed beside another thread's, both would be wrong
                timer = LayerTimer(self.job, i, want_z)
                points.update({n: timer.time(kind, n) for n in wanted if n not in points})
                curves().changed = True
        return points

    def _wanted(self, kind: str) -> list[int]:
        """Tiles at which this batch wants a curve measured."""
        n, most = max(self.rows, 1), self.largest
        if kind in ("step", "once"):
            return [1]
        if kind == "alone":
            return [n] if n <= most else [most // 4, most]
        return [2**k for k in range(most.bit_length()) if 2**k <= min(n, most)]


class LayerTimer:
    """One layer's real turn, on weights and data of its own; the network is left alone.

    Holds the layer's weights, states, gradient, and maps of at most LARGEST samples.
    """

    def __init__(self, job: Job, i: int, want_z: bool) -> None:
        self.job, self.i = job, i
        self.device = torch.device(job.device)
        self.generator = torch.Generator(self.device).manual_seed(i)
        self.net = self._shadow()
        self.layer, optim = self.net.layer(i), job.settings.optim()
        self.optimizer = LocalOptimizer(
            self.layer.named_parameters(), optim, own=own_settings(self.layer, optim))
        depth = i + 1 + want_z
        self.trains, self.passes = Turn((i,), depth), Turn((), depth, start=i + 1)

    def _shadow(self) -> LocalNet:
        """The network with a copy of layer i that is free to train, on the device."""
        net = self.job.net
        shadow: LocalNet = copy.copy(net)
        mine = copy.deepcopy(net.layer(self.i)).to_empty(device=self.device)
        with torch.no_grad():
            for p in mine.parameters():
                p.normal_(0, 0.05, generator=self.generator)
            for b in mine.buffers():
                b.fill_(int(b.is_floating_point()))  # variances of 1, labels of 0
        layers = list(net.layers)
        layers[self.i] = mine
        shadow._modules = {**net._modules, "layers": nn.ModuleList(layers)}
        return shadow

    def _map(self, n: int, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.rand(n, *shape, generator=self.generator, device=self.device)
        return as_laid_out(made.to(self.job.settings.dtype))

    def _shortcut(self, n: int) -> torch.Tensor | None:
        net, i = self.net, self.i
        z = self.layer.z_shape(net.input_of(i, net.shapes[i]))
        join = net.wires[i].join
        if join == "none":
            return None
        return self._map(n, z if join == "add" else (net.shapes[i + 1][0] - z[0], *z[1:]))

    def time(self, kind: str, n: int) -> float:
        """Seconds of a tile of n samples, or what `step` and `once` take beside `adding`."""
        if kind == "step":
            return max(0.0, self._time("finishing", n) - self._time("adding", n))
        if kind == "once":
            return self._time("alone", n) - self._time("adding", n)
        return self._time(kind, n)

    def _time(self, kind: str, n: int) -> float:
        x, shortcut = self._map(n, self.net.shapes[self.i]), self._shortcut(n)
        rows = torch.arange(n, device=self.device)
        y = (rows < n // 2).long() if binary(self.net) else rows % self.net.num_classes
        batch = 2 * n if kind in ("adding", "finishing") else n
        whose = self.passes if kind == "pass" else self.trains
        made = Layers(self.net, Facts(whose, batch), "x", None if shortcut is None else "s")
        made.layer(self.i, n)
        lines, _ = freed(made.lines, batch, frozenset({f"g{self.i}"}))
        kept = zeros_like_parameters(self.layer) if kind == "adding" else None

        def turn() -> None:
            ctx = StepContext(self.net, self.optimizer, y, batch, backend=self.job.backend,
                              turn=whose)
            at = Place(ctx, self.job.settings.dtype, Rows(0, n), kind != "adding")
            sums = zeros_like_parameters(self.layer) if kind == "finishing" else kept
            tensors: Tensors = {"x": x, "s": shortcut, f"g{self.i}": sums}
            layer_turn(at, self.i, lines, tensors)

        with torch.no_grad():
            return self._median(turn)

    def _median(self, call: Callable[[], None]) -> float:
        self._synchronize()
        call()  # packs, tunes, allocates
        self._synchronize()
        times: list[float] = []
        while len(times) < REPEATS and (not times or sum(times) < PATIENCE):
            start = time.perf_counter()
            call()
            self._synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def signature(job: Job, i: int, want_z: bool, stepless: bool) -> str:
    """What a layer's cost depends on, in words; the optimizer's part where its turn steps.

    Losses written in Python go by their names.
    """
    net, layer = job.net, job.net.layer(i)
    base = job.settings.optim()
    own: dict[str, OptimConfig] = own_settings(layer, base)
    kinds = set() if stepless else {
        (o.kind, o.states, o.state_precision) for o in (base, *own.values())}
    norm = layer.pre_norm
    parts = [type(layer).__name__, net.shapes[i], net.shapes[i + 1], tuple(layer.weight.shape),
             layer.weight.dtype, layer.bias is not None, layer.geometry, layer.config,
             layer.dropout > 0, norm and (norm.kind, norm.shape), layer.batch_coupling,
             net.wires[i], net.propagate, want_z, sorted(kinds), job.settings.dtype,
             backends.resolve("costs", job.backend, job.device, job.settings.dtype)]
    return re.sub(r" at 0x[0-9a-f]+", "", "; ".join(map(str, parts)))
