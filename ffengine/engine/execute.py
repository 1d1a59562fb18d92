"""Runs a step's program (program.py): tiles, layers, instructions.

Every plan gives the same gradients: losses scale by the whole batch, features come from the weights
before the step (or, with propagate="updated", after it), and the optimizer steps when the last tile
has been added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from types import FunctionType

import torch

from ffengine.engine import instructions
from ffengine.engine.batch import Batch
from ffengine.engine.compiling import compile_step
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.instructions import Place, Tensors
from ffengine.engine.memory.plan import Plan
from ffengine.engine.parallel import stage_ops
from ffengine.engine.program import Facts, Instruction, Loop, Program, Store
from ffengine.engine.rows import Rows, empty
from ffengine.engine.schedules import backprop_ops, collaborative_ops, frames, overlap_ops
from ffengine.nn.network import LocalNet

MODULES = (instructions, overlap_ops, frames, collaborative_ops, backprop_ops, stage_ops)
#: The module of every op, where profiles find it by its name.
HOME = {name: module for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__
        and "line" in value.__annotations__}

Compiler = Callable[[LocalNet, Plan, Facts], Program]


def train_batch(ctx: StepContext, item: Batch | torch.Tensor, plan: Plan, dtype: torch.dtype,
                compiled: Compiler = compile_step) -> BatchReport:
    """One step: the layers of the turn train on the batch, and then the heads."""
    turn = ctx.whose()
    first = turn.start if isinstance(item, Batch) and item.features is not None else 0
    program = compiled(ctx.net, plan, Facts(turn, ctx.batch, first, plan.roomy,
                                            ctx.sums is not None, ctx.clock is not None))
    tensors = {"batch": item}
    del item
    with torch.no_grad():
        execute(program, ctx, dtype, tensors)
    ctx.optimizer.mark_stepped()
    return ctx.report()


def execute(program: Program, ctx: StepContext, dtype: torch.dtype, tensors: Tensors) -> None:
    """Run a step on the tensors it starts from, which are taken out as the program frees them."""
    at = Place(ctx, dtype, Rows(0, ctx.batch))
    for part in program.parts:
        if isinstance(part, Loop):
            run_loop(at, part, tensors)
        else:
            perform(at, part, tensors)


def run_loop(at: Place, loop: Loop, tensors: Tensors) -> None:
    """A segment over the whole batch."""
    count, half = at.ctx.batch, 0
    if loop.pairs:
        count = half = count // 2
    if loop.whole(at.ctx.batch):
        through_layers(replace(at, rows=Rows(0, count, half)), loop.lines, tensors)
        return
    whole = {store.name: room(at, tensors, store) for store in loop.stores}
    kept: Tensors = {to: [] for _, to in loop.keeps}
    for start in range(0, count, loop.size):
        rows = Rows(start, min(start + loop.size, count), half)
        mine: Tensors = {name: rows.of(tensors[name]) for name in loop.reads}
        mine |= {name: tensors[name] for name in loop.shares}
        through_layers(replace(at, rows=rows, finish=rows.stop == count), loop.lines, mine)
        for name, to in whole.items():
            rows.put(to, mine[name])
        for name, to_all in loop.keeps:
            kept[to_all].append(mine[name])
        del mine  # or its maps would live through the next tile
    tensors |= kept | whole
    for name in loop.frees:
        del tensors[name]


def through_layers(at: Place, lines: Sequence[Instruction], tensors: Tensors) -> None:
    """A tile, or the whole batch, through the layers that the lines are of."""
    for i, of_layer in groupby(lines, attrgetter("index")):
        layer_turn(at, i, of_layer, tensors)


def layer_turn(at: Place, i: int, lines: Iterable[Instruction], tensors: Tensors) -> None:
    """All instructions of layer i."""
    for line in lines:
        perform(at, line, tensors)


def room(at: Place, tensors: Tensors, store: Store) -> torch.Tensor:
    """The whole-batch map that tiles write: over another where the shapes agree, else new."""
    over: torch.Tensor | None = tensors.get(store.over or "")
    if over is not None and tuple(over.shape[1:]) == store.shape:
        return over
    return empty(at.ctx.y, at.ctx.batch, store.shape, store.dtype or at.dtype)


def perform(at: Place, line: Instruction, tensors: Tensors) -> None:
    """One instruction. It is handed what it frees, and may let go of it before it ends."""
    given = {role: tensors.pop(name) if name in line.frees else tensors[name]
             for role, name in line.reads}
    if line.op not in HOME:
        raise ValueError(f"[program] expected an instruction of {', '.join(HOME)}, got {line.op!r}")
    made = getattr(HOME[line.op], line.op)(at, line, given)
    given.clear()
    tensors.update((name, t) for name, t in zip(line.writes, made, strict=True)
                   if name not in line.frees)
    del made
    if at.ctx.hook is not None:
        at.ctx.hook(at, line)
