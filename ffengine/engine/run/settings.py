"""What a training run was asked to do, as plain values that travel in its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ffengine.engine.optim import LocalOptimizer
from ffengine.engine.run.recipe import Recipe
from ffengine.ops.weight_update import OptimConfig

PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16,
              "fp16": torch.float16}
#: What optimizer states, and the weights of layers, are kept in.
STATES, WEIGHTS = ("fp32", "bf16", "8bit"), ("fp32", "bf16")
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True)
class Settings:
    """A recipe with the caller's changes, the seed and the precision."""

    optimizer: str
    lr: float
    lr_min: float
    weight_decay: float
    epochs: int
    lr_epochs: int
    batch_size: int
    seed: int
    precision: str
    betas: tuple[float, ...] = (0.9, 0.999)
    momentum: float = 0.0
    lr_drops: tuple[tuple[int, float], ...] = ()
    lr_half_linear: bool = False
    states: str = "fp32"
    weights: str = "fp32"

    @classmethod
    def resolve(cls, recipe: Recipe, *, lr: float | None = None, epochs: int | None = None,
                batch_size: int | None = None, seed: int = 0, precision: str = "fp32",
                states: str = "fp32", weights: str = "fp32") -> Settings:
        """The recipe where the caller was silent; a changed lr keeps the recipe's lr_min : lr."""
        top = recipe.lr if lr is None else lr
        floor = recipe.lr if recipe.lr_min is None else recipe.lr_min
        if top != recipe.lr:
            floor = floor * (top / recipe.lr) if recipe.lr else top
        total = recipe.epochs if epochs is None else epochs
        made = cls(recipe.optimizer, top, floor, recipe.weight_decay, total,
                   recipe.lr_epochs or total,
                   recipe.batch_size if batch_size is None else batch_size, seed, precision,
                   tuple(recipe.betas), recipe.momentum,
                   tuple((int(e), float(f)) for e, f in recipe.lr_drops), recipe.lr_half_linear,
                   states, weights)
        made._check()
        return made

    def _check(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"[trainer] precision must be one of {', '.join(PRECISIONS)}, "
                             f"got {self.precision!r}")
        for name, known in (("states", STATES), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"[trainer] {name} must be one of {', '.join(known)}, "
                                 f"got {getattr(self, name)!r}")
        if self.weights == "bf16" and self.precision != "bf16":
            raise ValueError("[trainer] weights=bf16 expected precision bf16, got "
                             f"{self.precision}")
        if self.states != "fp32" and self.precision == "fp64":
            raise ValueError(f"[trainer] states={self.states} expected a precision below fp64, "
                             f"got {self.precision}")
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"[trainer] {name} must be a whole number of at least 1, "
                                 f"got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or (
                not 0 <= self.seed < 2**32):
            raise ValueError(f"[trainer] seed must lie in 0..2^32 - 1, got {self.seed!r}")
        for name in ("lr", "lr_min", "weight_decay"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"[trainer] {name} must be a finite number of 0 or more, "
                                 f"got {value!r}")

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return PRECISIONS[self.precision]

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    def optim(self) -> OptimConfig:
        return OptimConfig(kind=self.optimizer, lr=self.lr,  # type: ignore[arg-type]
                           weight_decay=self.weight_decay, betas=(self.betas[0], self.betas[1]),
                           momentum=self.momentum if self.optimizer == "sgd" else 0.0,
                           state_precision=self.states)  # type: ignore[arg-type]

    def rate_factor(self, epoch: int) -> float:
        """The learning rate of an epoch over that of epoch 0."""
        if self.lr_half_linear:
            late = epoch > self.lr_epochs // 2
            return 2 * (1 + self.lr_epochs - epoch) / self.lr_epochs if late else 1.0
        factor = math.prod(f for at, f in self.lr_drops if epoch >= at)
        low = self.lr_min / self.lr if self.lr else 1.0
        return factor * (low + (1 - low) * (1 + math.cos(math.pi * epoch / self.lr_epochs)) / 2)

    def check_same(self, saved: dict[str, Any], where: Any) -> None:
        """ValueError if a run saved with other settings cannot go on bit-exactly with these."""
        for name, mine in json.loads(json.dumps(asdict(self))).items():
            had = saved.get(name, "fp32" if name in ("states", "weights") else None)
            if name not in ("epochs", "lr_epochs") and had != mine:
                raise ValueError(f"[checkpoint] expected {name} {mine}, got {had} in {where}")


class LearningRate:
    """The learning rate as a function of the epoch: the settings' own, or a scheduler's of torch.

    A scheduler is replayed from the start when an earlier epoch is asked for, or when a run goes
    on: the same epoch always has the same rate, bit for bit.
    """

    def __init__(self, optimizer: LocalOptimizer, settings: Settings,
                 factory: SchedulerFactory | None) -> None:
        self.optimizer, self.settings, self.factory = optimizer, settings, factory
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.rewind()

    def rewind(self) -> None:
        """Back to epoch 0."""
        self._set(1.0)
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)
        self._scheduler = None if self.factory is None else self.factory(self.optimizer)
        self._epoch = 0
        if self._scheduler is None:
            self._set(self.settings.rate_factor(0))

    def move_to(self, epoch: int) -> float:
        """Set the optimizer to the rate of `epoch`, and give it."""
        if self._scheduler is None:
            if epoch != self._epoch:
                self._set(self.settings.rate_factor(epoch))
                self._epoch = epoch
            return self.now
        if epoch < self._epoch:
            self.rewind()
        self.optimizer.mark_stepped()
        while self._epoch < epoch:
            self._scheduler.step()
            self._epoch += 1
        return self.now

    def _set(self, factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor

    @property
    def now(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])
