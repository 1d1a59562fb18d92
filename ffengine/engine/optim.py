"""The optimizer of the engine: settings and states here, the step inside `weight_update`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ffengine.engine.held import Held
from ffengine.nn.layers import LocalLayer
from ffengine.ops.memory_accounting import allocating
from ffengine.ops.optim import SMALLEST_COMPRESSED, Half, state_bytes
from ffengine.ops.weight_update import OptimConfig, OptimState

Net = TypeVar("Net", bound=nn.Module)


class LocalOptimizer(torch.optim.Optimizer):
    """Adam, AdamW or SGD over local layers; torch.optim.lr_scheduler works on it.

    A torch Optimizer in what schedulers and checkpoints see (param_groups, lr), but it holds no
    gradients: the engine asks for `config(parameter)` and `state_of(parameter)` and hands both to
    `weight_update`, where gradient and step are one act.

    Args:
        named: (name, parameter) pairs, e.g. net.named_parameters().
        config: kind and hyper-parameters.
        own: parameter name -> the OptimConfig it has instead (layers and heads of their own).
        second: parameter name -> names of further owners. Each owner has a state of its own
            beside the parameter's (Trifecta: two losses train a weight).
        active: names that have states at the start; default all.
        seed: of the stochastic rounding of states and weights in fewer bits than fp32.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, *,
                 own: Mapping[str, OptimConfig] | None = None,
                 second: Mapping[str, Collection[str]] | None = None,
                 active: Collection[str] | None = None, seed: int = 0) -> None:
        self.named, self.seed = dict(named), seed
        groups: dict[OptimConfig, list[str]] = {config: []}
        for name in self.named:
            groups.setdefault((own or {}).get(name, config), []).append(name)
        self._configs = list(groups)
        self._current = list(groups)
        # a network whose every parameter has settings of its own still shows the run's first
        super().__init__([{**_hyper(c), "params": [self.named[n] for n in names]}
                          for c, names in groups.items()], _hyper(config))
        self._group = {n: i for i, names in enumerate(groups.values()) for n in names}
        self._owners = {n: ("", *(second or {}).get(n, ())) for n in self.named}
        self._names = {id(p): n for n, p in self.named.items()}
        self._moving = [p.requires_grad for p in self.named.values()]
        #: The network that it was made for, as it was then.
        self.held: Held | None = None
        self.states: dict[str, OptimState] = {}
        #: Copies in 16 bits of the weights that `keep_halves` named.
        self.halves: dict[str, Half] = {}
        self.activate(self.named if active is None else active)

    def __getstate__(self) -> dict[str, Any]:
        """All but what is made anew, and a scheduler's mark on `step`; torch's own leaves out what
        it does not know."""
        return {k: v for k, v in vars(self).items() if k not in ("_names", "step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._names = {id(p): n for n, p in self.named.items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, but without the wrapper that keeps compilers out: its first call imports
        their whole stack, 160 MB."""
        inspect.unwrap(super().add_param_group)(self, param_group)

    @property
    def kind(self) -> str:
        """Of the run; layers and heads may have another."""
        return self._configs[0].kind

    def activate(self, names: Collection[str]) -> None:
        """Keep states of these parameters only: new ones start at zero, the others are freed."""
        wanted = {key(n, owner) for n in self.named if n in names for owner in self._owners[n]}
        for gone in [k for k in self.states if k not in wanted]:
            del self.states[gone]
        with allocating("state"):
            for name in self.named:
                for owner in self._owners[name]:
                    k = key(name, owner)
                    if k in wanted and k not in self.states:
                        self.states[k] = OptimState.create(
                            self.named[name].detach(), self._configs[self._group[name]],
                            seed=self.seed, name=k)
                        self.states[k].half = self.halves.get(name)

    def changed(self) -> bool:
        """A parameter was frozen, or freed again, since the last time this was asked.

        Raises:
            ValueError: a parameter or a module of the network was replaced.
        """
        if self.held is not None:
            self.held.check()
        before, self._moving = self._moving, [p.requires_grad for p in self.named.values()]
        return before != self._moving

    def keep_halves(self, weights: Collection[nn.Parameter], dtype: torch.dtype) -> None:
        """Keep copies of these weights in 16 bits between steps, and of no others: `half_of`."""
        names = {self._names[id(w)] for w in weights
                 if w.dtype is torch.float32 and id(w) in self._names}
        if names == self.halves.keys():
            return
        self.halves = {n: Half.create(self.named[n], dtype) for n in names}
        for name in self.named:
            for owner in self._owners[name]:
                if key(name, owner) in self.states:
                    self.states[key(name, owner)].half = self.halves.get(name)

    def half_of(self, weight: nn.Parameter, dtype: torch.dtype) -> torch.Tensor | None:
        """The weight in 16 bits, up to date; None where no copy of that dtype is kept."""
        half = self.halves.get(self._names.get(id(weight), "")) if self.halves else None
        return half.current(weight) if half and half.copy.dtype is dtype else None

    def refresh_halves(self) -> None:
        """Bring every copy up to date."""
        for name, half in self.halves.items():
            half.current(self.named[name])

    def half_tensors(self) -> list[torch.Tensor]:
        """Every copy, for the meter."""
        return [half.copy for half in self.halves.values()]

    def config(self, parameter: nn.Parameter | None = None) -> OptimConfig:
        """Hyper-parameters as of now (a scheduler may have moved the learning rate); the run's, of
        a parameter that does not train."""
        return self._now(self._group.get(self._names.get(id(parameter), ""), 0))

    def config_of(self, state: str) -> OptimConfig:
        """The same of the parameter that a state is of, by the state's name."""
        return self._now(self._group[state.split("@")[0]])

    def _now(self, index: int) -> OptimConfig:
        lr = float(self.param_groups[index]["lr"])
        if self._current[index].lr != lr:
            self._current[index] = replace(self._configs[index], lr=lr)
        return self._current[index]

    def state_of(self, parameter: nn.Parameter | None, owner: str = "") -> OptimState | None:
        if parameter is None:
            return None
        return self.states[key(self._names[id(parameter)], owner)]

    def state_tensors(self) -> list[torch.Tensor]:
        """Every state tensor, for the meter."""
        return [t for s in self.states.values() for t in s.tensors().values()]

    def mark_stepped(self) -> None:
        """Tell schedulers that a step was taken (they warn otherwise)."""
        self._opt_called = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Not here: the weights are stepped by the engine, layer by layer."""
        raise RuntimeError("[LocalOptimizer] weights are stepped by the engine inside "
                           "weight_update; call Trainer.step(x, y)")

    def export_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors by name, plain values) for a checkpoint."""
        tensors = {f"{n}.{k}": t for n, s in self.states.items() for k, t in s.tensors().items()}
        values = {"kind": self.kind, "state_precision": self._configs[0].state_precision,
                  "steps": {n: s.step for n, s in self.states.items()},
                  "lr": [group["lr"] for group in self.param_groups]}
        return tensors, values

    def check_state(self, values: dict[str, Any], where: Any) -> None:
        """ValueError unless `values` are `export_state`'s of such an optimizer, of such states.

        where: the file that they come from.
        """
        if values.get("kind") != self.kind:
            raise ValueError(f"[checkpoint] expected optimizer {self.kind}, "
                             f"got {values.get('kind')!r} in {where}")
        precision, saved_as = (self._configs[0].state_precision,
                               values.get("state_precision", "fp32"))
        if saved_as != precision:
            raise ValueError(f"[checkpoint] expected {precision} optimizer states, got {saved_as} "
                             f"in {where}")
        missing = [name for name in self.states if name not in values["steps"]]
        if missing:
            raise ValueError(f"[checkpoint] expected a number of steps of {missing[0]}, got none "
                             f"in {where}")
        if len(values["lr"]) != len(self.param_groups):
            raise ValueError(f"[checkpoint] expected {len(self.param_groups)} learning rates, got "
                             f"{len(values['lr'])} in {where}")

    def import_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any],
                     where: Any = "what was exported") -> None:
        """Take over what `export_state` gave; ValueError if it belongs to another optimizer."""
        self.check_state(values, where)
        mine = {f"{name}.{part}": t for name, state in self.states.items()
                for part, t in state.tensors().items()}
        for name, tensor in mine.items():
            saved = tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                came = "nothing" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
                raise ValueError(f"[checkpoint] expected optimizer state {name} of "
                                 f"{tuple(tensor.shape)} {tensor.dtype}, got {came} in {where}")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        for name, state in self.states.items():
            state.step = int(values["steps"][name])
        for group, lr in zip(self.param_groups, values["lr"], strict=True):
            group["lr"] = lr


def key(name: str, owner: str) -> str:
    """What a state is called."""
    return f"{name}@{owner}" if owner else name


def _hyper(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps,
            "weight_decay": config.weight_decay, "momentum": config.momentum,
            "nesterov": config.nesterov}


def own_settings(net: nn.Module, base: OptimConfig) -> dict[str, OptimConfig]:
    """Parameters that train with settings of their own: `optim` of their layer or head, or
    `<name>_optim` of the network."""
    found: dict[str, OptimConfig] = {}
    for prefix, module in net.named_modules():
        changes = getattr(module, "optim", None)
        for name, _ in module.named_parameters(recurse=False):
            own = getattr(module, f"{name}_optim", changes)
            if own:
                plain = own.get("kind", base.kind) != base.kind
                start = base if not plain else OptimConfig(
                    lr=base.lr, state_precision=base.state_precision)
                found[f"{prefix}.{name}" if prefix else name] = replace(start, **own)
    return found


def floor_bytes(net: nn.Module, base: OptimConfig, phases: Iterable[Collection[str]],
                owners: Mapping[str, Collection[str]], weights: str = "fp32",
                holds: Callable[[str], bool] = lambda name: True) -> int:
    """Parameters, and the optimizer states of the phase that has most of them.

    weights: "bf16" counts as if `round_weights` had been called on the network. holds: whether a
    parameter of this name counts.
    """
    own, rounded = own_settings(net, base), rounds_weights(net) if weights == "bf16" else set()
    named = {n: (p.numel(), torch.bfloat16 if n in rounded else p.dtype)
             for n, p in net.named_parameters() if holds(n)}
    states = [sum(state_bytes(*named[n], own.get(n, base)) * (1 + len(owners.get(n, ())))
                  for n in names) for names in phases]
    return sum(numel * dtype.itemsize for numel, dtype in named.values()) + max(states, default=0)


def rounds_weights(net: nn.Module) -> set[str]:
    """Names of the parameters that are bf16 where a run keeps its weights in bf16."""
    return {f"{prefix}.weight" if prefix else "weight" for prefix, module in net.named_modules()
            if isinstance(module, LocalLayer) and module.weight.numel() >= SMALLEST_COMPRESSED}


def optimizer_of(net: nn.Module, optim: OptimConfig, *, owners: Mapping[str, Collection[str]],
                 active: Collection[str], seed: int = 0) -> LocalOptimizer:
    """The optimizer of what trains in a network; layers and heads with settings of their own get
    them. owners, active: of its schedule, as LocalOptimizer's `second` and `active`."""
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    made = LocalOptimizer(trained, optim, own=own_settings(net, optim), second=owners,
                          active=active, seed=seed)
    made.held = Held(net)
    return made


def outline(net: Net) -> Net:
    """A copy of the network whose tensors have shapes and no memory."""
    held = {id(t): t for t in (*net.parameters(), *net.buffers())}
    shapes: dict[int, Any] = {}
    for at, t in held.items():
        empty = t.detach().to("meta")
        shapes[at] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
    return copy.deepcopy(net, shapes)


def halved_weights(net: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """fp32 weights that a forward pass in `dtype` multiplies with as they are, but for its bits."""
    return [m.weight for m in net.modules() if isinstance(m, LocalLayer) and m.pre_norm is None
            and dtype.itemsize == 2 and m.weight.dtype is torch.float32]


def round_weights(net: nn.Module) -> None:
    """Make the weights of layers bf16 (the nearest), in place; small ones and all else stay."""
    named = dict(net.named_parameters())
    for name in rounds_weights(net):
        named[name].data = named[name].data.to(torch.bfloat16)
