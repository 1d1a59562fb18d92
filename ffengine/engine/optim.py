"""The optimizer of the engine: settings and states here, the step inside `weight_update`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ffengine.ops import scratch
from ffengine.ops.weight_update import OptimConfig, OptimState


class LocalOptimizer(torch.optim.Optimizer):
    """Adam, AdamW or SGD over local layers; torch.optim.lr_scheduler works on it.

    A torch Optimizer in what schedulers and checkpoints see (param_groups, lr), but it holds no
    gradients: the engine asks for `config()` and `state_of(parameter)` and hands both to
    `weight_update`, where gradient and step are one act.

    Args:
        named: (name, parameter) pairs, e.g. net.named_parameters().
        config: kind and hyper-parameters.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.named = dict(named)
        self.kind = config.kind
        super().__init__(list(self.named.values()), {
            "lr": config.lr, "betas": config.betas, "eps": config.eps,
            "weight_decay": config.weight_decay, "momentum": config.momentum,
            "nesterov": config.nesterov})
        with scratch.allocating("state"):
            self.states = {n: OptimState.create(p.detach(), config) for n, p in self.named.items()}
        self._names = {id(p): n for n, p in self.named.items()}

    def config(self) -> OptimConfig:
        """Hyper-parameters as of now (a scheduler may have moved the learning rate)."""
        group = self.param_groups[0]
        return OptimConfig(kind=self.kind, lr=float(group["lr"]), betas=tuple(group["betas"]),
                           eps=group["eps"], weight_decay=group["weight_decay"],
                           momentum=group["momentum"], nesterov=group["nesterov"])

    def state_of(self, parameter: nn.Parameter | None) -> OptimState | None:
        return None if parameter is None else self.states[self._names[id(parameter)]]

    def state_tensors(self) -> list[torch.Tensor]:
        """Every state tensor, for the meter."""
        return [t for s in self.states.values() for t in (s.m, s.v) if t is not None]

    def mark_stepped(self) -> None:
        """Tell schedulers that a step was taken (they warn otherwise)."""
        self._opt_called = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Not here: the weights are stepped by the engine, layer by layer."""
        raise RuntimeError("[LocalOptimizer] weights are stepped by the engine inside "
                           "weight_update; call Trainer.step(x, y)")

    def export_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors by name, plain values) for a checkpoint."""
        tensors = {f"{n}.{k}": t for n, s in self.states.items()
                   for k, t in (("m", s.m), ("v", s.v)) if t is not None}
        values = {"kind": self.kind, "steps": {n: s.step for n, s in self.states.items()},
                  "lr": self.param_groups[0]["lr"]}
        return tensors, values

    def import_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Take over what `export_state` gave; ValueError if it belongs to another optimizer."""
        if values.get("kind") != self.kind:
            raise ValueError(f"[checkpoint] expected optimizer {self.kind}, "
                             f"got {values.get('kind')!r}")
        for name, state in self.states.items():
            for key, mine in (("m", state.m), ("v", state.v)):
                if mine is None:
                    continue
                saved = tensors.get(f"{name}.{key}")
                if saved is None or saved.shape != mine.shape:
                    came = "nothing" if saved is None else tuple(saved.shape)
                    raise ValueError(f"[checkpoint] expected optimizer state {name}.{key} of "
                                     f"{tuple(mine.shape)}, got {came}")
                mine.copy_(saved)
            state.step = int(values["steps"][name])
        self.param_groups[0]["lr"] = values["lr"]
