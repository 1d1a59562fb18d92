"""Schedules against slow transcriptions by autograd and torch.optim, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.training import assert_same, grouped

import ffengine as ff
from ffengine.models.sn import sparse_cross_entropy
from ffengine.nn import LocalNet
from ffengine.reference.local_pass import sparsemax_loss

ROWS, CLASSES, THETA, LR = 6, 5, 0.5, 0.01
SMALL = {"num_classes": CLASSES, "in_channels": 1, "image_size": 4, "layers": (12, 10)}


def network(name: str, **options: Any) -> LocalNet:
    torch.manual_seed(0)
    return ff.models.create(name, **{**SMALL, **options})


def trainer(net: LocalNet, **options: Any) -> ff.Trainer:
    return grouped(net, **{
        "epochs": 4, "lr": LR, "optimizer": "adam", "weight_decay": 0.0, "precision": "fp64",
        "progress": False, "scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
        **options})


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels, wrong labels."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    x = torch.randn(ROWS, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, y, (y + torch.randint(1, CLASSES, (ROWS,), generator=generator)) % CLASSES


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / (v.norm(dim=1, keepdim=True) + 1e-4)


def copies(net: LocalNet) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}


def adams(p: dict[str, torch.Tensor], depth: int) -> list[torch.optim.Adam]:
    return [torch.optim.Adam([p[f"layers.{i}.weight"], p[f"layers.{i}.bias"]], lr=LR)
            for i in range(depth)]


def threshold_loss(g: torch.Tensor, sign: float) -> torch.Tensor:
    return torch.cat([F.softplus(-sign * (g[:ROWS] - THETA)),
                      F.softplus(sign * (g[ROWS:] - THETA))]).mean()


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("propagate", ["updated", "stale"])
def test_features_before_or_after_the_update(propagate: str, maximize: bool) -> None:
    net = network("fflib/ffnn", theta=THETA, propagate=propagate, maximize=maximize)
    t = trainer(net)
    p = copies(net)
    steps = adams(p, 2)
    for step in range(3):
        x, y, wrong = samples(step)
        report = t.step(ff.Batch(x, y, negatives=wrong))
        rows = F.one_hot(torch.cat([y, wrong]), CLASSES).double()
        seen = torch.cat([torch.cat([x, x]).flatten(1), rows], 1)
        for i in range(2):
            w, b = p[f"layers.{i}.weight"], p[f"layers.{i}.bias"]
            h = F.relu(unit(seen) @ w.t() + b)
            loss = threshold_loss((h * h).mean(1), 1.0 if maximize else -1.0)
            assert_same(report.losses[i], loss)
            steps[i].zero_grad()
            loss.backward()
            steps[i].step()
            with torch.no_grad():
                seen = F.relu(unit(seen) @ w.t() + b) if propagate == "updated" else h.detach()
    for name, mine in net.named_parameters():
        assert_same(mine, p[name], name)


def test_recurrent_frames() -> None:
    net = network("fflib/ffrnn", theta=THETA, frames=3, maximize=True)
    t = trainer(net)
    p = copies(net)
    steps = adams(p, 2)
    beta, generator = 0.7, torch.Generator().manual_seed(9)
    for step in range(2):
        x, y, wrong = samples(step)
        hidden = [[torch.rand(1, w, generator=generator, dtype=torch.float64) for w in (12, 10)]
                  for _ in range(2)]
        report = t.step(ff.Batch(x, y, negatives=wrong, hidden=hidden))
        rows = F.one_hot(torch.cat([y, wrong]), CLASSES).double()
        h = [torch.cat([x, x]).flatten(1),
             *(torch.cat([a.expand(ROWS, -1), b.expand(ROWS, -1)])
               for a, b in zip(*hidden, strict=True)), rows]

        def state(i: int, h: list[torch.Tensor] = h) -> torch.Tensor:
            around = torch.cat([unit(h[i]), unit(h[i + 2])], 1)
            a = around @ p[f"layers.{i}.weight"].t() + p[f"layers.{i}.bias"]
            return beta * F.relu(a) + (1 - beta) * h[i + 1]

        with torch.no_grad():  # one sweep, bottom up
            for i in range(2):
                h[i + 1] = state(i)
        total = [0.0, 0.0]
        for _ in range(3):
            new = []
            for i in range(2):
                now = state(i)
                loss = threshold_loss((now * now).mean(1), 1.0)
                total[i] += loss.detach() / 3
                steps[i].zero_grad()
                loss.backward()
                steps[i].step()
                new.append(state(i).detach())
            h[1:3] = new
        for i in range(2):
            assert_same(report.losses[i], total[i])
    for name, mine in net.named_parameters():
        assert_same(mine, p[name], name)


@pytest.mark.parametrize(("name", "options"), [
    ("bp/fflib/ffnn", {}), ("bp/fflib/bpnn", {}),
    ("bp/fflib/ffrnn", {"frames": 2, "test_frames": (0, 3)}),
    ("bp/hinton/peer-norm", {}), ("bp/symba/mlp", {}), ("bp/cff/adaptive", {}),
    ("bp/sn/mlp", {"layers": (10, 10)}),
    ("bp/sn/cifar10", {"widths": (5, 5, 10, 10), "layers": None}),
    ("bp/cwcomp/ffcnn", {"channels": (5, 5, 10, 10), "layers": None}),
    ("bp/deeperforward/tinycnn", {"widths": (10, 10, 20, 20), "layers": None, "dropout": 0.0}),
    ("bp/trifecta/fcn", {"width": 12, "depth": 3, "layers": None}),
    ("bp/trifecta/shallow", {"widths": (4, 4, 8, 8, 8, 8), "layers": None, "image_size": 8})])
def test_backpropagation_is_torch_s(name: str, options: dict[str, Any]) -> None:
    """The twin's weights after three steps are those of torch.optim.Adam on the same loss."""
    options = {k: v for k, v in {**SMALL, **options}.items() if v is not None}
    torch.manual_seed(0)
    ours = ff.models.create(name, **options)
    torch.manual_seed(0)
    theirs = ff.models.create(name, **options).double()
    t = trainer(ours)
    adam = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=LR)
    for step in range(3):
        x, y, _ = samples(step)
        x = F.interpolate(x, size=ours.in_shape[1:])
        report = t.step(x, y)
        loss = F.cross_entropy(theirs.differentiable_logits(x), y)
        assert_same(report.losses[-1], loss)
        assert torch.equal(report.scores.argmax(1), theirs.differentiable_logits(x).argmax(1)) or (
            any(m.batch_coupling is not None or m.pre_norm is not None for m in ours.layers))
        adam.zero_grad()
        loss.backward()
        adam.step()
    for (n, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_same(mine, other, n)
    if not any(m.batch_coupling is not None or m.pre_norm is not None for m in ours.layers):
        assert_same(ours(x), ours.differentiable_logits(x))


@pytest.mark.parametrize("learned", [False, True])
def test_collaborative_goodness(learned: bool) -> None:
    """G_l = g_l + gamma_l w sum of the others' goodness; a learned gamma by Adam of its own."""
    net = network("cff/adaptive" if learned else "cff/fixed", layers=(12, 10, 8), theta=THETA,
                  gamma=0.3)
    t = trainer(net, epochs=1)
    p = copies(net)
    steps = adams(p, 3)
    gammas = [g.clone().requires_grad_() for g in net.gamma.detach()]
    own = [torch.optim.Adam([g], lr=0.01) for g in gammas]
    for stage in range(3):
        for step in range(3):
            x, y, wrong = samples(step)
            report = t.step(ff.Batch(x, y, negatives=wrong), epoch=stage, iteration=step)
            flat, top = torch.cat([x, x]).flatten(1), x.max()
            flat[:, :CLASSES] = F.one_hot(torch.cat([y, wrong]), CLASSES).double() * top
            seen, goodness = unit(flat), []
            for i in range(3):
                h = F.relu(seen @ p[f"layers.{i}.weight"].t() + p[f"layers.{i}.bias"])
                goodness.append((h * h).mean(1))
                seen = unit(h).detach()
            others = sum(g for i, g in enumerate(goodness) if i != stage).detach() / 2
            loss = threshold_loss(goodness[stage] + gammas[stage] * others, 1.0)
            assert_same(report.losses[stage], loss)
            for optimizer in (steps[stage], own[stage]):
                optimizer.zero_grad()
            loss.backward()
            steps[stage].step()
            if learned:
                own[stage].step()
        for name, mine in net.named_parameters():
            assert_same(mine, torch.stack(gammas) if name == "gamma" else p[name], name)
    assert learned == bool(net.gamma.std() > 0)


def test_bpnn_is_linear_relu_linear_relu_linear() -> None:
    """The published baseline: pixels alone, no norms; the same logits from the same weights."""
    net = network("bp/fflib/bpnn").double()
    plain = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 10),
        torch.nn.ReLU(), torch.nn.Linear(10, CLASSES)).double()
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            theirs.copy_(mine)
    x, _, _ = samples(0)
    assert_same(net.differentiable_logits(x), plain(x))
    assert_same(net(x), plain(x))


@pytest.mark.parametrize("model", ["hinton/threshold", "cff/fixed"])
def test_network_ff_as_its_text_has_it(model: str) -> None:
    """Layer norm after every activation, the image as it is, 1 in the label's pixel."""
    options = {} if model.startswith("hinton") else {"gamma": 0.0}
    net = network(model, norm="layer", label_pixel=1.0, negatives="random", theta=THETA, **options)
    t, p = trainer(net, epochs=1), copies(net)
    steps = adams(p, 2)
    for stage in range(2):
        x, y, wrong = samples(stage)
        rows = torch.cat([x, x]).flatten(1)
        rows[:, :CLASSES] = F.one_hot(torch.cat([y, wrong]), CLASSES).double()
        for i in range(stage + 1):
            h = F.relu(rows @ p[f"layers.{i}.weight"].t() + p[f"layers.{i}.bias"])
            rows = F.layer_norm(h, h.shape[1:]).detach()
        loss = threshold_loss((h * h).mean(1), 1.0)
        report = t.step(ff.Batch(x, y, negatives=wrong), epoch=stage)
        assert_same(report.losses[stage], loss)
        steps[stage].zero_grad()
        loss.backward()
        steps[stage].step()
    for name, mine in net.named_parameters():
        assert_same(mine, p[name], name)


def test_sparse_ce_in_its_two_readings() -> None:
    """The sparsemax loss, and the cross-entropy of sparsemax's probabilities, by hand."""
    g = torch.tensor([[1.0, 0.5, -2.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([1, 2])
    # support {0, 1} of the first row: tau = (1.5 - 1) / 2; of the second {0}: tau = 2
    chances = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    leaf = g.clone().requires_grad_()
    second = sparse_cross_entropy(leaf, y)
    assert_same(second, -(chances.gather(1, y[:, None])[:, 0] + 1e-9).log())
    second.sum().backward()
    assert_same(leaf.grad, torch.tensor([[2.0, -2.0, 0.0], [0.0, 0.0, 0.0]],
                                        dtype=torch.float64) * 0.25 / (0.25 + 1e-9))
    first = sparsemax_loss(g, y)
    assert_same(first, torch.tensor([0.5 * (1 + 0.25 - 2 * 0.25**2) + 0.5 - 0.5,
                                     0.5 * (9 - 4) + 0.5 - 0.0], dtype=torch.float64))
    for loss in ("sparse-ce", "sparse-ce-log"):
        report = trainer(network("sn/mlp", layers=(10, 10), loss=loss)).step(*samples(0)[:2])
        assert report.losses[0] is not None and report.losses[0] > 0
