"""Runs golden files of positive/negative multilayer perceptrons through the trainer.

Teacher forcing gives every layer (or head) of every step the fp64 reference's own input, rounded,
and the state that the reference's step started from. Under a squared goodness a unit at zero has no
gradient, so relu's edge needs no allowance.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_common import Archive, Errors, draws, in_the_interpreter, rule, sample

from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport, StepContext, Turn
from ffengine.engine.inputs import entrance, rows_of
from ffengine.engine.memory.plan import Plan
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.schedule import Schedule
from ffengine.engine.trainer import Trainer
from ffengine.nn import LocalNet
from ffengine.ops.weight_update import OptimState
from ffengine.reference.weight_update import optimizer_step

Tensors = dict[str, torch.Tensor]
#: Of the reference's rounding: its error is the largest of them.
DRAWS = 5
PRECISION = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Task:
    """One call of Trainer.step."""

    item: Batch
    epoch: int = 0
    iteration: int = 0


class Paired(Archive):
    """A file of one of these families; what the family's module has to say is raised here."""

    def network(self) -> LocalNet:
        """The network as the config describes it."""
        raise NotImplementedError

    def recipe(self) -> Recipe:
        raise NotImplementedError

    def tasks(self) -> list[Task]:
        """The batches, in order."""
        raise NotImplementedError

    def place(self, name: str) -> tuple[str, slice]:
        """(parameter of the network, columns of it) that the file calls `name`."""
        raise NotImplementedError

    def started(self) -> LocalNet:
        """The network with the file's initial values, in fp64."""
        net = self.network().double()
        named = dict(net.named_parameters())
        with torch.no_grad():
            for i, name in enumerate(self.config["param_names"]):
                place, columns = self.place(name)
                part(named[place], columns).copy_(self.initial(i))
        return net

    def adam(self) -> Recipe:
        """The recipe of a file that trains with one constant-rate optimizer."""
        kind, options = self.config.get("optimizer", ("Adam", {}))
        return Recipe(optimizer=kind.lower(), lr=options.get("lr", self.config.get("lr")),
                      betas=tuple(options.get("betas", (0.9, 0.999))), epochs=1,
                      weight_decay=options.get("weight_decay", 0.0))


def part(tensor: torch.Tensor, columns: slice) -> torch.Tensor:
    return tensor[:, columns] if tensor.dim() > 1 else tensor


class Watched(Trainer):
    """A trainer that keeps the gradients its last step handed over; NaN where it did not."""

    grads: Tensors

    def context(self, item: Batch, turn: Turn) -> StepContext:
        """What Trainer gives its schedule, with room for gradients."""
        self.grads = {n: torch.full_like(p, torch.nan) for n, p in self.net.named_parameters()}
        rows = (rows_of(self.net, item.x.shape[0]) if item.features is None
                else item.features.shape[0])
        return StepContext(self.net, self.optimizer, item.y, rows, self.settings.seed, self.steps,
                           self.backend, turn, grads={key(n): t for n, t in self.grads.items()})

    def _train(self, item: Batch, plan: Plan) -> BatchReport:
        ctx = self.context(item, self.schedule.turn(self.epoch, self.iteration))
        return self.schedule.train(ctx, item, plan, self.dtype)


def key(name: str) -> tuple[int | str, str]:
    """The engine's key of a gradient: (0, "weight"), ("heads.0", "bias"), ("net", "gamma")."""
    if "." not in name:
        return "net", name
    group, index, kind = name.split(".", 2)
    return (int(index) if group == "layers" else f"{group}.{index}"), kind


def trainer(golden: Paired, dtype: torch.dtype = torch.float64, backend: str = "reference",
            device: str = "cpu", **options: Any) -> Watched:
    """A trainer of the file's network; 16-bit ones keep fp32 weights."""
    return Watched(golden.started(), recipe=golden.recipe(), precision=PRECISION[dtype],
                   backend=backend, device=device, progress=False, **options)


def snapshot(run: Trainer) -> dict[str, Any]:
    """Weights, statistics and optimizer states by name."""
    out: dict[str, Any] = {n: t.detach().clone() for n, t in tensors_of(run.net)}
    for name, state in run.optimizer.states.items():
        out[f"{name}.step"] = state.step
        out |= {f"{name}.{k}": t.clone() for k, t in (("m", state.m), ("v", state.v))
                if t is not None}
    return out


def tensors_of(net: LocalNet) -> Iterator[tuple[str, torch.Tensor]]:
    yield from net.named_parameters()
    yield from net.named_buffers()


def restore(net: LocalNet, saved: dict[str, Any], run: Trainer | None = None) -> None:
    """The network's tensors as saved; the trainer's optimizer states too, zero if not saved."""
    with torch.no_grad():
        for name, tensor in tensors_of(net):
            tensor.copy_(saved[name])
    for name, state in (run.optimizer.states if run else {}).items():
        state.step = saved.get(f"{name}.step", 0)
        for k, tensor in (("m", state.m), ("v", state.v)):
            if tensor is not None:
                tensor.copy_(saved.get(f"{name}.{k}", torch.zeros(())))


@dataclass
class Step:
    """The fp64 reference at one step of a trajectory."""

    task: Task
    lr: dict[str, float]
    before: dict[str, Any]
    after: dict[str, Any]
    report: BatchReport
    grads: Tensors


@dataclass
class Trajectory:
    """The file's training in fp64 on the reference, and the trainer it leaves."""

    golden: Any
    trainer: Watched
    steps: list[Step]


@functools.lru_cache(maxsize=1)
def trajectory(kind: type[Paired], path: Path) -> Trajectory:
    golden = kind.open(path)
    run, steps = trainer(golden), []
    for task in golden.tasks():
        before = snapshot(run)
        report = run.step(task.item, epoch=task.epoch, iteration=task.iteration)
        rates = {n: run.optimizer.config(p).lr for n, p in run.net.named_parameters()}
        steps.append(Step(task, rates, before, snapshot(run), report, run.grads))
    return Trajectory(golden, run, steps)


def note_tensors(errors: Errors, golden: Paired, row: int, after: dict[str, Any],
                 grads: Tensors) -> None:
    """Every named tensor after step `row` and the gradient it had, as digests and samples."""
    for p, name in enumerate(golden.config["param_names"]):
        place, columns = golden.place(name)
        for prefix, held, at in (("", after, row + 1), ("g", grads, row)):
            got = part(held[place], columns)
            errors.note_digest(f"{prefix}digest", got, golden.arrays[f"{prefix}digest"][at][p])
            errors.note(f"{prefix}sample", sample(got), golden.arrays[f"{prefix}sample"][at][p])


def note_whole(errors: Errors, golden: Paired, prefix: str, after: dict[str, Any],
               row: Any = (), only: str = "") -> None:
    """Tensors that the file holds in full: steps.<name>[row], final.<name>."""
    for name in golden.config["param_names"]:
        place, columns = golden.place(name)
        if f"{prefix}.{name}" in golden.arrays and place.startswith(only):
            errors.note(prefix, part(after[place], columns), golden.arrays[f"{prefix}.{name}"][row])


def note_start(errors: Errors, golden: Paired) -> None:
    for p in range(len(golden.config["param_names"])):
        errors.note_digest("initial digest", golden.initial(p), golden.arrays["digest"][0][p])
        errors.note("initial sample", sample(golden.initial(p)), golden.arrays["sample"][0][p])


class Only(Schedule):
    """One layer's or one head's turn, on features."""

    def __init__(self, now: Turn) -> None:
        self.now = now

    def turn(self, epoch: int, iteration: int) -> Turn:
        return self.now


def turns_of(run: Trajectory, step: Step) -> Iterator[tuple[Turn, torch.Tensor]]:
    """(whose turn, its input (rows, features) in fp64) of all that trained in a step."""
    net, report = run.golden.started(), step.report
    restore(net, step.before)
    x = step.task.item.x.double()
    for h, result in enumerate(report.heads):
        if result is not None:
            yield Turn((), 0, heads=(h,)), net.head_features(net.heads[h], x, backend="reference")
    trained = [i for i, loss in enumerate(report.losses) if loss is not None]
    if not trained:
        return
    item = step.task.item
    count = rows_of(net, len(item.y)) if item.features is None else len(item.features)
    ctx = StepContext(net, run.trainer.optimizer, item.y, count, backend="reference")
    rows = entrance(ctx, item, torch.float64)
    if net.propagate == "updated":
        restore(net, step.after)
    # in odd steps the next layer asks for z: a layer that nobody reads is streamed, never stored
    further = (step.task.epoch + step.task.iteration) % 2
    for i in range(trained[-1] + 1):
        rows = net.transform(i, rows)
        if i in trained:
            yield Turn((i,), min(i + 1 + further, len(net.layers)), start=i), rows
        rows, _ = net.layer(i).infer(rows, backend="reference")


def outcome(turn: Turn, report: BatchReport, grads: Tensors, after: dict[str, Any]) -> Tensors:
    """What a turn leaves, in words: goodness or logits, losses, gradients, weights."""
    if turn.heads:
        loss, logits = report.heads[turn.heads[0]]
        owner, out = f"heads.{turn.heads[0]}.", {"logits": logits, "loss": loss}
    else:
        i = turn.layers[0]
        owner, out = f"layers.{i}.", {"goodness": report.goodness[i], "loss": report.row_losses[i]}
        out |= {f"statistics {n}": after[n] for n in after if n == f"{owner}running_mean"}
        out |= {"penalty": report.penalties[i]} if i in report.penalties else {}
    out |= {f"gradient {n}": g for n, g in grads.items() if n.startswith(owner)}
    out |= {f"weight {n}": after[n] for n in grads if n.startswith(owner)}
    return {name: tensor.cpu() for name, tensor in out.items()}


def forced(run: Trajectory, dtype: torch.dtype, backend: str, device: str = "cpu",
           steps: int | None = None, draw: int = 0) -> list[Tensors]:
    """Every turn of the trajectory on a back-end: each from the reference's input and state.

    draw: which of golden_common's draws of the input.
    """
    ours, found = trainer(run.golden, dtype, backend, device, schedule=Only(Turn((), 0))), []
    for step in run.steps[:steps]:
        for turn, features in turns_of(run, step):
            restore(ours.net, step.before, ours)
            ours.schedule.now = turn
            seen = draws(features, dtype)[draw] if draw else features
            report = ours.step(replace(step.task.item, features=seen.to(dtype)),
                               epoch=step.task.epoch)
            found.append(outcome(turn, report, ours.grads, snapshot(ours)))
    return found


def exact(run: Trajectory, steps: int | None) -> list[tuple[Step, torch.Tensor, Tensors]]:
    """The same turns as the trajectory itself took them: step, input, outcome."""
    return [(step, features, outcome(turn, step.report, step.grads, step.after))
            for step in run.steps[:steps] for turn, features in turns_of(run, step)]


def forced_errors(run: Trajectory, dtype: torch.dtype, got: list[Tensors],
                  steps: int | None = None) -> list[str]:
    """What breaks the rule in a back-end's turns (of all steps, or the first ones)."""
    lines: list[str] = []
    same = list(zip(*(forced(run, dtype, "reference", steps=steps, draw=d)
                      for d in range(DRAWS)), strict=True))
    for t, ((step, features, right), mine) in enumerate(zip(exact(run, steps), got, strict=True)):
        rows, fan_in = features.shape
        for name, value in right.items():
            if not name.startswith("weight "):
                length = fan_in + 1 + rows * name.startswith("gradient")
                lines += breaks(f"turn {t}, {name}", mine, value, same[t], dtype, length)
        grads = {n.removeprefix("gradient "): g for n, g in right.items() if "gradient" in n}
        for name in grads:
            lines += [f"turn {t}, {line}" for line in check_weights(
                run.trainer, step.lr[name], step.before, {name: grads[name]}, step.after, mine,
                same[t], dtype, rows)]
    return lines


def breaks(where: str, got: Tensors, value: torch.Tensor, same: Sequence[Tensors],
           dtype: torch.dtype, length: int) -> list[str]:
    """A line if got[name] breaks the rule; `where` ends in the name."""
    name = where.split(", ")[-1]
    error = (got[name].double() - value).abs().max().item()
    limit = rule(value, [s[name] for s in same], dtype, length)
    return [] if error <= limit else [f"{where}: error {error:.3e} > bound {limit:.3e}"]


def check_weights(run: Trainer, lr: float, before: dict[str, Any], grads: Tensors,
                  after: dict[str, Any], got: Tensors, same: Sequence[Tensors],
                  dtype: torch.dtype, rows: int) -> list[str]:
    """Stepped weights, where the gradient exceeds the rule's bound (Adam turns rounding of a
    near-zero gradient into a whole step)."""
    lines = []
    for name, grad in grads.items():
        length, value = before[name].shape[-1] + rows + 1, after[name]
        limit = rule(grad, [s[f"gradient {name}"] for s in same], dtype, length)
        allowed = rule(value, [s[f"weight {name}"] for s in same], dtype, length) + moved(
            run, lr, before, name, grad, limit)
        over = (got[f"weight {name}"].double() - value).abs() - allowed
        sure = grad.abs() > limit
        if sure.any() and not over[sure].max() <= 0:
            lines.append(f"weight {name}: {over[sure].max():.3e} above its bound")
    return lines


def moved(run: Trainer, lr: float, before: dict[str, Any], name: str, grad: torch.Tensor,
          limit: float) -> torch.Tensor:
    """How far the optimizer moves a weight when its gradient is off by the rule's bound."""
    config = replace(run.optimizer.config(run.optimizer.named[name]), lr=lr)
    ends = []
    for shift in (0.0, limit, -limit):
        state = OptimState.create(grad, config)
        m, v = (None if t is None else before.get(f"{name}.{k}", t).clone()
                for k, t in (("m", state.m), ("v", state.v)))
        weight = before[name].clone()
        optimizer_step(weight, grad + shift, m, v, config, before.get(f"{name}.step", 0) + 1)
        ends.append(weight)
    return torch.maximum((ends[1] - ends[0]).abs(), (ends[2] - ends[0]).abs())


def check_forced(kind: type[Paired], path: Path, backend: str, dtype: torch.dtype,
                 device: str = "cpu") -> None:
    run = trajectory(kind, path)
    lines = forced_errors(run, dtype, forced(run, dtype, backend, device))
    assert not lines, "\n".join(lines)


def check_interpreted(kind: type[Paired], path: Path, folder: Path, script: Path) -> None:
    """The first turns through Triton's interpreter, in a process of their own."""
    found = in_the_interpreter(script, path, folder / "turns.npz")
    got: list[Tensors] = []
    for name, tensor in found.items():
        turn, _, what = name.partition(" ")
        got += [{} for _ in range(int(turn) + 1 - len(got))]
        got[int(turn)][what] = tensor
    lines = forced_errors(trajectory(kind, path), torch.float32, got, steps=1)
    assert not lines, "\n".join(lines)


def save_forced(kind: type[Paired], path: str, out: str) -> None:
    """`python golden_X.py FILE OUT.npz`: what check_interpreted reads."""
    turns = forced(trajectory(kind, Path(path)), torch.float32, "triton", steps=1)
    np.savez(out, **{f"{t} {n}": v.double().numpy() for t, turn in enumerate(turns)
                     for n, v in turn.items()})
