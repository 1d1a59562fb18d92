"""What a fair table is about: one network, batch, optimizer, dtype, and the turns of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ffengine.engine.denormals import flushed
from ffengine.engine.schedules.schedule import Schedule
from ffengine.engine.trainer import Trainer
from ffengine.models import create, entry
from ffengine.nn import LocalNet
from ffengine.ops.product_rule import Products, products
from ffengine.ops.weight_update import OptimConfig

#: tf32: fp32 whose products a GPU's libraries round to TF32, on every contender; in fp32 on none.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float32}
#: Relative size of a rounding of what products take.
EPS = {"fp32": 2.0**-23, "bf16": 2.0**-7, "tf32": 2.0**-10}


@dataclass
class Problem:
    """What every contender trains on, and by which rule its products are formed.

    deterministic: every contender's library products are the same each time; else the fastest
    found.
    """

    model: str
    options: dict[str, Any]
    batch: int
    precision: str
    optim: OptimConfig
    x: torch.Tensor
    y: torch.Tensor
    backend: str = "auto"
    deterministic: bool = True

    @classmethod
    def of(cls, model: str, batch: int, precision: str, device: str = "cpu",
           optimizer: str = "adamw", backend: str = "auto", deterministic: bool = True,
           **options: Any) -> Problem:
        if not entry(model).local:
            raise ValueError(f"[bench] expected a model of local training, got {model}, which is "
                             "what it is compared with")
        if precision == "tf32" and torch.device(device).type != "cuda":
            raise ValueError("[bench] --precision tf32 expected a GPU, whose products it rounds, "
                             f"got {device}")
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
        return cls(model, options, batch, precision, optim, x, y, backend, deterministic)

    @contextlib.contextmanager
    def rules(self) -> Iterator[None]:
        """What holds for every contender alike: how products are formed, and denormals flushed, as
        an expert sets it."""
        rule = Products(self.precision == "tf32", self.deterministic)
        with products(rule), flushed(self.x.device):
            yield

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
        kind = precision or ("fp32" if self.precision == "tf32" else self.precision)
        return Trainer(self.network(), **{
            "recipe": recipe, "batch_size": self.batch, "precision": kind,
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
