"""CwComp files: single layers, one linear layer of positive and negative rows, and networks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_common import EXACT, FP64, Archive, Errors, check_interpreted, sample
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
from ffengine.engine.compiling import Layers
from ffengine.engine.context import Turn
from ffengine.engine.execute import layer_turn
from ffengine.engine.inputs import entrance
from ffengine.engine.instructions import Place
from ffengine.engine.program import Facts
from ffengine.engine.rows import Rows
from ffengine.engine.schedules.schedule import Interleaved, Together
from ffengine.nn import LinearHead, LocalConv2d, LocalLinear, LocalNet
from ffengine.ops.config import (
    BatchNorm,
    LocalPassConfig,
    Norm,
    ce,
    cwc,
    cwg,
    pvn,
    threshold,
)

LOSSES = {"CwC": cwc(), "CwC_CE": ce(), "PvN": pvn(2.0), "CWG": cwg()}


def convolution(row: dict[str, Any], cin: int, cout: int, classes: int, loss: str) -> LocalConv2d:
    """A layer as a case or a network's layer list describes it."""
    config = LocalPassConfig(groups=classes, goodness="mean_sq", loss=LOSSES[loss],
                             norm=Norm("none"), pool="max2" if row["maxpool"] else "none")
    coupling = BatchNorm(row.get("bn_eps", 1e-4), row.get("bn_momentum", 0.1), "pool_norm")
    layer = LocalConv2d(cin, cout, row.get("k", 3), padding=row.get("p", 1), bias=True,
                        groups=row["groups"], config=config, batch_coupling=coupling)
    size = row.get("class_groups")
    if size:
        layer.relabel([label // size for label in range(classes * size)])
    return layer


def labels_of(row: dict[str, Any], classes: int) -> int:
    """Labels that a layer of so many classes, or groups of them, can be trained on."""
    return classes * (row.get("class_groups") or 1)


@dataclass
class CwComp(Archive):
    """A network, or one case: a layer with its arrays."""

    def net(self) -> LocalNet:
        c = self.config
        if "layers" in c:
            return self.network()
        if "din" in c:
            return self.linear()
        shape = (c["cin"], *c["hw"])
        layer = convolution(c, c["cin"], c["cout"], c["C"], c["loss"])
        return LocalNet([layer], num_classes=labels_of(c, c["C"]), in_shape=shape,
                        input_norm="none")

    def linear(self) -> LocalNet:
        """FC_LayerCW: rows normalised by their length, positive and negative; theta 2."""
        c = self.config
        config = LocalPassConfig(groups=1, goodness="mean_sq", loss=threshold(2.0),
                                 norm=Norm("none"))
        net = LocalNet([LocalLinear(c["din"], c["dout"], config=config)], num_classes=2,
                       in_shape=(c["din"],), propagate="updated",
                       input_norm=Norm("length", eps=1e-4, length="l2"))
        net.makes_pairs = True
        return net

    def network(self) -> LocalNet:
        c = self.config
        widths = [self.arrays[f"goodness.{i}"].shape[-1] for i in range(len(c["layers"]))]
        layers = [convolution(row, row["in_ch"], row["out_ch"], width, c["loss"])
                  for row, width in zip(c["layers"], widths, strict=True)]
        optim = settings(c["classifier_optimizer"])
        last = len(layers) - 1
        shapes = dict(zip(c["param_names"], c["param_shapes"], strict=True))
        classes, width = shapes["classifier_b1.linear.weight"]
        head = LinearHead((last,), width, classes, loss="double-softmax", optim={
            "kind": optim.kind, "lr": optim.lr, "momentum": optim.momentum,
            "weight_decay": optim.weight_decay})
        # a layer on class groups may tell apart fewer than there are
        known = max(classes, *(labels_of(row, width) for row, width in
                               zip(c["layers"], widths, strict=True)))
        return LocalNet(layers, num_classes=known, in_shape=self.arrays["x"].shape[2:],
                        input_norm="none", layer_range=(last, last), heads=[head])

    @property
    def names(self) -> dict[str, str]:
        """What the file calls a tensor -> the network's name."""
        def ours(name: str) -> str:
            if name.startswith("classifier"):
                return name.replace("classifier_b1.linear", "heads.0")
            name = name.replace("conv_layers.", "layers.").replace("conv_bn.running", "running")
            name = name.replace("conv_bn.", "norm_")
            return name if name.startswith("layers.") else f"layers.0.{name}"

        return {n: ours(n) for n in self.config["param_names"]}

    def started(self) -> LocalNet:
        """The network with the file's initial values."""
        net = self.net().to(FP64)
        state = net.state_dict()
        for i, name in enumerate(self.config["param_names"]):
            state[self.names[name]].copy_(self.initial(i))
        return net

    def schedule(self) -> Together | Interleaved:
        if "start_end" not in self.config:
            return Together()
        spans = self.config["start_end"]
        return Interleaved([*spans[:len(self.config["layers"])], spans[-1]])

    def stepper(self, dtype: torch.dtype, backend: str) -> Stepper:
        return Stepper(self.started(), self.schedule(), settings(self.config["optimizer"]), dtype,
                       backend)

    def batches(self) -> list[tuple[Batch, int, int]]:
        if "x_pos" in self.arrays:
            pos, neg = self.tensor("x_pos"), self.tensor("x_neg")
            nothing = torch.zeros(pos.shape[1], dtype=torch.int64)
            return [(Batch(pos[t], nothing, neg[t]), 0, t) for t in range(len(pos))]
        x, y = self.tensor("x"), self.labels("y")
        epochs = self.config.get("epoch_of_step", [0] * len(x))
        return [(Batch(x[t], y[t]), epochs[t], t) for t in range(len(x))]


@dataclass
class Trained:
    """A network or case after its training in fp64 on the reference."""

    golden: CwComp
    stepper: Stepper
    moments: list[Moment]


@functools.lru_cache(maxsize=1)
def trained(path: Path) -> list[Trained]:
    """Every case of a file; a network is one."""
    whole = CwComp.open(path)
    cases = [whole] if "cases" not in whole.config else [
        CwComp(path, case, {k.split(".", 1)[1]: a for k, a in whole.arrays.items()
                            if k.startswith(f"c{i}.")})
        for i, case in enumerate(whole.config["cases"])]
    out = []
    for golden in cases:
        stepper = golden.stepper(FP64, "reference")
        out.append(Trained(golden, stepper, run(stepper, golden.batches())))
    return out


def checks_of(path: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Name and check, in order: exact first."""
    checks: dict[str, Callable[[], None]] = {}
    for i, case in enumerate(trained(path)):
        golden, moments = case.golden, case.moments
        where = f"c{i}: " if len(trained(path)) > 1 else ""
        checks[f"{where}training"] = functools.partial(check_training, case)
        checks[f"{where}validation"] = functools.partial(check_validation, case)
        checks[f"{where}trainer"] = functools.partial(
            trainer_leaves, golden.started(), golden.schedule(),
            settings(golden.config["optimizer"]), moments)
        checks |= {f"{where}{name}": check for name, check in forced_checks(
            golden.stepper, moments, "cpu").items()}
    if any(small(case) for case in trained(path)):
        checks["layers, triton fp32"] = lambda: check_interpreted(Path(__file__), path)
    return checks


def gpu_checks_of(path: Path) -> dict[str, Callable[[], None]]:
    """The same for a machine with a GPU."""
    return {f"c{i}: {name}": check for i, case in enumerate(trained(path))
            for backend in ("triton", "cuda") for name, check in forced_checks(
                case.golden.stepper, case.moments, backend).items()}


def small(case: Trained) -> bool:
    return interpretable(case.stepper.net, case.moments[0].batch)


def check_training(case: Trained) -> None:
    """Goodness, losses, gradients, weights, running statistics and outputs of every step."""
    golden, errors = case.golden, Errors(EXACT)
    arrays, depth = golden.arrays, len(case.stepper.net.layers)
    nothing = torch.tensor(torch.nan)
    for t, moment in enumerate(case.moments):
        made = moment.outcome
        for i in range(depth):
            key = "goodness" if "goodness" in arrays else f"goodness.{i}"
            if key in arrays:
                want = arrays[key][t]
                errors.note("goodness", made.get(f"goodness {i}", np.full_like(want, np.nan)),
                            want)
        loss = [made.get(f"loss {i}", nothing) for i in range(depth)]
        errors.note("loss", loss if arrays["loss"].ndim > 1 else loss[0], arrays["loss"][t])
        if "classifier_loss" in arrays:
            errors.note("classifier_loss", made.get("head loss 0", nothing),
                        arrays["classifier_loss"][t])
        note_outputs(errors, golden, moment, t)
    note_tensors(errors, golden, case.moments, golden.names)
    errors.check()


def note_outputs(errors: Errors, golden: CwComp, moment: Moment, t: int) -> None:
    """What a single layer's turn passes on: pre-step, or (linear) post-step features."""
    if "layers" in golden.config:
        return
    stepper = golden.stepper(FP64, "reference")
    stepper.restore(moment.before)
    turn = Turn((0,), 2)  # as if a layer followed
    ctx = stepper.context(moment.batch, turn)
    layers = Layers(ctx.net, Facts(turn, ctx.batch), "x0", None)
    layers.layer(0, ctx.batch)
    with torch.no_grad():
        tensors = {"x0": entrance(ctx, moment.batch, FP64)}
        layer_turn(Place(ctx, FP64, Rows(0, ctx.batch)), 0, layers.lines, tensors)
    z = tensors["x1"]
    if "out_digest" in golden.arrays:
        errors.note_digest("out_digest", z, golden.arrays["out_digest"][t])
    else:
        pos, neg = z.chunk(2)
        errors.note("out_pos", pos, golden.arrays["out_pos"][t])
        errors.note("out_neg", neg, golden.arrays["out_neg"][t])


def check_validation(case: Trained) -> None:
    """Features in both modes, goodness, predictions, after training."""
    golden, arrays, errors = case.golden, case.golden.arrays, Errors(EXACT)
    if "val.x" not in arrays:
        return
    stepper = golden.stepper(FP64, "reference")
    stepper.restore(case.stepper.snapshot())
    net, x = stepper.net, golden.tensor("val.x")
    with torch.no_grad():
        if "layers" in golden.config:
            note_network(errors, net, x, arrays)
        else:
            note_layer(errors, net, x, arrays)
    errors.check()


def note_layer(errors: Errors, net: LocalNet, x: torch.Tensor,
               arrays: dict[str, np.ndarray]) -> None:
    zs: list[torch.Tensor] = []
    net.run(net.prepare(x), training=True, backend="reference", features=zs)
    errors.note_digest("eval_train_mode", zs[0], arrays["eval_train_mode"])
    layer = net.layer(0)
    errors.note("bn_after_infer", torch.stack([layer.running_mean, layer.running_var]),
                arrays["bn_after_infer"])
    net.run(net.prepare(x), backend="reference", features=zs)
    errors.note_digest("eval_digest", zs[1], arrays["eval_digest"])
    errors.note("eval_first", zs[1][0], arrays["eval_first"])


def note_network(errors: Errors, net: LocalNet, x: torch.Tensor,
                 arrays: dict[str, np.ndarray]) -> None:
    goodness = net.goodness(x, backend="reference")[-1]
    errors.note("val.goodness", goodness, arrays["val.goodness"])
    errors.note("val.pred_goodness", net.scores(x, backend="reference").argmax(1),
                arrays["val.pred_goodness"])
    features = net.head_features(net.heads[0], x, backend="reference")
    errors.note_digest("val.features_digest", features, arrays["val.features_digest"])
    errors.note("val.features_sample", sample(features), arrays["val.features_sample"])
    logits = net.logits(x, backend="reference")[0]
    errors.note("val.softmax", logits.softmax(1), arrays["val.softmax"])
    errors.note("val.pred_softmax", logits.argmax(1), arrays["val.pred_softmax"])


def main(path: str) -> None:
    """`python golden_cw.py FILE`: the layers on Triton, in a process of their own."""
    for case in trained(Path(path)):
        if small(case):
            check_layers(case.golden.stepper, case.moments[-1:], torch.float32, "triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
