"""What a fair table is about: one network, batch, optimizer, dtype, and the turns of training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ffengine.engine.schedule import Schedule
from ffengine.engine.trainer import Trainer
from ffengine.models import create, entry
from ffengine.nn import LocalNet
from ffengine.ops.weight_update import OptimConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Problem:
    """What every side trains on."""

    model: str
    options: dict[str, Any]
    batch: int
    precision: str
    optim: OptimConfig
    x: torch.Tensor
    y: torch.Tensor
    backend: str = "auto"

    @classmethod
    def of(cls, model: str, batch: int, precision: str, device: str = "cpu",
           optimizer: str = "adamw", backend: str = "auto", **options: Any) -> Problem:
        if model.startswith("bp/"):
            raise ValueError(f"[bench] expected a model of local training, got {model}, which is "
                             "what it is compared with")
        if batch < 1:
            raise ValueError(f"[bench] --batch-size expected 1 or more, got {batch}")
        generator = torch.Generator().manual_seed(0)
        net = create(model, **options)
        # within [0, 1], as images are: label overlays and concatenations expect it
        x = torch.rand(batch, *net.in_shape, generator=generator).to(device)
        y = torch.randint(0, net.num_classes, (batch,), generator=generator).to(device)
        momentum = 0.9 if optimizer == "sgd" else 0.0
        optim = OptimConfig(kind=optimizer, lr=1e-3, weight_decay=5e-4,  # type: ignore[arg-type]
                            momentum=momentum)
        return cls(model, options, batch, precision, optim, x, y, backend)

    def network(self, model: str | None = None) -> LocalNet:
        """The network (or its twin) at the same initial weights, every parameter trained by the
        one optimizer: papers give some heads another one."""
        torch.manual_seed(0)
        net = create(model or self.model, **self.options)
        for module in [*net.layers, *net.heads]:
            module.optim = {}
        if hasattr(net, "gamma_optim"):
            net.gamma_optim = {}
        return net.to(self.x.device)

    def trainer(self, precision: str | None = None, **changed: Any) -> Trainer:
        """Of a network of its own; `changed` are arguments of Trainer."""
        optim = self.optim
        recipe = replace(entry(self.model).recipe, optimizer=optim.kind, lr=optim.lr, lr_min=None,
                         weight_decay=optim.weight_decay, momentum=optim.momentum,
                         betas=optim.betas, lr_drops=(), lr_half_linear=False)
        return Trainer(self.network(), **{"recipe": recipe, "batch_size": self.batch,
                                          "precision": precision or self.precision,
                                          "backend": self.backend, "progress": False, **changed})

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def epochs(self) -> int:
        return entry(self.model).recipe.epochs


def turns(schedule: Schedule) -> list[tuple[float, int, int]]:
    """(share of the recipe's epochs, epoch, iteration) of every different turn of a training.

    Shares add up to one; to the number of stages where the recipe's epochs count per layer.
    """
    found: dict[Any, list[float]] = {}
    for epoch in range(schedule.total):
        for iteration in (2, 3):  # any even and any odd one; the first of an epoch also checks
            key = schedule.phase(epoch), schedule.turn(epoch, iteration)
            found.setdefault(key, [0.0, epoch, iteration])[0] += 0.5
    return [(count / schedule.epochs, int(epoch), int(iteration))
            for count, epoch, iteration in found.values()]
