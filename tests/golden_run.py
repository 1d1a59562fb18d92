"""Runs the engine on a golden file: the fp64 trajectory, teacher-forced steps, single layers."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from golden_common import FP64
from golden_df import Golden

from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.execute import train_batch
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.shapes import measure
from ffengine.engine.optim import LocalOptimizer
from ffengine.nn import LocalConv2d, LocalNet
from ffengine.ops.config import LocalPassConfig
from ffengine.ops.local_pass import local_pass
from ffengine.ops.weight_update import OptimConfig, OptimState, Parameter, weight_update

Grads = dict[tuple[int, str], torch.Tensor]


@dataclass
class Trained:
    """A network in training and what its last step left."""

    net: LocalNet
    optimizer: LocalOptimizer
    report: BatchReport | None = None
    grads: Grads | None = None

    def step(self, x: torch.Tensor, y: torch.Tensor, plan: Plan, dtype: torch.dtype,
             backend: str) -> None:
        grads = {(i, kind): torch.empty_like(p) for i in range(len(self.net.layers))
                 for kind, p in self.net.layer(i).named_parameters()}
        ctx = StepContext(self.net, self.optimizer, y, len(x), backend=backend, grads=grads)
        self.report, self.grads = train_batch(ctx, x, plan, dtype), grads

    def outcome(self) -> dict[str, torch.Tensor]:
        """What the last step left: goodness, losses, gradients, weights."""
        out = {f"goodness {i}": g for i, g in enumerate(self.report.goodness)}
        out |= {f"loss {i}": v for i, v in enumerate(self.report.losses)}
        out |= {f"gradient {i}.{kind}": g for (i, kind), g in self.grads.items()}
        return out | {f"weight {name.removeprefix('layers.')}": p.detach().clone()
                      for name, p in self.net.named_parameters()}

    def snapshot(self) -> dict[str, torch.Tensor | int]:
        """Weights and optimizer state by name."""
        out: dict[str, torch.Tensor | int] = {}
        for name, p in self.net.named_parameters():
            state = self.optimizer.states[name]
            out[name], out[f"{name}.step"] = p.detach().clone(), state.step
            out[f"{name}.m"], out[f"{name}.v"] = state.m.clone(), state.v.clone()
        return out

    def restore(self, saved: dict[str, torch.Tensor | int], lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                state = self.optimizer.states[name]
                p.copy_(saved[name])
                state.step = saved[f"{name}.step"]
                state.m.copy_(saved[f"{name}.m"])
                state.v.copy_(saved[f"{name}.v"])


def trained(golden: Golden, dtype: torch.dtype = FP64) -> Trained:
    """The file's network with fresh optimizer states; 16-bit networks keep fp32 weights."""
    net = golden.network(FP64 if dtype is FP64 else torch.float32)
    return Trained(net, golden.optimizer(net))


def planner(net: LocalNet, batch: int, dtype: torch.dtype, backend: str) -> Planner:
    return Planner(measure(net, batch, dtype, states=2, backend=backend))


def breadth_first(net: LocalNet, batch: int, dtype: torch.dtype, backend: str) -> Plan:
    plans = planner(net, batch, dtype, backend)
    return plans.fixed(range(plans.depth - 1), batch)


@dataclass
class Step:
    """The fp64 reference at one step of a trajectory."""

    x: torch.Tensor
    y: torch.Tensor
    lr: float
    before: dict[str, torch.Tensor | int]
    goodness: list[torch.Tensor]
    losses: list[torch.Tensor]
    grads: Grads
    after: dict[str, torch.Tensor]


@dataclass
class Trajectory:
    """The file's training in fp64 on the reference, and the network it leaves."""

    golden: Golden
    steps: list[Step]
    net: LocalNet
    optimizer: LocalOptimizer


@functools.lru_cache(maxsize=1)
def trajectory(path: Path) -> Trajectory:
    golden = Golden.open(path)
    run = trained(golden)
    scheduler, last = golden.scheduler(run.optimizer), golden.last_steps()
    xs, ys, steps = golden.tensor("x"), golden.labels("y"), []
    plan = breadth_first(run.net, xs.shape[1], FP64, "reference")
    for t in range(golden.steps):
        before, lr = run.snapshot(), run.optimizer.param_groups[0]["lr"]
        run.step(xs[t], ys[t], plan, FP64, "reference")
        after = {n: p.detach().clone() for n, p in run.net.named_parameters()}
        steps.append(Step(xs[t], ys[t], lr, before, run.report.goodness, run.report.losses,
                          run.grads, after))
        if t in last:
            scheduler.step()
    return Trajectory(golden, steps, run.net, run.optimizer)


def features(net: LocalNet, x: torch.Tensor, index: int) -> torch.Tensor:
    """z of one layer, before its shortcut is joined."""
    x, shortcut = net.prepare(x), None
    for i in range(index + 1):
        layer = net.layer(i)
        a = layer.preactivation(net.transform(i, x))
        z = local_pass(a, config=layer.config, backend="reference").z
        if i < index:
            x, shortcut = net.join(i, z, shortcut)
    return z


def layer_inputs(net: LocalNet, x: torch.Tensor) -> list[torch.Tensor]:
    """What every layer sees, after its transform, on the reference."""
    x, shortcut, seen = net.prepare(x), None, []
    for i in range(len(net.layers)):
        layer = net.layer(i)
        seen.append(net.transform(i, x))
        z = local_pass(layer.preactivation(seen[-1]), config=layer.config, backend="reference").z
        x, shortcut = net.join(i, z, shortcut)
    return seen


def layer_turn(layer: LocalConv2d, x: torch.Tensor, y: torch.Tensor,
               backend: str) -> dict[str, torch.Tensor]:
    """Goodness, loss, z and gradients of one layer on its input, in the input's dtype."""
    if backend in ("triton", "cuda") and torch.cuda.is_available():
        layer, x, y = copy.deepcopy(layer).cuda(), x.cuda(), y.cuda()
    optim = OptimConfig("sgd", lr=0.0)
    with torch.no_grad():
        x = x.contiguous(memory_format=torch.channels_last)
        a = layer.preactivation(x)
        z, g, loss, _, da, scale = local_pass(a, y, config=layer.config, want_da=True,
                                              backend=backend)
        grads = {n: torch.empty_like(p) for n, p in layer.named_parameters()}
        given = {n: Parameter(p.detach(), OptimState.create(p.detach(), optim), None, grads[n])
                 for n, p in layer.named_parameters()}
        weight_update(given["weight"], x, da, optim=optim, geometry=layer.geometry,
                      bias=given.get("bias"), da_scale=scale, backend=backend)
    out = {"goodness": g, "z": z, "loss": loss.mean()} | {f"grad.{n}": t for n, t in grads.items()}
    return {name: tensor.cpu() for name, tensor in out.items()}


def case_layer(golden: Golden, index: int, dtype: torch.dtype) -> tuple[LocalConv2d, torch.Tensor]:
    """Layer and input (its pool applied) of one case of a single-layer file."""
    case = golden.config["cases"][index]
    layer = LocalConv2d(case["cin"], case["cout"], case["k"], stride=case["s"], padding=case["p"],
                        bias=case.get("bias", False), config=LocalPassConfig(groups=case["G"]))
    layer.to(FP64 if dtype is FP64 else torch.float32)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(golden.tensor(f"c{index}.init.{name}"))
    x = golden.tensor(f"c{index}.x")
    if case.get("pool"):
        x = torch.nn.functional.avg_pool2d(x, 2)
    return layer, x.to(dtype)


def run_cases(path: Path, dtype: torch.dtype, backend: str) -> list[dict[str, torch.Tensor]]:
    """Every case of a single-layer file on one back-end."""
    golden, out = Golden.open(path), []
    for i in range(len(golden.config["cases"])):
        layer, x = case_layer(golden, i, dtype)
        out.append(layer_turn(layer, x, golden.labels(f"c{i}.y"), backend))
    return out


def main(path: str, out: str, backend: str, dtype: str) -> None:
    """`python golden_run.py FILE OUT.npz BACKEND DTYPE`: for back-ends that want a process."""
    results = run_cases(Path(path), getattr(torch, dtype), backend)
    np.savez(out, **{f"c{i}.{k}": t.double().numpy() for i, case in enumerate(results)
                     for k, t in case.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
