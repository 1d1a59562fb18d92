"""A step asks nothing of the device that the host would have to wait for.

Any machine: a step of every network on CUDA tensors without values, every copy seen. A GPU: the
same steps with torch's own check for synchronisation turned into an error.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import DEVICE, HostTraffic, fake_cuda
from models.every import NAMES, batch, network, trainer
from torch import nn

from ffengine.engine.batch import paired
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.plan import one_tile
from ffengine.engine.memory.plans import TrainingPlan, phase_starts, planner_for
from ffengine.engine.schedules.backprop import Backprop
from ffengine.engine.trainer import Trainer
from ffengine.nn import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops.batch_pass import batch_pass
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm, ce
from ffengine.ops.local_pass import local_pass

SAMPLES = 8
Sent = Counter[tuple[torch.dtype, tuple[int, ...]]]


def brought(net: LocalNet, t: Trainer, n: int = SAMPLES) -> Sent:
    """All that a step brings from the host: samples and labels, one table of what changes from step
    to step, and what generators of the CPU draw, the same for every device."""
    assert t.clock is not None
    sent = Counter([(torch.float32, (n, *net.in_shape)), (torch.int64, (n,)),
                    (torch.float32, tuple(t.clock.table.shape))])
    if isinstance(net.schedule, Backprop):
        return sent
    layers = t.schedule.turn(t.epoch, t.iteration).depth  # heads alone need no negatives
    if layers and paired(net) and net.negatives in ("random", "permuted"):
        sent[torch.int64, (n,)] += 1
    if isinstance(net, RecurrentNet):  # initial states of both halves
        sent.update((torch.float32, (1, width)) for _ in range(2) for width in net.widths)
    return sent


def on_fakes(net: LocalNet) -> LocalNet:
    """The network on CUDA tensors without values; inside `fake_cuda`."""
    memo: dict[int, Any] = {}
    for t in (*net.parameters(), *net.buffers()):
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
        memo[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
    made = copy.deepcopy(net, memo)
    made.to = lambda **_: made  # type: ignore[method-assign]  # fakes cannot be swapped
    return made


def plans(net: LocalNet, tiled: bool) -> TrainingPlan:
    """Cuts and tiles, searched for a CPU: they mean the same on any device."""
    job = trainer(copy.deepcopy(net)).planning.job
    depth, rows = len(net.layers), rows_of(net, SAMPLES)
    return TrainingPlan(tuple(
        (epoch, planner_for(job, SAMPLES, epoch).smallest() if tiled
         else one_tile(range(depth), rows)) for epoch in phase_starts(job.schedule)))


#: Every network by the kernels and by the reference; those that take tiles in tiles, too.
CASES = [*((name, "triton", False) for name in NAMES),
         *((name, "reference", False) for name in NAMES if not name.startswith("bp/")),
         *((name, "triton", True) for name in (
             "deeperforward/resnet17", "hinton/threshold", "cff/adaptive", "fflib/ffnn-c"))]


@pytest.mark.parametrize(("name", "backend", "tiled"), CASES, ids=[
    f"{name}-{backend}{'-tiles' * tiled}" for name, backend, tiled in CASES])
def test_the_second_step_waits_for_nothing(name: str, backend: str, tiled: bool,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    # labels are looked at where they lie in RAM; fake ones hold no numbers
    monkeypatch.setattr("ffengine.engine.batch.check_range", lambda y, count: None)
    net = network(name)
    planned = plans(net, tiled)
    x, y = batch(net, SAMPLES)
    with fake_cuda():
        t = trainer(on_fakes(net), device=DEVICE, backend=backend)
        t.planning._made[SAMPLES] = planned
        for epoch in phase_starts(t.schedule):
            t.epoch, t.iteration = epoch, 1  # an epoch's first batch is looked at
            t.optimizer.activate(t.schedule.active(epoch))
            for _ in range(2):  # losses may take turns
                t.train_on((x, y))
            for _ in range(2):
                with HostTraffic() as seen:
                    t.train_on((x, y))
                assert Counter(seen.sent) == brought(net, t), f"epoch {epoch}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_the_second_step_synchronises_with_nothing(name: str, backend: str) -> None:
    net = network(name)
    t = trainer(net, device="cuda", backend=backend)
    x, y = batch(net, SAMPLES)
    before = torch.cuda.get_sync_debug_mode()
    for epoch in phase_starts(t.schedule):
        for iteration in range(4):  # losses may take turns; an epoch's first batch is looked at
            torch.cuda.set_sync_debug_mode("error" if iteration > 1 else before)
            try:
                t.step(x, y, epoch=epoch, iteration=iteration)
            finally:
                torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_groups_of_unequal_width_need_is_sent_once(backend: str) -> None:
    """Losses in Python too; no registered network has them."""
    config = LocalPassConfig(groups=(0, 3, 8), norm=Norm("none"), loss=cross_entropy)
    built_in = replace(config, loss=ce())
    with fake_cuda():
        a = torch.empty(4, 8, 3, 3, device=DEVICE)
        y = torch.empty(4, dtype=torch.int64, device=DEVICE)
        for mode in (nullcontext(), HostTraffic()):
            with mode:
                for each in (config, built_in):
                    local_pass(a, y, config=each, want_da=True, backend=backend)
                    batch_pass(a, y, config=each, coupling=BatchNorm(), want_da=True,
                               backend=backend)
        assert not mode.sent


def cross_entropy(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(g, y, reduction="none")
