"""Whose calls a profile notes: the engine's steps and the ops' public functions, from outside.

While anybody is `watching`, the functions below are replaced, wherever the package holds them by
name, by ones that tell the recorder of their own context when they begin and end; the engine itself
knows nothing of it, and costs nothing when nobody profiles. A wrapper holds no tensor longer than
the call it wraps did.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from ffengine.engine import affine, execute, heads, instructions
from ffengine.engine.inputs import InputRows
from ffengine.engine.program import Loop
from ffengine.engine.rows import Rows
from ffengine.nn.layers import LocalLayer, LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops.batch_pass import batch_pass
from ffengine.ops.linear_step import linear_step
from ffengine.ops.local_pass import local_pass
from ffengine.ops.routes import along_routes, routes
from ffengine.ops.weight_update import gradient_update, weight_update
from ffengine.profile import costs

#: What a span's own time counts as.
PARTS = {"forward": "forward", "sweep": "sweep (activation, goodness, loss, norm)",
         "update": "weight update", "linear_step": "linear_step (all three in one)",
         "input_gradient": "input gradient", "maps": "joins, copies, input",
         "head": "heads", "rest": "rest (Python, small ops)"}

Where = dict[str, Any]


@dataclass(frozen=True)
class Watched:
    """A function whose calls are spans.

    owner: class it is a method of, or None. part: of PARTS. where: layer, segment or tile of a
    call, from its arguments. cost: of a call, from its result and arguments; a call with a cost is
    a leaf, what it calls is not noted. relevant: says of the arguments whether to note the call.
    """

    name: str
    function: Callable[..., Any]
    part: str = "rest"
    owner: type | None = None
    where: Callable[..., Where] | None = None
    cost: Callable[..., costs.Cost] | None = None
    relevant: Callable[..., bool] | None = None


class Listener(Protocol):
    """Who is told of spans (ffengine.profile.record)."""

    def open(self, watched: Watched, args: tuple[Any, ...]) -> bool:
        """A call begins; False: it is not noted."""

    def close(self, watched: Watched, result: Any, args: tuple[Any, ...],
              options: dict[str, Any]) -> None:
        """The call that was noted last ends."""


def _turn(at: instructions.Place, i: int, *_: Any) -> Where:
    return {"layer": i, "tile": (at.rows.start, at.rows.count)}


def _second(_: Any, i: int, *__: Any, **___: Any) -> Where:
    """Of functions (ctx or net, layer, ...)."""
    return {"layer": i}


def _segment(_: instructions.Place, loop: Loop, *__: Any) -> Where:
    return {"segment": loop.segment, "name": loop.title.partition(" ")[0]}


def _line(_: Any, line: Any, *__: Any) -> Where:
    return {"layer": line.index}


def _self(layer: Any, *_: Any, **__: Any) -> Where:
    return {"layer": layer}


def _of(sums: affine.GradientSums, *_: Any, **__: Any) -> Where:
    return {"layer": sums.layer}


def _copies(rows: Rows, _: Any) -> bool:
    return bool(rows.half) and rows.stop - rows.start < rows.half


def _shapes(net: LocalNet, i: int, x: Any) -> bool:
    return net.wires[i].pool_before or (isinstance(net.layer(i), LocalLinear) and x.dim() > 2)


def _joins(net: LocalNet, i: int, _: Any, met: bool) -> bool:
    return (net.wires[i].join != "none" and not met) or net.wires[i].branch_pool


def table() -> list[Watched]:
    """Everything that is watched, scopes first."""
    return [
        Watched("segment", execute.run_loop, where=_segment),
        Watched("layer", execute.layer_turn, where=_turn),
        Watched("new state", RecurrentNet.new_state, owner=RecurrentNet, where=_second),
        Watched("inference", LocalLayer.infer, owner=LocalLayer, where=_self),
        Watched("update", affine.update, "update", where=_second),
        Watched("gradients", affine.normalised_gradients, "update", where=_second),
        Watched("gradients", affine.GradientSums.add, "update", affine.GradientSums, where=_of),
        Watched("gradients", affine.GradientSums.done, "update", affine.GradientSums, where=_of),
        Watched("enter", LocalLayer.enter, "forward", LocalLayer, where=_self,
                cost=costs.normalised,
                relevant=lambda layer, *_, **__: layer.pre_norm is not None),
        Watched("operands", LocalLayer.operands, "forward", LocalLayer, where=_self),
        Watched("forward", LocalLayer.preactivation, "forward", LocalLayer, where=_self,
                cost=costs.forward),
        Watched("local_pass", local_pass, "sweep", cost=costs.local_sweep),
        Watched("batch_pass", batch_pass, "sweep", cost=costs.batch_sweep),
        Watched("weight_update", weight_update, "update", cost=costs.update),
        Watched("gradient_update", gradient_update, "update", cost=costs.stepped),
        Watched("linear_step", linear_step, "linear_step", cost=costs.streamed),
        Watched("input_gradient", affine.input_gradient, "input_gradient", cost=costs.crossed),
        Watched("through_norm", affine.through_norm, "input_gradient", where=_self,
                cost=costs.elementwise),
        Watched("along_routes", along_routes, "input_gradient", cost=costs.elementwise),
        Watched("routes", routes, "input_gradient", cost=costs.elementwise),
        Watched("rows", Rows.of, "maps", Rows, cost=costs.copied, relevant=_copies),
        Watched("store", Rows.put, "maps", Rows, cost=costs.put),
        Watched("train_head", heads.train_head, "head", cost=costs.classified),
        Watched("encode", InputRows.of, "maps", InputRows, cost=costs.entered),
        Watched("transform", LocalNet.transform, "maps", LocalNet, where=_second,
                cost=costs.transformed, relevant=_shapes),
        Watched("join", LocalNet.join, "maps", LocalNet, where=_second, cost=costs.joined,
                relevant=_joins),
        Watched("join", instructions.concatenate, "maps", where=_line, cost=costs.concatenated),
        Watched("join", instructions.place, "maps", where=_line, cost=costs.placed),
        Watched("branch", instructions.branch, "maps", where=_line, cost=costs.branched),
    ]


#: Who watches in this context.
_listener: ContextVar[Listener | None] = ContextVar("watching", default=None)


def told(watched: Watched) -> Callable[..., Any]:
    """The function, telling who watches."""
    function = watched.function

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        listener = _listener.get()
        if listener is None or not listener.open(watched, args):
            return function(*args, **options)
        result = function(*args, **options)
        listener.close(watched, result, args, options)
        return result

    @functools.wraps(function)
    def join(net: LocalNet, i: int, z: Any, shortcut: Any, met: bool = False) -> Any:
        # z is the callee's alone: a concatenated map frees it before the branch is pooled
        moved, listener = [z], _listener.get()
        noted = listener is not None and listener.open(watched, (net, i, shortcut, met))
        del z
        result = function(net, i, moved.pop(), shortcut, met)
        if listener is not None and noted:
            listener.close(watched, result, (net, i, shortcut, met), {})
        return result

    return join if function is LocalNet.join else call


#: Where functions are replaced, what stood there, and how many watch.
_places: list[tuple[Any, str, Any]] = []
_watching, _lock = 0, threading.Lock()


@contextlib.contextmanager
def watching(listener: Listener) -> Iterator[None]:
    """Every watched function tells `listener` inside the block, in the block's own context."""
    global _watching
    with _lock:
        if not _watching:
            _replace()
        _watching += 1
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
        with _lock:
            _watching -= 1
            while _places and not _watching:
                setattr(*_places.pop())


def _replace() -> None:
    holders = [m for name, m in sorted(sys.modules.items()) if name.startswith("ffengine.")]
    for watched in table():
        wrapper = told(watched)
        for holder in [watched.owner] if watched.owner else holders:
            for name, value in list(vars(holder).items()):
                if value is watched.function:
                    _places.append((holder, name, value))
                    setattr(holder, name, wrapper)
