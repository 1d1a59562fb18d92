"""Reads a DeeperForward golden file: network, hyper-parameters and batches, all from its config."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffengine.engine.optim import LocalOptimizer
from ffengine.models.deeperforward import chain
from ffengine.nn import LocalNet, Wire
from ffengine.ops.weight_update import OptimConfig


def hash_tensor(seed: int, shape: list[int], m: int, e: int) -> np.ndarray:
    """Initial weights by formula (goldens' README): exact in float32."""
    with np.errstate(over="ignore"):
        i = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        z = np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64) + i * np.uint64(0xD1B54A32D192ED03)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (((z >> np.uint64(48)).astype(np.int64) - 32768) * m * 2.0**-e).reshape(shape)


def digest(t: torch.Tensor) -> np.ndarray:
    a = t.detach().double().contiguous().numpy().ravel()
    wave = np.cos(0.7 * (np.arange(a.size) + 1))
    return np.array([a.sum(), np.abs(a).sum(), np.sqrt((a * a).sum()), (a * wave).sum()])


def sample(t: torch.Tensor) -> np.ndarray:
    a = t.detach().double().contiguous().numpy().ravel()
    return a[[(j * (a.size - 1)) // 15 for j in range(16)]]


def parameter(net: LocalNet, name: str) -> torch.nn.Parameter:
    """The parameter a file calls e.g. layers.3.weight."""
    index, kind = re.search(r"(\d+)\D*(weight|bias)$", name).groups()
    return getattr(net.layer(int(index)), kind)


@dataclass
class Golden:
    """One trajectory file and what its config says."""

    path: Path
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, path: Path) -> Golden:
        with np.load(path) as data:
            arrays = {k: data[k] for k in data.files if k != "config"}
            return cls(path, json.loads(str(data["config"])), arrays)

    def tensor(self, key: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key].astype(np.float64)).to(dtype)

    def labels(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key].astype(np.int64))

    @property
    def steps(self) -> int:
        return len(self.arrays["x"])

    def initial(self, index: int) -> torch.Tensor:
        name = self.config["param_names"][index]
        if f"init.{name}" in self.arrays:
            return self.tensor(f"init.{name}")
        seed, m, e = self.config["init_hash"][name]
        return torch.from_numpy(hash_tensor(seed, self.config["param_shapes"][index], m, e))

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
