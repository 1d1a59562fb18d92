"""Plans that spend bytes on fewer launches: 16-bit weights kept between steps, features written
into the map of their concatenation; and the table of numbers that a step's kernels read."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from models.every import batch, network, state, trainer

import ffengine as ff
from ffengine.engine.clock import StepClock
from ffengine.engine.memory.plans import planner_for
from ffengine.engine.optim import LocalOptimizer
from ffengine.ops.optim import Half, OptimConfig, row_of

#: With concatenations and additions; with layers that rest; dense, a streamed last layer; frames.
NAMES = ["deeperforward/resnet17", "hinton/threshold", "cwcomp/ffcnn", "fflib/ffrnn",
         "trifecta/shallow", "fflib/ffnn"]


def planned(name: str, roomy: bool, samples: int = 8, **settings: Any) -> ff.Trainer:
    """A trainer by the plan of one tile."""
    net = network(name)
    job = replace(trainer(copy.deepcopy(net), **settings).planning.job, roomy=roomy)
    plan = planner_for(job, samples).one_tile()
    assert plan.roomy is roomy
    t = trainer(net, plan=plan, **settings)
    t.planning.job = replace(t.planning.job, roomy=roomy)
    t.planning._made[samples] = t.planning.base  # type: ignore[assignment]
    return t


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_trains_the_same_weights(name: str, precision: str, backend: str) -> None:
    plain, roomy = (planned(name, r, precision=precision, backend=backend) for r in (False, True))
    for i in range(3):
        for t in (plain, roomy):
            t.step(*batch(t.net, seed=i), iteration=i)
            with torch.no_grad():
                if i == 1:  # somebody edits a weight, and replaces another
                    t.net.layer(0).weight.mul_(0.5)
                    t.net.layer(1).weight.data = t.net.layer(1).weight.data * 0.5
    assert (len(roomy.optimizer.halves) > 0) == (precision == "bf16" and "trifecta" not in name)
    assert not plain.optimizer.halves
    for key, value in state(plain.net).items():
        assert torch.equal(value, state(roomy.net)[key]), key


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_is_planned_as_metered(name: str, precision: str) -> None:
    t = planned(name, True, 16, precision=precision)
    t.step(*batch(t.net, 16))
    t.meter_next()
    t.step(*batch(t.net, 16))
    assert t.plan is not None
    assert abs(t.plan.peak_bytes / t.peak_bytes - 1) < 0.02


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last))


def edits() -> dict[str, Any]:
    def stepped(w: torch.nn.Parameter) -> None:
        w.grad = torch.ones_like(w)
        torch.optim.AdamW([w], lr=0.1).step()

    def loaded(w: torch.nn.Parameter) -> None:
        holder = torch.nn.ParameterDict({"w": w})
        holder.load_state_dict({"w": torch.randn(6, 5, 3, 3)})

    def replaced(w: torch.nn.Parameter) -> None:
        for _ in range(3):  # memory comes back: an address says nothing
            w.data = torch.randn(6, 5, 3, 3)

    def turned(w: torch.nn.Parameter) -> None:
        w.data = w.data.contiguous()

    return {"another optimizer": stepped, "loading": loaded, "data": replaced, "layout": turned,
            "in place": lambda w: torch.nn.init.zeros_(w)}


@pytest.mark.parametrize("edit", list(edits()))
def test_a_copy_is_never_stale(edit: str) -> None:
    w = weight()
    half = Half.create(w, torch.bfloat16)
    first = half.current(w).clone()
    half.copy.zero_()  # not looked at again while nothing changes
    assert not half.current(w).any() and torch.equal(first, w.detach().bfloat16())
    edits()[edit](w)
    assert torch.equal(half.current(w), w.detach().bfloat16())
    half.written(w)
    edits()[edit](w)
    assert torch.equal(half.current(w), w.detach().bfloat16())


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_the_table_holds_every_updates_numbers(kind: Any) -> None:
    """Made on a CPU: address and layout stay, numbers follow rate and step."""
    optim = OptimConfig(kind, lr=0.25, weight_decay=0.5)
    named = {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(2))}
    optimizer = LocalOptimizer(named.items(), optim, second={"a": ("next",)})
    clock = StepClock(optimizer, torch.device("cpu"), updates=2)
    clock.begin(0)
    address, a = clock.table.data_ptr(), optimizer.states["a"]
    a.step, optimizer.param_groups[0]["lr"] = 4, 0.125
    clock.begin(7)
    assert clock.table.data_ptr() == address and clock.dropout.tolist() == [7]
    for state_, steps in ((a, (5, 6)), (optimizer.states["a@next"], (1, 2))):
        for step in steps:
            row = state_.row
            assert row is not None
            expected = torch.tensor(row_of(replace(optim, lr=0.125), step))
            assert torch.equal(row[:3], expected) and not row[3:7].any()
            assert row.view(torch.int32)[7] == step
            state_.step += 1


def test_row_of_is_what_torch_computes() -> None:
    decay, size, root = row_of(OptimConfig("adamw", lr=0.1, weight_decay=0.2), 3)
    assert (decay, size, root) == pytest.approx(
        (0.02, 0.1 / (1 - 0.9**3), (1 - 0.999**3) ** 0.5), rel=1e-15)
    assert row_of(OptimConfig("adam", lr=0.1, weight_decay=0.2), 1)[0] == 0.2
    assert row_of(OptimConfig("sgd", lr=0.1, weight_decay=0.2, momentum=0.9), 5) == (0.2, 0.1, 1.0)
