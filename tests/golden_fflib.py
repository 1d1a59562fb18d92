"""FFLib's files (FFNN, FFNN+C, FFRNN, sparsity), through the models' own builders.

FFRNN is forced frame by frame: each starts from the fp64 reference's states and weights.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from golden_common import DTYPES, EXACT, Archive, Errors, draws
from golden_paired import (
    DRAWS,
    Paired,
    Task,
    Tensors,
    Watched,
    breaks,
    check_forced,
    check_interpreted,
    check_weights,
    note_start,
    note_tensors,
    note_whole,
    restore,
    save_forced,
    snapshot,
    trainer,
    trajectory,
)

from ffengine.analysis.sparsity import KINDS, sparsity, statistics
from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.execute import perform, run_loop
from ffengine.engine.instructions import Place
from ffengine.engine.memory.plan import one_tile
from ffengine.engine.program import Facts, Instruction, Loop
from ffengine.engine.rows import Rows
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.frames import neighbours
from ffengine.engine.schedules.recurrent import Recurrent
from ffengine.models import fflib
from ffengine.nn import LocalNet, RecurrentNet
from ffengine.nn.readout import above
from ffengine.nn.recurrent import lengths
from ffengine.ops.memory_accounting import is_fake


class Feedforward(Paired):
    """fflib_ffnet_*, fflib_ffc_*: flat samples, seen as maps of one pixel."""

    @property
    def ff_steps(self) -> int:
        return len(self.arrays["y_neg"])

    def options(self) -> dict[str, Any]:
        c = self.config
        return {"num_classes": self.arrays["y_neg"].shape[-1], "in_channels": c["dims"][0],
                "image_size": 1, "layers": tuple(c["dims"][1:]), "theta": c["threshold"],
                "maximize": c["maximize"]}

    def network(self) -> LocalNet:
        if "classifier_lr" in self.config:
            return fflib.ffnn_c(**self.options(), classifier_lr=self.config["classifier_lr"])
        net = fflib.ffnn(**self.options())
        start, stop = self.config.get("layer_range") or (0, len(net.layers))
        net.set_range(start, stop - 1)
        return net

    def recipe(self) -> Recipe:
        """FFNN+C trains its layers in epoch 0 and its head in epoch 1."""
        return replace(self.adam(), epochs=1 + ("classifier_lr" in self.config))

    def tasks(self) -> list[Task]:
        x, y, other = self.tensor("x"), self.labels("y"), self.tensor("y_neg")
        plain = self.ff_steps
        return [Task(Batch(pixels(x[t]), y[t], other[t]), 0, t) for t in range(plain)] + [
            Task(Batch(pixels(x[t]), y[t]), 1, t - plain) for t in range(plain, len(x))]

    def place(self, name: str) -> tuple[str, slice]:
        return name.replace("classifier.", "heads.0."), slice(None)


def pixels(x: torch.Tensor) -> torch.Tensor:
    """Vectors (N, C) as maps (N, C, 1, 1)."""
    return x[..., None, None]


def check_training(path: Path) -> None:
    """Losses, goodness, gradients and weights of every step; the classifier's too."""
    run, errors = trajectory(Feedforward, path), Errors(EXACT)
    golden, arrays = run.golden, run.golden.arrays
    note_start(errors, golden)
    for t, step in enumerate(run.steps):
        note_tensors(errors, golden, t, step.after, step.grads)
        note_whole(errors, golden, "steps", step.after, t)
        report, late = step.report, t - golden.ff_steps
        if late >= 0:
            loss, logits = report.heads[0]
            errors.note("classifier.loss", loss, arrays["classifier.loss"][late])
            errors.note("classifier.logits", logits, arrays["classifier.logits"][late])
            continue
        errors.note("loss", torch.stack(report.losses), arrays["loss"][t])
        note_halves(errors, arrays, "loss", report.row_losses, t)
        note_halves(errors, arrays, "msq", report.goodness, t)
    note_whole(errors, golden, "final", run.steps[-1].after)
    errors.check()


def note_halves(errors: Errors, arrays: dict[str, np.ndarray], name: str,
                values: list[torch.Tensor], at: Any) -> None:
    """Per layer the positive and the negative rows of (2B,) or (2B, 1)."""
    for half, rows in zip(("pos", "neg"), torch.stack([v.flatten() for v in values]).chunk(2, 1),
                          strict=True):
        if f"{name}_{half}" in arrays:
            errors.note(f"{name}_{half}", rows, arrays[f"{name}_{half}"][at])


def check_validation(path: Path) -> None:
    """Every label tried, the scores, the classifier, and how sparse the weights became."""
    run, errors = trajectory(Feedforward, path), Errors(EXACT)
    golden, arrays, net = run.golden, run.golden.arrays, run.trainer.net
    x, theta = pixels(golden.tensor("val.x")), golden.config["threshold"]
    scores = net(x)
    errors.note("val.pred", scores.argmax(1), arrays["val.pred"])
    if "val.layer_goodness" in arrays:
        made = torch.stack(net.goodness(x, backend="reference")).permute(2, 0, 1)
        errors.note("val.layer_goodness", above(made, theta),
                    arrays["val.layer_goodness"])
    if "val.class_goodness" in arrays:
        errors.note("val.class_goodness", scores if net.readout.maximize else -scores,
                    arrays["val.class_goodness"])
    if "val.logits" in arrays:
        errors.note("val.logits", net.logits(x, backend="reference")[0].detach(),
                    arrays["val.logits"])
    note_sparsity(errors, golden, run.steps[-1].after)
    if "stats" in arrays:
        errors.note("stats", [[statistics(p) for p in (layer.weight, layer.bias)]
                              for layer in net.layers], arrays["stats"])
    errors.check()


def note_sparsity(errors: Errors, golden: Paired, after: dict[str, Any]) -> None:
    """[type, layer]; the published "fw+bw" is of fw and the bias."""
    if "sparsity" not in golden.arrays:
        return
    names = golden.config["param_names"]
    keys = golden.config.get("sparsity_keys") or [
        n.removesuffix(".weight") for n in names if n.endswith(".weight")]
    for column, key in enumerate(keys):
        owner = key.replace("layer_", "layers.")
        wanted = [owner if owner in names else f"{owner}.weight"]
        if owner.endswith("fw+bw"):
            wanted = [owner.replace("fw+bw", kind) for kind in ("fw", "fb")]
        values = torch.cat([columns_of(golden, after, n).flatten() for n in wanted])
        errors.note("sparsity", measures(golden, values), golden.arrays["sparsity"][:, column])


def columns_of(golden: Paired, after: dict[str, Any], name: str) -> torch.Tensor:
    place, columns = golden.place(name)
    return after[place][:, columns] if after[place].dim() > 1 else after[place]


def measures(golden: Archive, values: torch.Tensor) -> list[float]:
    """The file's measures, NaN at exact zeros as published."""
    named = dict(zip(("HOYER", "L1_NEG_ENTROPY", "L2_NEG_ENTROPY", "GINI"), KINDS, strict=True))
    return [sparsity(values, named[kind], "nan") for kind in golden.config["sparsity_types"]]


def check_vectors(path: Path) -> None:
    """fflib_sparsity: the measures of given vectors."""
    golden, errors = Archive.open(path), Errors(EXACT)
    for row, name in enumerate(golden.config["vectors"]):
        values = golden.tensor(f"v.{name}")
        errors.note("values", measures(golden, values), golden.arrays["values"][row])
        errors.note("stats", statistics(values), golden.arrays["stats"][row])
    errors.check()


class Unrolled(Feedforward):
    """fflib_ffrnn_*: layer i of the file (from 1) is layer i - 1 here; fw and bw side by side."""

    def network(self) -> RecurrentNet:
        c = self.config
        return fflib.ffrnn(**self.options(), beta=c["beta"], frames=c["K_train"],
                           test_frames=(c["K_testlow"], c["K_testhigh"]))

    def states(self, prefix: str) -> list[torch.Tensor]:
        return [self.tensor(f"{prefix}.{i}") for i in range(1, len(self.config["dims"]))]

    def tasks(self) -> list[Task]:
        x, y, other = self.tensor("x"), self.labels("y"), self.tensor("y_neg")
        hidden = [self.states("h0_pos"), self.states("h0_neg")]
        return [Task(Batch(pixels(x[t]), y[t], other[t], [[h[t] for h in half] for half in hidden]),
                     0, t) for t in range(len(x))]

    def place(self, name: str) -> tuple[str, slice]:
        _, index, kind = name.split(".")
        i, below = int(index) - 1, self.config["dims"][int(index) - 1]
        columns = {"fw": slice(0, below), "bw": slice(below, None), "fb": slice(None)}[kind]
        return f"layers.{i}.{'bias' if kind == 'fb' else 'weight'}", columns


class Frame(NamedTuple):
    """What a frame's updates saw: per layer goodness (2N, 1) and loss (2N,), positives first."""

    goodness: list[torch.Tensor]
    losses: list[torch.Tensor]


def frame_of(ctx: StepContext) -> Frame:
    """Of the frame that was last."""
    return Frame(*([rows[i][-1] for i in sorted(rows)] for rows in (ctx.goodness, ctx.loss_rows)))


@dataclass
class Shot:
    """A frame of the fp64 reference: states before and after, and what its updates left."""

    before: dict[str, Any]
    states: list[torch.Tensor]
    targets: torch.Tensor
    made: Frame
    grads: Tensors
    after: dict[str, Any]
    new: list[torch.Tensor]


class Filmed(Recurrent):
    """The recurrent schedule; keeps every frame."""

    trainer: Watched

    def begin(self, net: LocalNet, epochs: int) -> None:
        super().begin(net, epochs)
        self.shots: list[Shot] = []

    def train(self, ctx, item, plan, dtype) -> BatchReport:
        if is_fake(item.x):
            return super().train(ctx, item, plan, dtype)
        program = self.program(self.net, plan, Facts(ctx.whose(), ctx.batch))
        tensors: dict[str, Any] = {"batch": item}
        at, shots = Place(ctx, dtype, Rows(0, ctx.batch)), []
        with torch.no_grad():
            for part in program.parts:
                h = tensors.get("h")
                if isinstance(part, Loop) and part.title.startswith("frame"):
                    before, states = snapshot(self.trainer), [t.clone() for t in h]
                    run_loop(at, part, tensors)
                    grads = {n: t.clone() for n, t in self.trainer.grads.items()}
                    shots.append(Shot(before, states, ctx.y, frame_of(ctx), grads,
                                      snapshot(self.trainer), []))
                elif isinstance(part, Loop):
                    run_loop(at, part, tensors)
                else:
                    perform(at, part, tensors)
                if isinstance(part, Instruction) and part.op == "switch":
                    shots[-1].new = [t.clone() for t in h[1:-1]]
        self.shots += shots
        ctx.optimizer.mark_stepped()
        return ctx.report()


@functools.lru_cache(maxsize=1)
def film(path: Path) -> tuple[Unrolled, Watched, list[torch.Tensor]]:
    """(file, its trainer after training, mean losses of every batch)."""
    golden = Unrolled.open(path)
    schedule = Filmed(golden.config["K_train"])
    run = trainer(golden, schedule=schedule)
    schedule.trainer = run
    losses = [torch.stack(run.step(task.item, iteration=task.iteration).losses)
              for task in golden.tasks()]
    return golden, run, losses


def check_frames(path: Path) -> None:
    """Losses, gradients and weights of every frame."""
    golden, run, losses = film(path)
    errors, arrays, count = Errors(EXACT), golden.arrays, golden.config["K_train"]
    note_start(errors, golden)
    for row, shot in enumerate(run.schedule.shots):
        note_tensors(errors, golden, row, shot.after, shot.grads)
        at = divmod(row, count)
        errors.note("loss", [v.mean() for v in shot.made.losses], arrays["loss"][at])
        note_halves(errors, arrays, "loss", shot.made.losses, at)
        note_halves(errors, arrays, "msq", shot.made.goodness, at)
        if at[1] == count - 1:
            note_whole(errors, golden, "steps", shot.after, at[0])
            errors.note("reported", losses[at[0]], arrays["loss"][at[0]].mean(0))
    note_whole(errors, golden, "final", run.schedule.shots[-1].after)
    errors.check()


def check_recurrent_validation(path: Path) -> None:
    """Goodness of every label, frame and layer; hidden states are drawn per label."""
    golden, run, _ = film(path)
    errors, arrays, net = Errors(EXACT), golden.arrays, run.net
    x, hidden = pixels(golden.tensor("val.x")), [h[:, 0] for h in golden.states("val.h0")]
    goodness = net.goodness(x, backend="reference", hidden=hidden)
    errors.note("val.class_goodness", torch.stack(goodness).mean(0), arrays["val.class_goodness"])
    errors.note("val.pred", net.readout.of_goodness(goodness).argmax(1), arrays["val.pred"])
    for k in range(net.num_classes):
        label = torch.eye(net.num_classes, dtype=x.dtype)[k].expand(len(x), -1)
        frames = net.frame_goodness(x, label, [h[k:k + 1] for h in hidden], "reference")
        made = torch.stack([torch.stack(f)[..., 0] for f in frames])
        errors.note("val.frame_goodness", above(made, golden.config["threshold"]),
                    arrays["val.frame_goodness"][k])
    note_sparsity(errors, golden, run.schedule.shots[-1].after)
    errors.check()


def forced_frame(ours: Watched, shot: Shot, dtype: torch.dtype, draw: int = 0) -> Tensors:
    """What the frame leaves on another back-end; new states by the reference's new weights."""
    net, schedule = ours.net, ours.schedule
    restore(net, shot.before, ours)
    h = [(draws(t, dtype)[draw] if draw else t).to(ours.device, dtype) for t in shot.states]
    before = [lengths(t) for t in h]
    ctx = ours.context(Batch(h[0], shot.targets.to(ours.device)), schedule.turn(0, 0))
    with torch.no_grad():
        program = schedule.program(net, one_tile(range(len(net.layers)), ctx.batch),
                                   Facts(ctx.whose(), ctx.batch))
        frame = next(p for p in program.parts if getattr(p, "title", "").startswith("frame"))
        run_loop(Place(ctx, dtype, Rows(0, ctx.batch)), frame,
                    {"h": list(h), "l": list(before)})
        made = frame_of(ctx)
        out: Tensors = {f"weight {n}": p.clone() for n, p in net.named_parameters()}
        restore(net, shot.after)
        new = [net.new_state(i, neighbours(i, h, before), h[i + 1], ours.backend)[0]
               for i in range(len(net.layers))]
    return {n: t.detach().cpu() for n, t in (out | named(made, new, ours.grads)).items()}


def named(made: Frame, new: list[torch.Tensor], grads: Tensors) -> Tensors:
    out = {f"goodness layers.{i}.weight": g for i, g in enumerate(made.goodness)}
    out |= {f"loss layers.{i}.weight": v for i, v in enumerate(made.losses)}
    out |= {f"state layers.{i}.weight": t for i, t in enumerate(new)}
    return out | {f"gradient {n}": g for n, g in grads.items()}


def check_forced_frames(path: Path, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    golden, run, _ = film(path)
    lines: list[str] = []
    ours, plain = trainer(golden, dtype, backend, device), trainer(golden, dtype)
    for row, shot in enumerate(run.schedule.shots):
        got = forced_frame(ours, shot, dtype)
        same = [forced_frame(plain, shot, dtype, draw) for draw in range(DRAWS)]
        right = named(shot.made, shot.new, shot.grads)
        rows = len(shot.targets)
        for name, value in right.items():
            kind, place = name.split()
            fan_in = shot.after[place].shape[-1] if place.endswith("weight") else 1
            length = fan_in + 1 + rows * (kind == "gradient")
            lines += breaks(f"frame {row}, {name}", got, value, same, dtype, length)
        lines += [f"frame {row}, {line}" for line in check_weights(
            run, run.optimizer.config().lr, shot.before, shot.grads, shot.after, got, same, dtype,
            rows)]
    assert not lines, "\n".join(lines)


def checks_of(path: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Name and check, in order: exact first."""
    config = Archive.open(path).config
    if "vectors" in config:
        return {"measures": lambda: check_vectors(path)}
    if "K_train" in config:
        checks = {"training": lambda: check_frames(path),
                  "validation": lambda: check_recurrent_validation(path)}
        run = functools.partial(check_forced_frames, path)
    else:
        checks = {"training": lambda: check_training(path),
                  "validation": lambda: check_validation(path)}
        if path == min(path.parent.glob("fflib_ff[!r]*.npz")):  # a process of seconds: one file
            checks["forced, triton fp32"] = lambda: check_interpreted(
                Feedforward, path, folder, Path(__file__))
        run = functools.partial(check_forced, Feedforward, path)
    return checks | {f"forced, cpu {name}": functools.partial(run, "cpu", dtype)
                     for name, dtype in DTYPES.items()}


def gpu_checks_of(path: Path) -> dict[str, Callable[[], None]]:
    """The forced checks on a GPU's back-ends."""
    config = Archive.open(path).config
    if "vectors" in config:
        return {}
    check = (functools.partial(check_forced_frames, path) if "K_train" in config
             else functools.partial(check_forced, Feedforward, path))
    return {f"{backend} {name}": functools.partial(check, backend, dtype, "cuda")
            for backend in ("triton", "cuda") for name, dtype in DTYPES.items()}


if __name__ == "__main__":
    save_forced(Feedforward, *sys.argv[1:])
