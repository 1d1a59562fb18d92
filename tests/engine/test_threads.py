"""Nothing is global: whatever another thread does, a thread's results are those it reaches alone,
bit for bit, and its meter and profile tell of its own calls only."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis.profiling import fix_rates
from models.every import batch, network, state, trainer

from ffengine.engine.inputs import rows_of
from ffengine.engine.memory import costs, meter
from ffengine.engine.memory.dry_run import DryRun
from ffengine.engine.memory.meter import MemoryMeter, allocator_events
from ffengine.engine.memory.plan import one_tile
from ffengine.engine.memory.plans import planner_for
from ffengine.nn import LocalNet
from ffengine.ops.config import LocalPassConfig, ce
from ffengine.ops.local_pass import local_pass
from ffengine.ops.memory_accounting import allocating
from ffengine.profile import record

#: Of every schedule, and of every op: layers together, overlapping, frames, taking turns, layer by
#: layer, across layers, by parts of their own.
FAMILIES = ("cafo/cnn", "cff/adaptive", "cwcomp/cfse", "deeperforward/resnet17",
            "deeperforward/tinycnn", "fflib/ffnn", "fflib/ffnn-c", "fflib/ffrnn",
            "hinton/peer-norm", "sn/cifar10", "sn/mlp", "symba/mlp", "trifecta/deep",
            "trifecta/fcn")
WAIT = 120


class Working(threading.Thread):
    """`work` in a thread of its own; `result` waits for what it returned, or raises what it did."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(WAIT)
        assert not self.is_alive(), "a thread that does not end"
        if self.error is not None:
            raise self.error
        return self.found


@contextmanager
def held_open(context: Any) -> Iterator[None]:
    """Another thread is inside `context` as long as this one is inside the block."""
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with context:
            inside.set()
            assert over.wait(WAIT)

    thread = Working(hold)
    assert inside.wait(WAIT)
    try:
        yield
    finally:
        over.set()
        thread.result()


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns every 50 us, not every 5 ms: what they share is met in every state."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def dry_run() -> Any:
    job = trainer(network("trifecta/shallow")).planning.job
    return DryRun(job.net, job.schedule, job.settings.optim(), torch.float32, 8).on()


def trained(net: LocalNet, steps: int = 3, **settings: Any) -> list[torch.Tensor]:
    """Weights, buffers and optimizer states after some steps of a copy."""
    net = copy.deepcopy(net)
    made = trainer(net, **settings)
    for i in range(steps):
        made.step(*batch(net, seed=i))
    return [*state(net).values(), *made.optimizer.state_tensors()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_compute_while_another_thread_plans(name: str) -> None:
    net = network(name)
    plan = one_tile(range(len(net.layers)), rows_of(net, 8))
    x, _ = batch(net)
    alone, answer = trained(net, plan=plan), net(x)
    with held_open(dry_run()):
        assert torch.equal(net(x), answer)
        assert equal(trained(net, plan=plan), alone)


def test_a_plan_is_the_same_beside_kernels_that_run(often: None) -> None:
    """And the kernels' answers are the same beside the plan."""
    net, other = network("fflib/ffnn"), network("trifecta/shallow")
    x, _ = batch(net)
    answer, over = net(x), threading.Event()

    def answers() -> int:
        seen = 0
        while not over.is_set():
            assert torch.equal(net(x), answer)
            seen += 1
        return seen

    def plans() -> list[Any]:
        job = trainer(copy.deepcopy(other)).planning.job
        return [planner_for(job, samples).smallest() for samples in (30, 31)]

    thread = Working(answers)
    try:
        beside = plans()
    finally:
        over.set()
    assert thread.result() > 0
    assert beside == plans()


@pytest.mark.parametrize("name", FAMILIES)
def test_two_trainers_end_where_each_ends_alone(name: str, often: None) -> None:
    """Together first: what a process remembers of a plan would otherwise spare them the making."""
    nets = [network(name, seed=1), network("trifecta/shallow", seed=2)]
    ready = threading.Barrier(2)

    def run(net: LocalNet) -> list[torch.Tensor]:
        ready.wait(WAIT)
        return trained(net, batch_size=8)

    threads = [Working(lambda net=net: run(net)) for net in nets]
    together = [thread.result() for thread in threads]
    for beside, net in zip(together, nets, strict=True):
        assert equal(beside, trained(net, batch_size=8))


def test_two_threads_measure_costs_one_after_the_other(
        often: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both read the same curves afterwards, and choose the same plan by them."""
    monkeypatch.setenv("FFENGINE_CACHE", str(tmp_path))
    running, most, timed = [0], [0], costs.LayerTimer.time

    def time(self: Any, kind: str, n: int) -> float:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            return timed(self, kind, n)
        finally:
            running[0] -= 1

    monkeypatch.setattr(costs.LayerTimer, "time", time)
    net = network("deeperforward/tinycnn")
    room = trainer(copy.deepcopy(net), batch_size=32).planning.planner(32).smallest().peak_bytes
    threads = [Working(lambda: trainer(copy.deepcopy(net), batch_size=32,
                                       memory_budget=room * 3 // 2).plan) for _ in range(2)]
    first, second = [thread.result() for thread in threads]
    assert first == second
    assert most == [1]


def sweep() -> None:
    config = LocalPassConfig(groups=10, goodness="mean", loss=ce())
    local_pass(torch.rand(64, 40, 8, 8), torch.arange(64) % 10, config=config, want_da=True)


def test_a_meter_hears_its_own_thread_only() -> None:
    with MemoryMeter() as mine:
        Working(sweep).result()
    assert mine.report.peak_bytes == 0
    with mine:
        sweep()
    assert mine.report.peak_bytes > 0


def test_what_a_tensor_is_for_is_said_in_its_own_thread() -> None:
    with held_open(allocating("state")), MemoryMeter() as mine:
        kept = torch.ones(10)
    assert mine.report.at_peak["feature"] == kept.numel() * 4
    assert mine.report.at_peak["state"] == 0


def metered(net: LocalNet, warm: bool = True) -> int:
    net = copy.deepcopy(net)
    made = trainer(net, batch_size=8)
    for _ in range(1 + warm):
        made.meter_next()
        made.peak_bytes = 0
        made.step(*batch(net))
    return made.peak_bytes


@pytest.mark.parametrize("name", ["fflib/ffnn", "deeperforward/tinycnn", "trifecta/shallow"])
def test_two_metered_trainers_read_what_each_reads_alone(
        name: str, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both measure library calls, for which torch has one profiler."""
    for remembered in ("_inside", "_expected"):
        monkeypatch.setattr(meter, remembered, {})
    nets = [network(name), network("deeperforward/resnet17")]
    threads = [Working(lambda net=net: metered(net, warm=False)) for net in nets]
    together = [thread.result() for thread in threads]
    for remembered in ("_inside", "_expected"):
        monkeypatch.setattr(meter, remembered, {})
    assert together == [metered(net, warm=False) for net in nets]


def test_the_allocators_events_are_a_threads_own() -> None:
    def take(n: int) -> int:
        with allocator_events() as events:
            torch.ones(n)
        return events.peak

    with held_open(allocator_events()):
        thread = Working(lambda: take(1000))
        torch.ones(5000)
    assert thread.result() == 4000


def told(net: LocalNet) -> list[Any]:
    """What a profile says beside its times."""
    made = record.profile(trainer(copy.deepcopy(net), batch_size=8), batch=8, steps=2)
    return [[(p.label, p.plan, [(s.name, s.layer, s.tile, s.parent, s.bytes, s.peak_bytes)
                                for s in p.spans], [s.live for s in p.samples])
             for p in made.phases]]


@pytest.mark.parametrize("name", ["deeperforward/tinycnn", "fflib/ffnn"])
def test_a_profile_beside_training_tells_of_its_own_steps(
        name: str, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_rates(monkeypatch)
    net, other = network(name), network(name, seed=5)
    alone, over = told(net), threading.Event()

    def training() -> int:
        fresh, steps = trained(other), 0
        while not over.is_set():
            assert equal(trained(other), fresh)
            steps += 1
        return steps

    thread = Working(training)
    try:
        assert told(net) == alone
    finally:
        over.set()
    assert thread.result() > 0


def test_two_profiles_tell_each_of_its_own_steps(
        often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_rates(monkeypatch)
    nets = [network("deeperforward/tinycnn"), network("cff/adaptive")]
    threads = [Working(lambda net=net: told(net)) for net in nets]
    together = [thread.result() for thread in threads]
    assert together == [told(net) for net in nets]
