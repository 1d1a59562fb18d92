"""Reads a DeeperForward golden file: network, hyper-parameters and batches, all from its config."""

from __future__ import annotations

import re

import torch
from golden_common import Archive

from ffengine.engine.optim import LocalOptimizer
from ffengine.models.deeperforward import chain
from ffengine.nn import LocalNet, Wire
from ffengine.ops.weight_update import OptimConfig


def parameter(net: LocalNet, name: str) -> torch.nn.Parameter:
    """The parameter a file calls e.g. layers.3.weight."""
    index, kind = re.search(r"(\d+)\D*(weight|bias)$", name).groups()
    return getattr(net.layer(int(index)), kind)


class Golden(Archive):
    """One trajectory file and what its config says."""

    def network(self, dtype: torch.dtype = torch.float64) -> LocalNet:
        """The network the config's layer list and shortcut flags describe."""
        c = self.config
        layers = c["layers"]
        flags = [c.get(k, [0] * len(layers)) for k in
                 ("shortcut_flag", "input_shortcut_flag", "downsample_flag")]
        wires = [Wire(bool(row["avgpool_before"]), ("none", "add", "concat")[int(j)], bool(b),
                      bool(b and d))
                 for row, j, b, d in zip(layers, *flags, strict=True)]
        rows = [(r["in_ch"], r["out_ch"], r["k"], r["stride"]) for r in layers]
        net = chain(rows, wires, num_classes=c["G"], in_shape=(c["in_ch"], *c["hw"]), dropout=0.0,
                    bias=any("bias" in n for n in c["param_names"]))
        for row, layer in zip(layers, net.layers, strict=True):
            assert layer.geometry.padding == row["pad"]
        net.to(dtype)
        with torch.no_grad():
            for i, name in enumerate(c["param_names"]):
                parameter(net, name).copy_(self.initial(i))
        return net

    def scheduler(self, optimizer: LocalOptimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Steps once per entry of `config.epochs`; CNN-14 and NoResnet fix T_max at 150."""
        fixed = (self.config["arch"].lower().startswith(("vgg", "nores"))
                 or "epochs_T" not in self.config)
        return torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, 150 if fixed else self.config["epochs_T"], self.config["lr_min"])

    def last_steps(self) -> set[int]:
        """Steps after which the scheduler moves."""
        return {epoch[-1] for epoch in self.config["epochs"]}

    def validation(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The held-out batches, as the authors' loader cut them."""
        sizes = self.config["val"]
        return list(zip(self.tensor("val.x").split(sizes), self.labels("val.y").split(sizes),
                        strict=True))

    def optim(self) -> OptimConfig:
        kind, options = self.config["optimizer"]
        return OptimConfig(kind=kind.lower(), lr=self.config["lr"], betas=tuple(options["betas"]),
                           eps=options["eps"], weight_decay=options["weight_decay"])

    def optimizer(self, net: LocalNet) -> LocalOptimizer:
        return LocalOptimizer(net.named_parameters(), self.optim())
