"""A ResNet-17 step in one tile as a GPU would get it, under the stub driver: what the host does.

    python -m tests.stub_driver tests.engine.host_worker [--profile]

Every launch of ours goes through Triton's own launcher; the library's convolutions and their
gradients, whose host time is the library's, answer at once with memory nobody wrote. Prints one
JSON object: microseconds of process time and function calls a step, launches of ours, the rates of
two steps, and the kernels whose launches had other arguments in the second.
"""

from __future__ import annotations

import contextlib
import cProfile
import json
import pstats
import sys
import time
from typing import Any

import torch

import ffengine as ff
from ffengine.engine import trainer as loop
from ffengine.engine.clock import StepClock
from ffengine.engine.memory.plans import Job, TrainingPlan, planner_for
from ffengine.nn import layers, network, norms
from ffengine.reference import weight_update as reference
from tests import stub_driver
from tests.engine.training import grouped

ROUNDS, REPEATS = 5, 4


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: Any, geometry: Any) -> torch.Tensor:
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    return torch.empty((x.shape[0], weight.shape[0], height, width), dtype=x.dtype,
                       memory_format=torch.channels_last)


def gradient(x: torch.Tensor, da: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(weight)


class Pooled:
    """torch.nn.functional for what stands around the layers."""

    @staticmethod
    def avg_pool2d(x: torch.Tensor, size: int) -> torch.Tensor:
        return torch.empty((*x.shape[:2], x.shape[2] // size, x.shape[3] // size), dtype=x.dtype,
                           memory_format=torch.channels_last)

    @staticmethod
    def layer_norm(x: torch.Tensor, shape: Any) -> torch.Tensor:
        return torch.empty_like(x)


def trainer(samples: int) -> ff.Trainer:
    """On CPU tensors, with what a trainer on a GPU has."""
    net = ff.models.create("deeperforward/resnet17", planes=(20, 40, 80, 160))
    t = grouped(net, epochs=2, lr=0.1, lr_min=0.01, precision="bf16", backend="triton",
                progress=False)
    job = t.planning.job = Job(t.net, t.schedule, t.settings, "cpu", "triton", roomy=True)
    t.planning.base = t.planning._made[samples] = TrainingPlan(
        ((0, planner_for(job, samples).one_tile()),))
    t.clock = StepClock(t.optimizer, t.device)
    return t


def main() -> None:
    driver = stub_driver.DRIVER
    assert driver is not None
    layers.convolve = convolve
    reference.weight_gradient = gradient
    # what a GPU computes takes no time of the host's
    network.F = Pooled  # type: ignore[assignment]
    loop.flushed = lambda device: contextlib.nullcontext()
    norms.F = Pooled
    torch.set_num_threads(1)
    samples = 2
    t = trainer(samples)
    x, y = torch.rand(samples, 3, 32, 32), torch.zeros(samples, dtype=torch.int64)
    t.finite.host = False  # values are nobody's
    t.finite.check = lambda: None
    for _ in range(3):
        t.step(x, y)
    before = driver.count()
    t.step(x, y)
    launches = driver.count() - before
    found, rates = [], []
    for epoch in (0, 1):
        with driver.recorded() as log:
            t.step(x, y, epoch=epoch, iteration=1)
        rates.append(t.rate.now)
        found.append([(launch.kernel, launch.grid, launch.numbers) for launch in log])
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            t.step(x, y)
        times.append(time.process_time() - start)
    with cProfile.Profile() as profile:
        t.step(x, y)
    stats = pstats.Stats(profile)
    if "--profile" in sys.argv:
        stats.sort_stats("tottime").print_stats(45)
    differ = sorted({a[0] for a, b in zip(*found, strict=True) if a != b})
    print(json.dumps({
        "microseconds": min(times) / REPEATS * 1e6, "launches": launches, "rates": rates,
        "differ": differ, "calls": stats.total_calls}))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
