"""Loewe's and Pezeshki's files (Hinton's FF), through the models' own builders."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from golden_common import DTYPES, EXACT, FP64, Archive, Errors
from golden_paired import (
    Paired,
    Task,
    check_forced,
    check_interpreted,
    note_start,
    note_tensors,
    note_whole,
    restore,
    save_forced,
    trainer,
    trajectory,
)

from ffengine.engine.batch import Batch
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.plans import Memory
from ffengine.engine.memory.shapes import measure
from ffengine.engine.run.recipe import Recipe
from ffengine.models import hinton
from ffengine.nn import LocalNet


class PeerNorm(Paired):
    """loewe_*: mini-batches, peer normalisation, one classifier."""

    def network(self) -> LocalNet:
        c, (channels, size, _) = self.config, self.arrays["image"].shape[2:]
        return hinton.peer_norm(
            self.arrays["val.logits"].shape[-1], channels, size, (c["hidden"],) * c["layers"],
            peer=c["peer"], peer_momentum=c["peer_momentum"], head_lr=c["lr2"],
            head_weight_decay=c["wd2"])

    def recipe(self) -> Recipe:
        c = self.config
        return Recipe("sgd", c["lr"], weight_decay=c["wd"], epochs=c["epochs"],
                      momentum=c["momentum"], lr_half_linear=True)

    def tasks(self) -> list[Task]:
        x, count = self.tensor("image"), self.config["batches"]
        return [Task(Batch(x[t], self.labels("y")[t], self.labels("y_neg")[t]), *divmod(t, count))
                for t in range(len(x))]

    def place(self, name: str) -> tuple[str, slice]:
        name = name.replace("linear_classifier.", "heads.").replace("model.", "layers.")
        return name, slice(None)


def check_peer_training(path: Path) -> None:
    """Everything of every step: goodness, the four losses, both accuracies, gradients, weights."""
    run, errors = trajectory(PeerNorm, path), Errors(EXACT)
    golden, arrays, net = run.golden, run.golden.arrays, run.trainer.net
    note_start(errors, golden)
    for t, step in enumerate(run.steps):
        report, (loss, logits) = step.report, step.report.heads[0]
        y, goodness = step.task.item.y, torch.stack(report.goodness)[..., 0]
        errors.note("goodness", goodness, arrays["goodness"][t])
        errors.note("loss_layer", torch.stack(report.losses), arrays["loss_layer"][t])
        width = torch.tensor([[layer.weight.shape[0]] for layer in net.layers])
        positive = torch.arange(2 * len(y)) < len(y)
        errors.note("ff_accuracy_layer", ((goodness > width) == positive).double().mean(1),
                    arrays["ff_accuracy_layer"][t])
        errors.note("classification_loss", loss, arrays["classification_loss"][t])
        errors.note("classification_accuracy", (logits.argmax(1) == y).double().mean(),
                    arrays["classification_accuracy"][t])
        penalty = sum(report.penalties.values())
        errors.note("peer_loss", penalty, golden.config["peer"] * arrays["peer_loss"][t])
        errors.note("loss_total", sum(report.losses) + penalty + loss, arrays["loss_total"][t])
        means = torch.stack([step.after[f"layers.{i}.running_mean"] for i in range(len(goodness))])
        errors.note("running_means", means, arrays["running_means"][t])
        errors.note("lr", [step.lr["layers.0.weight"], step.lr["heads.0.weight"]], arrays["lr"][t])
        note_tensors(errors, golden, t, step.after, step.grads)
        note_whole(errors, golden, "steps", step.after, t)
    note_whole(errors, golden, "final", run.steps[-1].after)
    errors.check()


def check_peer_validation(path: Path) -> None:
    """The classifier on the neutral label, after training."""
    run, errors = trajectory(PeerNorm, path), Errors(EXACT)
    arrays, net, y = run.golden.arrays, run.trainer.net, run.golden.labels("val.y")
    logits = net(run.golden.tensor("val.image"))
    errors.note("val.logits", logits, arrays["val.logits"])
    errors.note("val.classification_loss", F.cross_entropy(logits, y),
                arrays["val.classification_loss"])
    errors.note("val.classification_accuracy", (logits.argmax(1) == y).double().mean(),
                arrays["val.classification_accuracy"])
    errors.check()


class LayerAfterLayer(Paired):
    """pez_*: the full batch, each layer for all its epochs; flat samples as maps of one pixel."""

    def network(self) -> LocalNet:
        dims = self.config["dims"]
        return hinton.threshold_net(self.arrays["val.goodness"].shape[1], dims[0], 1,
                                    tuple(dims[1:]), theta=self.config["threshold"])

    def recipe(self) -> Recipe:
        return replace(self.adam(), epochs=self.config["epochs"])

    def batch(self) -> Batch:
        y = self.labels("y")
        return Batch(self.tensor("x")[..., None, None], y, y[self.labels("perm")])

    def tasks(self) -> list[Task]:
        epochs = self.config["epochs"] * (len(self.config["dims"]) - 1)
        return [Task(self.batch(), epoch) for epoch in range(epochs)]

    def place(self, name: str) -> tuple[str, slice]:
        return name, slice(None)


def check_layers_training(path: Path) -> None:
    """The encoded batch, every layer's epochs, and what it passed on after its last."""
    run, errors = trajectory(LayerAfterLayer, path), Errors(EXACT)
    golden, arrays, net = run.golden, run.golden.arrays, run.golden.started()
    note_start(errors, golden)
    epochs, item = golden.config["epochs"], run.steps[0].task.item
    for t, step in enumerate(run.steps):
        layer, epoch = divmod(t, epochs)
        note_tensors(errors, golden, t, step.after, step.grads)
        note_whole(errors, golden, "steps", step.after, epoch, f"layers.{layer}.")
        for name, shape in (("loss", ()), ("loss_pos", (0,)), ("loss_neg", (1,))):
            if name in arrays:  # other files of the format may hold them
                rows = step.report.row_losses[layer].unflatten(0, (2, -1))
                errors.note(name, rows[shape].mean() if not shape else rows[shape],
                            arrays[name][layer, epoch])
    note_whole(errors, golden, "final", run.steps[-1].after)
    rows = torch.cat([net.encoding(item.x, labels) for labels in (item.y, item.negatives)])
    for half, part in zip(("pos", "neg"), rows.chunk(2), strict=True):
        errors.note(f"x_{half}", part, arrays[f"x_{half}"])
    restore(net, run.steps[-1].after)
    outputs: list[torch.Tensor] = []
    net.activations(net.normalise_input(rows), len(net.layers) - 1, outputs, "reference")
    for i, h in enumerate(outputs):
        for half, part in zip(("pos", "neg"), h.chunk(2), strict=True):
            errors.note(f"out_{half}", part, arrays[f"out_{half}.{i}"])
    errors.check()


def check_layers_validation(path: Path) -> None:
    """Every label tried: goodness summed over all layers."""
    run, errors = trajectory(LayerAfterLayer, path), Errors(EXACT)
    arrays, net = run.golden.arrays, run.trainer.net
    scores = net(run.golden.tensor("val.x")[..., None, None])
    errors.note("val.goodness", scores, arrays["val.goodness"])
    errors.note("val.pred", scores.argmax(1), arrays["val.pred"])
    errors.check()


def check_layers_plans(path: Path) -> None:
    """Tiles of any size give the steps of whole batches."""
    run = trajectory(LayerAfterLayer, path)
    rows = 2 * len(run.steps[0].task.item.y)
    plans = Planner(measure(run.trainer.net, rows, FP64, states=2, backend="reference"))
    for tile in (1, 5):
        errors, other = Errors(1e-12), trainer(
            run.golden, memory=Memory(plan=plans.fixed([], tile)))
        for step in run.steps:
            report = other.step(step.task.item, epoch=step.task.epoch)
            for got, want in zip(report.row_losses, step.report.row_losses, strict=True):
                assert (got is None) == (want is None)
                if want is not None:
                    errors.note("loss", got, want)
            for name, weight in other.net.named_parameters():
                errors.note("weight", weight.detach(), step.after[name])
                errors.note("gradient", other.grads[name], step.grads[name])
        errors.check()


def has_peers(path: Path) -> bool:
    """Its layers run the kernels of peer normalisation."""
    return bool(Archive.open(path).config.get("peer"))


def kind_of(path: Path) -> type[Paired]:
    return PeerNorm if path.name.startswith("loewe") else LayerAfterLayer


def checks_of(path: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Name and check, in order: exact first."""
    kind = kind_of(path)
    peers = kind is PeerNorm
    checks = {"training": lambda: (check_peer_training if peers else check_layers_training)(path),
              "validation": lambda: (
                  check_peer_validation if peers else check_layers_validation)(path)}
    if not peers:
        checks["plans"] = lambda: check_layers_plans(path)
    for name, dtype in DTYPES.items():
        checks[f"forced, cpu {name}"] = functools.partial(check_forced, kind, path, "cpu", dtype)
    if path == min(p for p in path.parent.glob(f"{path.stem.split('_')[0]}_*.npz")
                   if has_peers(p) == has_peers(path)):  # seconds: one file of each kind
        checks["forced, triton fp32"] = lambda: check_interpreted(kind, path, folder,
                                                                  Path(__file__))
    return checks


def gpu_checks_of(path: Path) -> dict[str, Callable[[], None]]:
    """The forced checks on a GPU's back-ends."""
    return {f"{backend} {name}": functools.partial(check_forced, kind_of(path), path, backend,
                                                   dtype, "cuda")
            for backend in ("triton", "cuda") for name, dtype in DTYPES.items()}


if __name__ == "__main__":
    save_forced(kind_of(Path(sys.argv[1])), *sys.argv[1:])
