"""Trifecta files: networks of normalised convolutions, trained with or without overlap."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from golden_common import EXACT, FP64, Archive, Errors, check_interpreted
from golden_steps import (
    Moment,
    Stepper,
    check_layers,
    forced_checks,
    interpretable,
    note_tensors,
    run,
    settings,
    trainer_leaves,
)

from ffengine.engine.batch import Batch
from ffengine.engine.run.evaluation import layer_accuracy
from ffengine.engine.schedules.schedule import Overlapping, Schedule, Together
from ffengine.nn import LabelChannel, LocalConv2d, LocalNet, PreNorm
from ffengine.ops.config import LocalPassConfig, Norm, symba, threshold


class Trifecta(Archive):
    """One trajectory file and what its config says."""

    def network(self) -> LocalNet:
        c = self.config
        image = self.arrays["x"].shape[2:]
        encoding = LabelChannel(c["classes"], image, learned=c["learned"])
        loss = threshold(c["tau"]) if c["alpha"] is None else symba(c["alpha"])
        layers: list[LocalConv2d] = []
        shape = encoding.shape
        for row in c["layers"]:
            kind = {"BatchNorm2d": "batch", "LayerNorm": "layer"}[row["norm"]]
            norm = PreNorm(kind, shape, eps=row["eps"], momentum=row["momentum"] or 0.1)
            config = LocalPassConfig(groups=1, goodness="mean_sq", loss=loss, norm=Norm("none"),
                                     pool="max2" if row["maxpool"] else "none")
            layers.append(LocalConv2d(row["in_ch"], row["out_ch"], 3, config=config,
                                      pre_norm=norm))
            shape = layers[-1].z_shape(shape)
        last = len(layers) - 1
        net = LocalNet(layers, num_classes=c["classes"], in_shape=image, input_norm="none",
                       layer_range=(last, last), encoding=encoding).to(FP64)
        state = net.state_dict()
        for i, name in enumerate(c["param_names"]):
            state[self.names[name]].copy_(self.initial(i))
        return net

    @property
    def names(self) -> dict[str, str]:
        """What the file calls a tensor -> the network's name."""
        return {n: n.replace("inner.0.", "pre_norm.").replace("inner.1.", "").replace(
            "embedding.", "encoding.") for n in self.config["param_names"]}

    def schedule(self) -> Schedule:
        return Overlapping("batch") if self.config["olu"] else Together()

    def stepper(self, dtype: torch.dtype, backend: str) -> Stepper:
        return Stepper(self.network(), self.schedule(), settings(self.config["optimizer"]), dtype,
                       backend)

    def batches(self) -> list[tuple[Batch, int, int]]:
        x, y, negatives = self.tensor("x"), self.labels("y"), self.labels("y_neg")
        return [(Batch(x[t], y[t], negatives[t]), 0, t) for t in range(self.steps)]


@functools.lru_cache(maxsize=1)
def trajectory(path: Path) -> tuple[Trifecta, Stepper, list[Moment]]:
    """The file's training in fp64 on the reference, and what it leaves."""
    golden = Trifecta.open(path)
    stepper = golden.stepper(FP64, "reference")
    return golden, stepper, run(stepper, golden.batches())


def checks_of(path: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Name and check, in order: exact first."""
    golden, _, moments = trajectory(path)
    checks: dict[str, Callable[[], None]] = {
        "training": lambda: check_training(path), "validation": lambda: check_validation(path),
        "trainer": lambda: trainer_leaves(
            golden.network(), golden.schedule(), settings(golden.config["optimizer"]), moments)}
    checks |= forced_checks(golden.stepper, moments, "cpu")
    if not golden.config["olu"] and interpretable(golden.network(), moments[0].batch):
        checks["layers, triton fp32"] = lambda: check_interpreted(Path(__file__), path)
    return checks


def gpu_checks_of(path: Path) -> dict[str, Callable[[], None]]:
    """The same for a machine with a GPU."""
    golden, _, moments = trajectory(path)
    return {name: check for backend in ("triton", "cuda")
            for name, check in forced_checks(golden.stepper, moments, backend).items()}


def check_training(path: Path) -> None:
    """Goodness, losses, gradients, weights and running statistics of every step."""
    golden, _, moments = trajectory(path)
    errors, arrays, depth = Errors(EXACT), golden.arrays, len(golden.config["layers"])
    rows = 2 * arrays["x"].shape[1]
    for t, moment in enumerate(moments):
        made = moment.outcome
        nothing = torch.full((rows, 1), torch.nan, dtype=FP64)
        goodness = torch.cat([made.get(f"goodness {i}", nothing) for i in range(depth)], 1).t()
        errors.note("goodness", goodness, arrays["goodness"][t])
        pos, neg = goodness.view(depth, 2, -1).mean(2).unbind(1)
        errors.note("pos", pos, arrays["pos"][t])
        errors.note("neg", neg, arrays["neg"][t])
        loss = [made.get(f"loss {i}", torch.tensor(torch.nan)) for i in range(depth)]
        errors.note("loss", loss, arrays["loss"][t])
    note_tensors(errors, golden, moments, golden.names)
    errors.check()


def check_validation(path: Path) -> None:
    """Every label's goodness after training, and the accuracies."""
    golden, stepper, _ = trajectory(path)
    net, arrays, errors = stepper.net, golden.arrays, Errors(EXACT)
    x, y = golden.tensor("val.x"), golden.labels("val.y")
    with torch.no_grad():
        goodness = torch.stack(net.goodness(x, backend="reference"))
    errors.note("val.goodness", goodness.permute(2, 0, 1), arrays["val.goodness"])
    errors.note("val.accuracy", layer_accuracy(net, [(x, y)], "reference"),
                arrays["val.accuracy"])
    start, stop, _ = slice(*golden.config["ensemble"]).indices(len(net.layers))
    kept = net.layer_range
    net.set_range(start, stop - 1)
    right = (net.scores(x, backend="reference").argmax(1) == y).double().mean()
    net.set_range(*kept)
    errors.note("val.accuracy_ensemble", right, arrays["val.accuracy_ensemble"])
    errors.check()


def main(path: str) -> None:
    """`python golden_tf.py FILE`: the layers on Triton, in a process of their own."""
    golden, _, moments = trajectory(Path(path))
    check_layers(golden.stepper, moments[-1:], torch.float32, "triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
