"""DeeperForward's ablations against plain autograd transcriptions of the paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ffengine import models
from ffengine.engine.context import StepContext
from ffengine.engine.execute import train_batch
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.shapes import measure
from ffengine.engine.optim import LocalOptimizer
from ffengine.nn import LocalNet
from ffengine.ops.weight_update import OptimConfig

STEPS = 3


def network(**options: object) -> LocalNet:
    torch.manual_seed(0)
    return models.create("deeperforward/tinycnn", num_classes=5, widths=(5, 10, 20, 20),
                         image_size=8, **options).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 5, (6,), generator=generator))


def train(net: LocalNet, optim: OptimConfig, steps: int = STEPS,
          seed: int = 0) -> list[list[float]]:
    optimizer, losses = LocalOptimizer(net.named_parameters(), optim), []
    plans = Planner(measure(net, 6, torch.float64, states=2, backend="reference"))
    for t in range(steps):
        x, y = batch(t)
        ctx = StepContext(net, optimizer, y, 6, seed=seed, step=t, backend="reference")
        report = train_batch(ctx, x, plans.fixed([1], [6, 4]), torch.float64)
        losses.append([float(v) for v in report.losses])
    return losses


class StraightThrough(torch.autograd.Function):
    """relu whose gradient is 1 everywhere (eq. 6)."""

    @staticmethod
    def forward(ctx, a):
        return a.relu()

    @staticmethod
    def backward(ctx, grad):
        return grad


def transcription(weights: list[torch.Tensor], goodness: str,
                  relu_gradient: str) -> list[list[float]]:
    """The paper's layers in plain PyTorch: goodness of eq. 2 or eq. 5, layer-local AdamW."""
    relu = StraightThrough.apply if relu_gradient == "straight_through" else F.relu
    weights = [w.detach().clone().requires_grad_() for w in weights]
    optimizers = [torch.optim.AdamW([w], lr=0.01, weight_decay=0.01) for w in weights]
    losses = []
    for t in range(STEPS):
        x, y = batch(t)
        x = F.layer_norm(x, x.shape[1:])
        losses.append([])
        for i, (w, optimizer) in enumerate(zip(weights, optimizers, strict=True)):
            x = F.avg_pool2d(x, 2) if i in (1, 2) else x
            h = relu(F.conv2d(x.detach(), w, padding=w.shape[2] // 2))
            groups = h.reshape(6, 5, -1)
            g = {"mean": groups.mean(2), "mean_sq": (groups**2).mean(2),
                 "sum_sq": (groups**2).sum(2)}[goodness]
            loss = F.cross_entropy(g, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss))
            if goodness == "mean":
                x = F.group_norm(h, 5)
            else:
                x = (groups / ((groups**2).mean(2, keepdim=True).sqrt() + 1e-5)).reshape(h.shape)
            x = x.detach()
    return [*losses, weights]


@pytest.mark.parametrize("goodness", ["mean", "mean_sq", "sum_sq"])
@pytest.mark.parametrize("relu_gradient", ["masked", "straight_through"])
def test_training_equals_the_transcription(goodness: str, relu_gradient: str) -> None:
    net = network(goodness=goodness, relu_gradient=relu_gradient, dropout=0.0)
    *expected, weights = transcription([layer.weight for layer in net.layers], goodness,
                                       relu_gradient)
    losses = train(net, OptimConfig("adamw", lr=0.01, weight_decay=0.01))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    for layer, weight in zip(net.layers, weights, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-9, check_stride=False)


def test_dropout_acts_only_in_training() -> None:
    one, two = network(dropout=0.5), network(dropout=0.0)
    x, _ = batch(0)
    assert torch.equal(one(x), two(x))
    assert torch.equal(one.train()(x), one.eval()(x))
    optim = OptimConfig("sgd", lr=0.0)
    dropped = train(one, optim, steps=1, seed=3)
    assert dropped != train(two, optim, steps=1, seed=3)
    assert dropped == train(one, optim, steps=1, seed=3)
    assert dropped != train(one, optim, steps=1, seed=4)
