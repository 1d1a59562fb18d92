"""The sides of a fair table: one network, one batch, one optimizer, one dtype, many ways to step.

A side owns its network (same initial weights), steps on call, and says what memory it holds.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffengine.engine.baselines import BackpropStep, UnfusedStep, backprop_recipes
from ffengine.engine.meter import MemoryMeter, allocator_events
from ffengine.engine.optim import LocalOptimizer
from ffengine.engine.plan import Plan, Planner
from ffengine.engine.shapes import measure
from ffengine.engine.step import StepContext, train_batch
from ffengine.models import create
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

    @classmethod
    def of(cls, model: str, batch: int, precision: str, device: str = "cpu",
           **options: Any) -> Problem:
        generator = torch.Generator().manual_seed(0)
        net = create(model, **options)
        x = torch.randn(batch, *net.in_shape, generator=generator).to(device)
        y = torch.randint(0, net.num_classes, (batch,), generator=generator).to(device)
        optim = OptimConfig(kind="adamw", lr=1e-3, weight_decay=5e-4)
        return cls(model, options, batch, precision, optim, x, y)

    def network(self) -> LocalNet:
        torch.manual_seed(0)
        return create(self.model, **self.options).to(self.x.device)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def nbytes(t: torch.Tensor) -> int:
    return t.untyped_storage().nbytes()


@dataclass
class Side:
    """One row: `step()` trains on the batch; `tensors()` are its parameters and states."""

    name: str
    step: Callable[[], Any]
    tensors: Callable[[], dict[str, list[torch.Tensor]]]
    planned: int | None = None
    kind: str = "ffengine"

    def metered(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, int]:
        """One more step under the meter: peak bytes and their split."""
        with MemoryMeter(**self.tensors(), feature=[x, y]) as meter:
            self.step()
        return {"peak_bytes": meter.report.peak_bytes, **meter.report.at_peak,
                "allocated_bytes": self._allocated(x, y)}

    def _allocated(self, x: torch.Tensor, y: torch.Tensor) -> int:
        """The same by the allocator's own count; kernels' private buffers are not in it on CPU."""
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - sum(map(nbytes, self._held(x, y)))
            self.step()
            return torch.cuda.max_memory_allocated() - others
        with allocator_events() as events:
            self.step()
        return events.peak + sum(map(nbytes, self._held(x, y)))

    def _held(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """Tensors that live before and after a step."""
        return [*(t for group in self.tensors().values() for t in group), x, y]


def engine_side(problem: Problem, name: str, budget: int | None = None, *,
                fastest: bool = False, backend: str = "auto") -> Side:
    """ffengine under a budget (None: the planner's default; `fastest`: no thought for memory)."""
    net = problem.network()
    optimizer = LocalOptimizer(net.named_parameters(), problem.optim)
    planner = Planner(measure(net, problem.batch, problem.dtype, states=problem.optim.states,
                              device=problem.x.device.type, backend=backend))
    plan: Plan = planner.fastest() if fastest else planner.best(budget)

    def step() -> Any:
        ctx = StepContext(net, optimizer, problem.y, problem.batch, backend=backend)
        return train_batch(ctx, problem.x, plan, problem.dtype)

    def tensors() -> dict[str, list[torch.Tensor]]:
        return {"parameter": [p.detach() for p in net.parameters()],
                "state": optimizer.state_tensors()}

    return Side(name, step, tensors, planned=plan.peak_bytes)


def unfused_sides(problem: Problem) -> Iterator[Side]:
    """The eager step as published, and an expert's (channels_last, fused optimizer)."""
    for name, options in (("eager step", {}),
                          ("eager step, expert", {"channels_last": True, "fused": True})):
        yield _baseline(problem, name, UnfusedStep(
            problem.network(), problem.optim, problem.dtype, **options), "eager")


def compiled_side(problem: Problem) -> Side:
    """torch.compile of the expert's eager step, a layer's turn a graph."""
    # each layer is its own graph; the default limit would send the ninth back to eager
    torch._dynamo.config.recompile_limit = 256
    side = UnfusedStep(problem.network(), problem.optim, problem.dtype, channels_last=True,
                       fused=True)
    side.turn = torch.compile(side.turn, dynamic=False)  # type: ignore[method-assign]
    return _baseline(problem, "eager step, torch.compile", side, "eager")


def backprop_sides(problem: Problem, only: str | None = None) -> Iterator[Side]:
    """Every backpropagation recipe, contiguous and channels_last."""
    for name, options in backprop_recipes(problem.batch):
        if only is not None and only != name:
            continue
        for channels_last in (False, True):
            side = BackpropStep(problem.network(), problem.optim, problem.dtype,
                                channels_last=channels_last, **options)
            yield _baseline(problem, name + (" (cl)" if channels_last else ""), side, "bp")


def _baseline(problem: Problem, name: str, side: UnfusedStep | BackpropStep, kind: str) -> Side:
    return Side(name, lambda: side.step(problem.x, problem.y), side.tensors, kind=kind)


def authors_side(problem: Problem, checkout: Path) -> Side:
    """DeeperForward's published step, from a checkout of its repository (folder with model/)."""
    constructors = {"deeperforward/resnet17": ("model.resnet", "Resnet"),
                    "deeperforward/cnn14": ("model.vgg", "Vgg"),
                    "deeperforward/tinycnn": ("model.tinycnn", "TinyCNN")}
    if problem.model not in constructors:
        raise ValueError(f"[bench] the authors' code is wired for {', '.join(constructors)}, "
                         f"got {problem.model}")
    module, name = constructors[problem.model]
    if not (checkout / "model").is_dir():
        raise ValueError(f"[bench] expected a checkout with a model/ folder, got {checkout}")
    sys.path.insert(0, str(checkout))
    options: dict[str, Any] = {"learning_rate": problem.optim.lr}
    if name == "Resnet":
        options |= {"weight_decay": problem.optim.weight_decay, "planes": [100, 200, 400, 800]}
    net = getattr(importlib.import_module(module), name)(
        dropout=problem.options.get("dropout", 0.2), **options).to(problem.x.device)
    batches = [(problem.x, problem.y)]

    def step() -> None:
        half = problem.precision != "fp32"
        with torch.autocast(problem.x.device.type, problem.dtype) if half else nullcontext():
            net.update(batches)

    def tensors() -> dict[str, list[torch.Tensor]]:
        states = [t for o in net.optimizers for s in o.state.values() for t in s.values()
                  if isinstance(t, torch.Tensor) and t.dim()]
        return {"parameter": [p.detach() for p in net.parameters()], "state": states}

    return Side("authors' step", step, tensors, kind="authors")
