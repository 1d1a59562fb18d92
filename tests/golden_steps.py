"""Training steps of whole networks: exact trajectories, and steps and layers forced on back-ends.

The rules are those of golden_df_checks: forced steps start from the fp64 reference's weights,
running statistics and optimizer states; forced layers also get its inputs, rounded.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from golden_common import DTYPES, EXACT, FP64, Archive, Envelope, Errors, draws, rule, sample

from ffengine.engine.batch import Batch
from ffengine.engine.context import StepContext, Turn
from ffengine.engine.execute import train_batch
from ffengine.engine.inputs import entrance, rows_of
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.shapes import measure
from ffengine.engine.optim import LocalOptimizer, own_settings
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.schedule import Schedule
from ffengine.engine.trainer import Trainer
from ffengine.nn import LocalNet
from ffengine.ops.optim import OptimConfig
from ffengine.reference.weight_update import optimizer_step

Tensors = dict[str, torch.Tensor]


@dataclass
class Moment:
    """The fp64 reference at one step: what it starts from, trains on and leaves."""

    batch: Batch
    epoch: int
    iteration: int
    before: dict[str, torch.Tensor | int]
    outcome: Tensors


class Stepper:
    """A network in training, one schedule step at a time, with every gradient handed out."""

    def __init__(self, net: LocalNet, schedule: Schedule, optim: OptimConfig, dtype: torch.dtype,
                 backend: str = "reference", epochs: int = 1) -> None:
        self.device = place_of(backend)
        self.net = net.to(self.device, FP64 if dtype is FP64 else torch.float32)
        self.schedule, self.dtype, self.backend = schedule, dtype, backend
        schedule.begin(net, epochs)
        trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        self.optimizer = LocalOptimizer(trained, optim, own=own_settings(net, optim),
                                        second=schedule.owners())

    def step(self, batch: Batch, epoch: int, iteration: int) -> Tensors:
        """Goodness, losses, gradients, weights and statistics by name, of what was in turn."""
        batch = placed(batch, self.device)
        ctx = self.context(batch, self.schedule.turn(epoch, iteration))
        plan = breadth_first(self.net, ctx.batch, self.dtype, self.backend)
        report = self.schedule.train(ctx, batch, plan, self.dtype)
        return self.outcome(ctx, report)

    def layer(self, i: int, batch: Batch, x: torch.Tensor) -> Tensors:
        """The turn of layer i alone, on its own input x (rows, ...)."""
        item = placed(replace(batch, features=x.to(self.dtype)), self.device)
        ctx = self.context(item, Turn((i,), i + 1, start=i))
        plan = breadth_first(self.net, ctx.batch, self.dtype, self.backend)
        return self.outcome(ctx, train_batch(ctx, item, plan, self.dtype))

    def context(self, batch: Batch, turn: Turn) -> StepContext:
        grads = {split(name): torch.full_like(p, torch.nan)
                 for name, p in self.net.named_parameters()}
        return StepContext(self.net, self.optimizer, batch.y, rows_of(self.net, len(batch.x)),
                           backend=self.backend, turn=turn, grads=grads)

    def outcome(self, ctx: StepContext, report) -> Tensors:
        out = {f"goodness {i}": g for i, g in enumerate(report.goodness) if g is not None}
        out |= {f"loss {i}": v for i, v in enumerate(report.losses) if v is not None}
        out |= {f"head loss {h}": made[0] for h, made in enumerate(report.heads) if made}
        out |= {f"gradient {'.'.join(map(str, key))}": g.clone()
                for key, g in ctx.grads.items() if not g.isnan().all()}
        out |= {f"weight {word(n)}": p.detach().clone() for n, p in self.net.named_parameters()}
        out |= {f"statistic {word(n)}": b.clone() for n, b in self.net.named_buffers()
                if b.is_floating_point()}
        return {key: t.cpu() for key, t in out.items()}

    def snapshot(self) -> dict[str, torch.Tensor | int]:
        """Weights, running statistics and optimizer states by name."""
        out: dict[str, torch.Tensor | int] = {n: t.detach().clone() for n, t in tensors(self.net)}
        for name, state in self.optimizer.states.items():
            out[f"{name}:step"] = state.step
            out |= {f"{name}:{k}": t.clone() for k, t in (("m", state.m), ("v", state.v))
                    if t is not None}
        return out

    def restore(self, saved: dict[str, torch.Tensor | int]) -> None:
        with torch.no_grad():
            for name, t in tensors(self.net):
                t.copy_(saved[name])
            for name, state in self.optimizer.states.items():
                state.step = saved[f"{name}:step"]
                for k, t in (("m", state.m), ("v", state.v)):
                    if t is not None:
                        t.copy_(saved[f"{name}:{k}"])


def place_of(backend: str) -> torch.device:
    """A GPU for the back-ends that want one; Triton's interpreter does without."""
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def placed(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(t if t is None else t.to(device) for t in (
        batch.x, batch.y, batch.negatives, batch.hidden, batch.features, batch.below)))


def tensors(net: LocalNet) -> list[tuple[str, torch.Tensor]]:
    return [*net.named_parameters(), *((n, b) for n, b in net.named_buffers()
                                       if b.is_floating_point())]


def word(name: str) -> str:
    """A parameter's name as gradients have it: without the list it stands in."""
    return name.removeprefix("layers.")


def split(name: str) -> tuple[int | str, str]:
    """(layer, name in it), or (head or encoding, name in it): the engine's key of a gradient."""
    parts = name.split(".")
    if parts[0] == "layers":
        return int(parts[1]), ".".join(parts[2:])
    return ".".join(parts[:-1]), parts[-1]


def breadth_first(net: LocalNet, rows: int, dtype: torch.dtype, backend: str) -> Plan:
    plans = Planner(measure(net, rows, dtype, states=2, backend=backend))
    return plans.fixed(range(plans.depth - 1), rows)


def run(stepper: Stepper, batches: Iterable[tuple[Batch, int, int]]) -> list[Moment]:
    """Train on (batch, epoch, iteration) in order."""
    out = []
    for batch, epoch, iteration in batches:
        before = stepper.snapshot()
        out.append(Moment(batch, epoch, iteration, before,
                          stepper.step(batch, epoch, iteration)))
    return out


def settings(given: tuple[str, dict[str, Any]]) -> OptimConfig:
    """An optimizer as torch's defaults describe it."""
    kind, options = given
    known = {k: options[k] for k in ("lr", "eps", "weight_decay", "momentum", "nesterov")
             if k in options}
    return OptimConfig(kind.lower(), betas=tuple(options.get("betas", (0.9, 0.999))), **known)


def trainer_leaves(net: LocalNet, schedule: Schedule, optim: OptimConfig,
                   moments: list[Moment]) -> None:
    """Trainer.step, with a plan of its own, leaves the same losses, weights and statistics."""
    recipe = Recipe(optimizer=optim.kind, lr=optim.lr, betas=optim.betas, epochs=1,
                    weight_decay=optim.weight_decay, momentum=optim.momentum)
    trainer = Trainer(net, backend="reference", precision="fp64", schedule=schedule,
                      progress=False, recipe=recipe)
    errors = Errors(EXACT)
    for moment in moments:
        report = trainer.step(moment.batch, epoch=moment.epoch, iteration=moment.iteration)
        errors.note("loss", [v for v in report.losses if v is not None],
                    [v for k, v in moment.outcome.items() if k.startswith("loss ")])
    for name, value in tensors(net):
        kind = "weight" if isinstance(value, torch.nn.Parameter) else "statistic"
        errors.note(kind, value.detach(), moments[-1].outcome[f"{kind} {word(name)}"])
    errors.check()


def note_tensors(errors: Errors, golden: Archive, moments: list[Moment],
                 names: dict[str, str]) -> None:
    """Digests and samples of tensors and gradients after every step, and the final tensors.

    names: what the file calls a tensor -> the network's name.
    """
    arrays = golden.arrays
    for p, name in enumerate(golden.config["param_names"]):
        key, values = names[name], [golden.initial(p)]
        kind = "statistic" if "running" in key else "weight"
        for t, moment in enumerate(moments):
            values.append(moment.outcome[f"{kind} {word(key)}"])
            grad = moment.outcome.get(f"gradient {word(key)}")
            if grad is None:
                assert np.isnan(arrays["gdigest"][t][p]).all(), f"{name} had no step {t}"
                continue
            errors.note_digest("gdigest", grad, arrays["gdigest"][t][p])
            errors.note("gsample", sample(grad), arrays["gsample"][t][p])
        for t, value in enumerate(values):
            errors.note_digest("digest", value, arrays["digest"][t][p])
            errors.note("sample", sample(value), arrays["sample"][t][p])
        if f"final.{name}" in arrays:
            errors.note("final", values[-1], arrays[f"final.{name}"])
        if f"steps.{name}" in arrays:
            errors.note("steps", torch.stack(values[1:]), arrays[f"steps.{name}"])


def check_steps(make: Callable[[torch.dtype, str], Stepper], moments: list[Moment],
                dtype: torch.dtype, backend: str) -> None:
    """Each step from the reference's state: goodness, losses, gradients, steady weights."""
    same, ours = make(dtype, "reference"), make(dtype, backend)
    worst: list[str] = []
    for t, moment in enumerate(moments):
        drawn = []
        for batch in nudged(moment.batch, dtype):
            same.restore(moment.before)
            drawn.append(same.step(batch, moment.epoch, moment.iteration))
        ours.restore(moment.before)
        got = ours.step(moment.batch, moment.epoch, moment.iteration)
        worst += [f"step {t}, {line}" for line in compared(
            ours, moment, moment.outcome, drawn, got, dtype, depths)]
    assert not worst, "\n".join(worst)


def forced_checks(make: Callable[[torch.dtype, str], Stepper], moments: list[Moment],
                  backend: str) -> dict[str, Callable[[], None]]:
    """Name and check of the last step's layers and of every step, on one back-end."""
    return {f"{form}, {backend} {name}": functools.partial(check, make, some, dtype, backend)
            for name, dtype in DTYPES.items()
            for form, check, some in (("layers", check_layers, moments[-1:]),
                                      ("steps", check_steps, moments))}


def nudged(batch: Batch, dtype: torch.dtype) -> list[Batch]:
    """`draws` of what the batch's first layer is given."""
    if batch.features is None:
        return [replace(batch, x=x) for x in draws(batch.x, dtype)]
    return [replace(batch, features=x) for x in draws(batch.features, dtype)]


def check_layers(make: Callable[[torch.dtype, str], Stepper], moments: list[Moment],
                 dtype: torch.dtype, backend: str) -> None:
    """Each layer from the reference's input and weights."""
    exact, same, ours = (make(d, b) for d, b in (
        (FP64, "reference"), (dtype, "reference"), (dtype, backend)))
    worst: list[str] = []
    for t, moment in enumerate(moments):
        exact.restore(moment.before)
        for i, x in enumerate(layer_inputs(exact, moment.batch)):
            results = []
            for stepper in (exact, same, ours):
                stepper.restore(moment.before)
                results.append(stepper.layer(i, moment.batch, x))
            worst += [f"step {t}, layer {i}: {line}" for line in compared(
                ours, moment, results[0], results[1:2], results[2], dtype, reductions)]
    assert not worst, "\n".join(worst)


def layer_inputs(stepper: Stepper, batch: Batch) -> list[torch.Tensor]:
    """What every layer is given in training, in fp64."""
    other = copy.deepcopy(stepper.net)
    ctx = StepContext(other, stepper.optimizer, batch.y, rows_of(other, len(batch.x)))
    with torch.no_grad():
        rows = entrance(ctx, batch, FP64)
        zs: list[torch.Tensor] = []
        other.run(rows, training=True, backend="reference", features=zs)
    return [rows, *zs[:-1]]


#: Pre-activations of a batch that the interpreter is given; it takes 5e4 elements a second.
INTERPRETED = 50_000


def interpretable(net: LocalNet, batch: Batch) -> bool:
    """A pass over every layer takes Triton's interpreter seconds."""
    shapes = [net.layer(i).out_shape(net.input_of(i, net.shapes[i]))
              for i in range(len(net.layers))]
    return rows_of(net, len(batch.x)) * sum(math.prod(a) for a in shapes) <= INTERPRETED


def reductions(net: LocalNet, rows: int) -> list[int]:
    """Lengths of every layer's sums: fan-in, and the pixels of all rows."""
    out = []
    for i in range(len(net.layers)):
        layer = net.layer(i)
        a = layer.out_shape(net.input_of(i, net.shapes[i]))
        out.append(layer.weight[0].numel() + rows * int(np.prod(a[1:])))
    return out


def depths(net: LocalNet, rows: int) -> list[int]:
    """The same, the fan-ins being those of all layers below and of the one whose loss arrives."""
    fans = np.cumsum([net.layer(i).weight[0].numel() for i in range(len(net.layers))])
    fans = [*fans[1:], fans[-1]]
    return [length - net.layer(i).weight[0].numel() + int(fans[i])
            for i, length in enumerate(reductions(net, rows))]


def compared(stepper: Stepper, moment: Moment, exact: Tensors, same: list[Tensors], got: Tensors,
             dtype: torch.dtype, sums: Callable[[LocalNet, int], list[int]]) -> list[str]:
    """What of `got` breaks the rule."""
    assert exact.keys() == got.keys(), sorted(exact.keys() ^ got.keys())
    out, limits, envelope = [], {}, Envelope(dtype)
    lengths = sums(stepper.net, rows_of(stepper.net, len(moment.batch.x)))
    for key in sorted(exact, key=place):
        if key.startswith("weight "):
            continue
        length = lengths[min(place(key)[0], len(lengths) - 1)]
        kind = " ".join((key.split(" ")[0], key.split(".")[-1] if "." in key else ""))
        limits[key] = envelope.limit(kind, exact[key], [d[key] for d in same], length)
        error = (got[key].double() - exact[key]).abs().max().item()
        if not error <= limits[key]:
            out.append(f"{key}: error {error:.3e} > bound {limits[key]:.3e}")
    for key in [k for k in exact if k.startswith("gradient ")]:
        weight = key.replace("gradient", "weight")
        length = lengths[min(place(key)[0], len(lengths) - 1)]
        allowed = rule(exact[weight], [d[weight] for d in same], dtype, length) + moved(
            stepper, moment, key.removeprefix("gradient "), exact[key], limits[key])
        over = (got[weight].double() - exact[weight]).abs() - allowed
        sure = exact[key].abs() > limits[key]
        if sure.any() and not over[sure].max() <= 0:
            out.append(f"{weight}: {over[sure].max():.3e} above its bound")
    return out


def place(key: str) -> tuple[int, str]:
    """Where in the network a result belongs: its layer; heads come last, encodings first."""
    where = key.split(" ")[-1].split(".")[0]
    if key.startswith("head") or where == "heads":
        return 1 << 20, key
    return (int(where) if where.isdigit() else 0), key


def moved(stepper: Stepper, moment: Moment, name: str, grad: torch.Tensor,
          limit: float) -> torch.Tensor:
    """How far the optimizer moves a weight when its gradient is off by the rule's bound."""
    full = f"layers.{name}" if name[0].isdigit() else name
    parameter = stepper.optimizer.named[full]
    owner = next(o for o, s in stepper.optimizer.states.items()
                 if o.split("@")[0] == full and s.step != moment.before[f"{o}:step"])
    after = []
    for shift in (0.0, limit, -limit):
        weight = moment.before[full].clone()
        m, v = (moment.before[k].clone() if k in moment.before else None
                for k in (f"{owner}:m", f"{owner}:v"))
        optimizer_step(weight, grad + shift, m, v, stepper.optimizer.config(parameter),
                       int(moment.before[f"{owner}:step"]) + 1)
        after.append(weight)
    return torch.maximum((after[1] - after[0]).abs(), (after[2] - after[0]).abs())
