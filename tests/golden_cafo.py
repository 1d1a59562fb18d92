"""CaFo files: features of fixed random blocks, their predictors, and the published losses.

Known differences, compared with the difference stated: the published sparsemax loss is the paper's
plus (C - 1) / 2, and a regulariser of lamda / 2 |W| is added to what is reported (the gradient is
that of lamda / 2 |W|^2). Not compared: the reported "MSE", an L1 distance, and the gradient of the
square beside it, for which the engine has the least-squares solution alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from golden_common import (
    DTYPES,
    EXACT,
    FP64,
    Archive,
    Errors,
    broken,
    check_interpreted,
    sample,
)
from golden_steps import Moment, Stepper, check_steps, interpretable, place_of, reductions

from ffengine.engine import heads
from ffengine.engine.batch import Batch
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.cascade import Cascade
from ffengine.engine.trainer import Trainer
from ffengine.models.cafo import HEADS
from ffengine.nn import LinearHead, LocalConv2d, LocalNet, Readout
from ffengine.nn.layers import as_laid_out
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm, sparsemax
from ffengine.ops.local_pass import local_pass
from ffengine.ops.optim import OptimConfig
from ffengine.reference import local_pass as reference

#: The published code ignores a smaller one.
SMALLEST_LAMDA = 1e-4
#: Samples of the training set that Triton's interpreter is given.
INTERPRETED_ROWS = 16


class CaFo(Archive):
    """One trajectory file and what its config says."""

    def network(self) -> LocalNet:
        """The blocks with the file's values and a predictor each."""
        c = self.config
        kind, image = c["loss"].lower(), self.arrays["x"].shape[1:]
        shape, layers, predictors = tuple(image), [], []
        for i, width in enumerate(c["channels"]):
            config = LocalPassConfig(groups=1, goodness="mean_sq", norm=Norm("none"), pool="max2")
            layers.append(LocalConv2d(shape[0], width, 3, bias=True, config=config,
                                      batch_coupling=BatchNorm(c["bn_eps"], order="pool_norm")))
            shape = layers[-1].z_shape(shape)
            layers[-1].requires_grad_(False)
            options = HEADS[kind]
            if kind == "bp":
                options = {**options, "optim": adam(c)}
            predictors.append(LinearHead((i,), int(np.prod(shape)), c["classes"], bias=False,
                                         **options))
        squash = "sparsemax" if kind == "sl" else "softmax"
        net = LocalNet(layers, num_classes=c["classes"], in_shape=image, input_norm="none",
                       heads=predictors, readout=Readout("predictors", squash=squash)).to(FP64)
        net.batch_statistics = True
        state = net.state_dict()
        for name in self.arrays:
            if name.startswith("init."):
                state[ours(name.removeprefix("init."))].copy_(self.tensor(name))
        return net

    @property
    def closed_form(self) -> bool:
        return self.config["loss"] == "MSE"

    @property
    def lamda(self) -> float:
        return self.config["lamda"] if self.config["lamda"] > SMALLEST_LAMDA else 0.0

    def stages(self) -> int:
        return len(self.config["channels"])

    def rows(self) -> list[slice]:
        """The batches of an epoch, in order."""
        c = self.config
        if self.closed_form:
            return [slice(0, c["n"])]
        size, count = c["n"] // c["batches"], len(self.arrays["loss.0"]) // c["epochs"]
        return [slice(k * size, (k + 1) * size) for k in range(count)]

    def stepper(self, dtype: torch.dtype, backend: str) -> Stepper:
        optim = OptimConfig("sgd", lr=self.config["step"], weight_decay=self.lamda)
        return Stepper(self.network(), Cascade(self.closed_form), optim, dtype, backend,
                       epochs=self.config["epochs"])


def adam(config: dict) -> dict:
    kind, o = config["optimizer"]
    return {"kind": kind.lower(), "lr": o["lr"], "betas": tuple(o["betas"]), "eps": o["eps"],
            "weight_decay": o["weight_decay"]}


def ours(name: str) -> str:
    """The network's name of a tensor."""
    block = name.split(".")[1]
    part = name.split(".", 2)[2]
    if part == "fc.weight":
        return f"heads.{block}.weight"
    return f"layers.{block}." + part.replace("conv_module.0.", "").replace(
        "conv_module.3.running", "running").replace("conv_module.3.", "norm_")


@dataclass
class Trained:
    """The file's training in fp64 on the reference, and what it leaves."""

    golden: CaFo
    trainer: Trainer
    features: list[torch.Tensor]
    val_features: list[torch.Tensor]
    #: Running statistics after the two passes.
    statistics: dict[str, torch.Tensor]
    #: Per predictor: losses before and after each step, and its weights after it.
    losses: list[list[tuple[float, float]]]
    weights: list[list[torch.Tensor]]


@functools.lru_cache(maxsize=1)
def trained(path: Path) -> Trained:
    golden = CaFo.open(path)
    c, net = golden.config, golden.network()
    features, val_features = (block_features(net, golden.tensor(k)) for k in ("x", "val.x"))
    statistics = {n: b.clone() for n, b in net.named_buffers()}
    epochs = 1 if golden.closed_form else c["epochs"]
    trainer = Trainer(net, backend="reference", precision="fp64", progress=False,
                      schedule=Cascade(golden.closed_form), recipe=Recipe(
                          optimizer="sgd", lr=c["step"], weight_decay=golden.lamda, epochs=epochs,
                          batch_size=c["n"] // c["batches"]))
    made = Trained(golden, trainer, features, val_features, statistics, [], [])
    for stage in range(golden.stages()):
        made.losses.append([])
        made.weights.append([])
        for e in range(epochs):
            for k, rows in enumerate(golden.rows()):
                train(made, stage, stage * epochs + e, k, rows)
            trainer.schedule.epoch_done(stage * epochs + e, 0.0)
    return made


def block_features(net: LocalNet, x: torch.Tensor) -> list[torch.Tensor]:
    """z of every block, by the statistics of all of x."""
    zs: list[torch.Tensor] = []
    with torch.no_grad():
        net.run(net.prepare(x), training=True, backend="reference", features=zs)
    return zs


def batch_of(golden: CaFo, features: torch.Tensor, rows: slice) -> Batch:
    return Batch(golden.tensor("x")[rows], golden.labels("y")[rows],
                 features=features[rows].flatten(1))


def train(made: Trained, stage: int, epoch: int, iteration: int, rows: slice) -> None:
    """One step of a predictor, with its loss before and after."""
    golden, head = made.golden, heads.of(made.trainer.net, stage)
    item = batch_of(golden, made.features[stage], rows)
    before = reported(golden, head, item)
    made.trainer.step(item, epoch=epoch, iteration=iteration)
    made.losses[stage].append((before, reported(golden, head, item)))
    # the published one is (features, classes), but for the predictor that is a torch module
    weight = head.weight.detach().clone()
    made.weights[stage].append(weight if golden.config["loss"] == "BP" else weight.t())


def reported(golden: CaFo, head: LinearHead, item: Batch) -> float:
    """The loss as the published code reports it."""
    with torch.no_grad():
        loss = heads.loss_and_gradient(head, head(item.features), item.y)[0].item()
    if golden.config["loss"] == "SL":
        loss += (head.num_classes - 1) / 2
    if golden.config["loss"] == "BP":
        return loss
    return loss + 0.5 * golden.lamda * head.weight.detach().norm().item()


def checks_of(path: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Name and check, in order: exact first."""
    if "z" in Archive.open(path).arrays:
        return {"fp64": lambda: check_losses(path)} | {
            f"cpu {name}": functools.partial(check_sparsemax, path, "cpu", dtype)
            for name, dtype in DTYPES.items()}
    made = trained(path)
    checks: dict[str, Callable[[], None]] = {
        "blocks": lambda: check_blocks(path), "predictors": lambda: check_predictors(path)}
    for name, dtype in DTYPES.items():
        checks[f"blocks, cpu {name}"] = functools.partial(close_blocks, path, "cpu", dtype)
        if not made.golden.closed_form:
            checks[f"predictors, cpu {name}"] = functools.partial(
                check_steps, made.golden.stepper, moments(made), dtype, "cpu")
    if made.golden.closed_form and interpretable(made.trainer.net, batch_of(
            made.golden, made.features[0], slice(0, INTERPRETED_ROWS))):
        checks["blocks, triton fp32"] = lambda: check_interpreted(Path(__file__), path)
    return checks


def gpu_checks_of(path: Path) -> dict[str, Callable[[], None]]:
    """The same for a machine with a GPU."""
    pairs = [(b, name, d) for b in ("triton", "cuda") for name, d in DTYPES.items()]
    if "z" in Archive.open(path).arrays:
        return {f"{b} {name}": functools.partial(check_sparsemax, path, b, d)
                for b, name, d in pairs}
    made = trained(path)
    checks = {f"blocks, {b} {name}": functools.partial(close_blocks, path, b, d)
              for b, name, d in pairs}
    if not made.golden.closed_form:
        checks |= {f"predictors, {b} {name}": functools.partial(
            check_steps, made.golden.stepper, moments(made), d, b) for b, name, d in pairs}
    return checks


def moments(made: Trained) -> list[Moment]:
    """Every predictor's first and last steps, in fp64 on the reference."""
    golden, out = made.golden, []
    stepper, epochs = golden.stepper(FP64, "reference"), golden.config["epochs"]
    batches = [(k, rows) for _ in range(epochs) for k, rows in enumerate(golden.rows())]
    for stage in range(golden.stages()):
        for t, (k, rows) in enumerate(batches):
            item = batch_of(golden, made.features[stage], rows)
            epoch = stage * epochs + t // len(golden.rows())
            before = stepper.snapshot()
            outcome = stepper.step(item, epoch, k)
            if t in (0, 1, len(batches) - 1):
                out.append(Moment(item, epoch, k, before, outcome))
    return out


def check_blocks(path: Path) -> None:
    """Features by each set's own statistics, and the running ones."""
    made, errors = trained(path), Errors(EXACT)
    arrays = made.golden.arrays
    for i in range(made.golden.stages()):
        errors.note_digest("features", made.features[i], arrays[f"features_digest.{i}"])
        errors.note("features_sample", sample(made.features[i]), arrays[f"features_sample.{i}"])
        errors.note_digest("val.features", made.val_features[i],
                           arrays[f"val.features_digest.{i}"])
        if f"val.features_sample.{i}" in arrays:
            errors.note("val.features_sample", sample(made.val_features[i]),
                        arrays[f"val.features_sample.{i}"])
    finals = [n for n in arrays if n.startswith("final.")]
    assert finals
    for name in finals:
        errors.note("final", made.statistics[ours(name.removeprefix("final."))], arrays[name])
    errors.check()


def check_predictors(path: Path) -> None:
    """Losses and weights of every step, scores and classes of both sets."""
    made, errors = trained(path), Errors(EXACT)
    golden, net, arrays = made.golden, made.trainer.net, made.golden.arrays
    for i in range(golden.stages()):
        errors.note("W", net.heads[i].weight.detach().t(), arrays[f"W.{i}"])
        if f"loss.{i}" in arrays:
            losses = np.array(made.losses[i])
            want = arrays[f"loss.{i}"]
            errors.note("loss", losses if want.ndim > 1 else losses[:, 0], want)
            assert len(arrays[f"W_digest.{i}"]) == len(made.weights[i])
            for w, want in zip(made.weights[i], arrays[f"W_digest.{i}"], strict=True):
                errors.note_digest("W_digest", w, want)
    for prefix in ("", "val."):
        scores = net.scores(golden.tensor(f"{prefix}x"), backend="reference")
        errors.note(f"{prefix}score", scores, arrays[f"{prefix}score"])
        errors.note(f"{prefix}pred", scores.argmax(1), arrays[f"{prefix}pred"])
    errors.check()


def close_blocks(path: Path, backend: str, dtype: torch.dtype, rows: int | None = None) -> None:
    """Each block from the reference's input: features and running statistics."""
    golden, out = trained(path).golden, []
    x = golden.tensor("x")[:rows]
    inputs = [x, *block_features(golden.network(), x)[:-1]]
    nets = [golden.network().to(d) for d in (FP64, torch.float32, torch.float32)]
    lengths = reductions(nets[0], len(inputs[0]))
    for i, x in enumerate(inputs):
        results = []
        for net, d, b in zip(nets, (FP64, dtype, dtype), ("reference", "reference", backend),
                             strict=True):
            where = place_of(b)
            layer = net.layer(i).to(where)
            with torch.no_grad():
                z, _ = layer.infer(as_laid_out(x.to(where, d)), training=True, backend=b)
            results.append({"z": z.cpu(), "mean": layer.running_mean.cpu(),
                            "var": layer.running_var.cpu()})
        out += [line for k in results[0] for line in broken(
            f"block {i} {k}", results[2][k], results[0][k], results[1][k], dtype, lengths[i])]
    assert not out, "\n".join(out)


def check_losses(path: Path) -> None:
    """Sparsemax with its threshold, and the losses of a predictor, per row of logits z."""
    golden, errors = Archive.open(path), Errors(EXACT)
    arrays, z, y = golden.arrays, golden.tensor("z"), golden.labels("labels").argmax(1)
    n, classes = z.shape
    p = reference.sparsemax(z)
    errors.note("p", p, arrays["p"])
    top = z.max(1, keepdim=True).values
    errors.note("tau", (reference._sparsemax_tau(z - top) + top)[:, 0], arrays["tau"])
    for kind, offset in (("sparsemax", (classes - 1) / 2), ("ce", 0.0)):
        head = LinearHead((0,), 1, classes, loss=kind)
        loss, gradient = heads.loss_and_gradient(head, z.clone(), y)
        errors.note(f"loss_{kind}", loss + offset, arrays[f"loss_{kind}"])
        errors.note(f"grad_{kind}", gradient * n, arrays[f"grad_{kind}"])
    loss, coef = sparsemax_pass(z, y, FP64, "reference")
    errors.note("local_pass loss", loss.mean() + (classes - 1) / 2, arrays["loss_sparsemax"])
    errors.note("local_pass coef", coef * n, arrays["grad_sparsemax"])
    errors.check()


def sparsemax_pass(z: torch.Tensor, y: torch.Tensor, dtype: torch.dtype,
                   backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,), coef (N, K)) of the op where z, moved above zero, is the goodness."""
    config = LocalPassConfig(groups=z.shape[1], goodness="mean", loss=sparsemax(),
                             norm=Norm("none"))
    where = place_of(backend)
    made = local_pass((z - z.min() + 1).to(where, dtype), y.to(where), config=config, want_da=True,
                      want_z=False, backend=backend)
    return made.loss.cpu(), made.coef.cpu()


def check_sparsemax(path: Path, backend: str, dtype: torch.dtype) -> None:
    """The op's sparsemax in lower precision."""
    golden = Archive.open(path)
    z, y = golden.tensor("z"), golden.labels("labels").argmax(1)
    exact, same, ours_ = (sparsemax_pass(z, y, d, b) for d, b in (
        (FP64, "reference"), (dtype, "reference"), (dtype, backend)))
    out = [line for k, name in enumerate(("loss", "coef")) for line in broken(
        name, ours_[k], exact[k], same[k], dtype, z.shape[1])]
    assert not out, "\n".join(out)


def main(path: str) -> None:
    """`python golden_cafo.py FILE`: the blocks on Triton, in a process of their own."""
    close_blocks(Path(path), "triton", torch.float32, INTERPRETED_ROWS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
