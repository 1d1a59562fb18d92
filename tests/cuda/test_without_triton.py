"""A CUDA machine without Triton, on tensors without values: every network's step on the `cuda`
back-end, its kernels emulated, while `triton` cannot be imported."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import emulate
import pytest
import torch
from models.every import NAMES, batch, network, trainer

from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.plan import one_tile
from ffengine.ops.config import LocalPassConfig, Norm
from ffengine.ops.linear_step import linear_step
from ffengine.ops.optim import OptimConfig, OptimState, Parameter
from tests.tolerances import assert_close

LOCAL = [name for name in NAMES if not name.startswith("bp/")]
#: The kernels that a network's step is made of, beside the optimizer's; others sweep by local_pass.
SWEEPS = {"cwcomp": "batch_pass", "sn/cifar10": "batch_pass", "sn/cifar100": "batch_pass",
          "cafo": "batch_pass", "hinton/peer-norm": "batch_pass"}
SAMPLES = 4


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> emulate.Extension:
    blocked = {"triton", "triton.language", "ffengine.kernels"}
    blocked |= {name for name in sys.modules if name.startswith(("triton.", "ffengine.kernels."))}
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)
    assert importlib.util.find_spec("triton") is None
    return emulate.install(monkeypatch)


def losses(name: str, backend: str, precision: str, steps: int = 1,
           **settings: Any) -> list[torch.Tensor]:
    """Of the first step's layers; and the network answers after the last."""
    net = network(name)
    net = net.double() if precision == "fp64" else net
    t = trainer(net, backend=backend, precision=precision,
                plan=one_tile(range(len(net.layers)), rows_of(net, SAMPLES)), **settings)
    x, y = batch(net, SAMPLES)
    first = [loss for loss in t.step(x, y).losses if loss is not None]
    for _ in range(1, steps):
        t.step(x, y)
    scores = net(x)
    assert scores.shape == (SAMPLES, net.num_classes) and not scores.isnan().any()
    return first


@pytest.mark.parametrize("name", LOCAL)
def test_step(name: str, extension: emulate.Extension) -> None:
    got = losses(name, "cuda", "fp32", steps=2)
    sweep = next((s for part, s in SWEEPS.items() if name.startswith(part)), "local_pass")
    assert {sweep, "optimizer_step"} <= set(extension.calls)
    exact, same = (losses(name, "reference", p) for p in ("fp64", "fp32"))
    products = sum(weight.numel() for weight in network(name).parameters())
    for kernel, wide, rough in zip(got, exact, same, strict=True):
        assert_close(kernel, wide, rough, reduction=products, what=name)


@pytest.mark.parametrize(("precision", "states"), [
    ("fp32", "8bit"), ("bf16", "bf16"), ("bf16", "8bit"), ("fp16", "fp32")])
def test_step_in_fewer_bits(precision: str, states: str, extension: emulate.Extension) -> None:
    losses("deeperforward/tinycnn", "cuda", precision, steps=2, states=states)
    assert ("compressed_step" in extension.calls) == (states != "fp32")


def test_linear_step(extension: emulate.Extension) -> None:
    weight, bias = torch.randn(20, 12), torch.zeros(20)
    optim = OptimConfig("sgd", lr=0.1)
    given = [Parameter(p, OptimState.create(p, optim)) for p in (weight, bias)]
    linear_step(given[0], torch.rand(9, 12), torch.arange(9) % 10, config=LocalPassConfig(),
                optim=optim, bias=given[1], input_norm=Norm("length"), backend="cuda")
    assert set(extension.calls) == {"linear_prepare", "local_pass", "linear_finish",
                                    "optimizer_step"}


def test_a_plan_is_a_dry_run(extension: emulate.Extension) -> None:
    net = network("deeperforward/tinycnn")
    t = trainer(net, backend="cuda", memory_budget="20MB", batch_size=8, costs="modelled")
    assert t.plan is not None and t.plan.peak_bytes < 20_000_000
    t.step(*batch(net, 8))
    assert "local_pass" in extension.calls
