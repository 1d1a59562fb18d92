"""Overlapping local updates against a slow transcription by autograd, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.training import assert_same

import ffengine as ff
from ffengine.engine.schedules.schedule import Overlapping
from ffengine.models.trifecta import network
from ffengine.nn import LocalNet
from ffengine.nn.norms import KINDS

CLASSES, ROWS, LR = 5, 6, 1e-3
IMAGE = (2, 8, 8)


def net_of(update: str, **options: Any) -> LocalNet:
    torch.manual_seed(0)
    rows = ((6, True), (8, False), (8, False))
    if options.get("dense"):
        rows = ((12, False), (10, False), (10, False))
    net = network(rows, CLASSES, IMAGE, update=update, **{"dense": False, **options}).double()
    for name, p in net.named_parameters():  # affine maps that are no identity
        if "pre_norm" in name:
            p.data.add_(0.3 * torch.randn_like(p))
    return net


def batch(step: int) -> ff.Batch:
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    shift = torch.randint(1, CLASSES, (ROWS,), generator=generator)
    x = torch.randn(ROWS, *IMAGE, generator=generator, dtype=torch.float64)
    return ff.Batch(x, y, negatives=(y + shift) % CLASSES)


class Slow:
    """Plain modules of blocks and an Adam a block; where losses cross, it owns the block before
    it, too."""

    def __init__(self, net: LocalNet, lr: float) -> None:
        self.net, self.crosses = net, isinstance(net.schedule, Overlapping)
        self.p = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
        self.running = {n: b.detach().clone() for n, b in net.named_buffers()}
        depth = len(net.layers)
        self.adams = []
        for i in range(depth):
            before = f"layers.{i - self.crosses}."
            own = {n: p for n, p in self.p.items() if n.startswith((f"layers.{i}.", before))}
            if i == 0:
                own["encoding.weight"] = self.p["encoding.weight"]
            self.adams.append((own, torch.optim.Adam(own.values(), lr=lr)))

    def norm(self, i: int, x: torch.Tensor) -> torch.Tensor:
        norm = self.net.layer(i).pre_norm
        if norm is None:
            return x
        w, b = (self.p[f"layers.{i}.pre_norm.{n}"] for n in ("weight", "bias"))
        if norm.kind == "batch":
            return F.batch_norm(x, None, None, w, b, training=True)
        if norm.kind == "batch-running":
            mean, var = (self.running[f"layers.{i}.pre_norm.running_{n}"] for n in ("mean", "var"))
            return F.batch_norm(x, mean, var, w, b, training=False)
        if norm.kind == "layer":
            return F.layer_norm(x, x.shape[1:], w, b)
        square = (x * x).flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
        return x / (square + 1e-5).sqrt() * w + b

    def follow(self, i: int, x: torch.Tensor) -> None:
        """The running statistics, which normalise the batch that moved them."""
        norm = self.net.layer(i).pre_norm
        if norm is not None and norm.kind == "batch-running":
            mean, var = (self.running[f"layers.{i}.pre_norm.running_{n}"] for n in ("mean", "var"))
            F.batch_norm(x.detach(), mean, var, training=True)

    def block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        layer = self.net.layer(i)
        w = self.p[f"layers.{i}.weight"]
        x = x.flatten(1) if w.dim() == 2 else x
        x = self.norm(i, x)
        h = F.relu(F.linear(x, w) if w.dim() == 2 else F.conv2d(x, w, padding=1))
        return F.max_pool2d(h, 2) if layer.config.pool == "max2" else h

    def encoded(self, item: ff.Batch) -> torch.Tensor:
        labels = torch.cat([item.y, item.negatives])
        shown = self.p["encoding.weight"][labels].view(-1, 1, *IMAGE[1:])
        return torch.cat([torch.cat([item.x, item.x]), shown], 1)

    def loss(self, i: int, z: torch.Tensor) -> torch.Tensor:
        g = (z * z).flatten(1).mean(1)
        return F.softplus(-self.net.layer(i).config.loss.p[0] * (g[:ROWS] - g[ROWS:])).mean()

    def step(self, item: ff.Batch, turn: range) -> dict[int, torch.Tensor]:
        """Losses of the layers of the turn; every gradient is at the weights before the step."""
        first = self.encoded(item)
        inputs, shortcut = [first], None
        for i in range(len(self.net.layers)):
            x = inputs[-1].detach().flatten(1) if self.p[f"layers.{i}.weight"].dim() == 2 else (
                inputs[-1].detach())
            self.follow(i, x)
            z = self.block(i, inputs[-1].detach())
            if self.net.wires[i].join == "add":
                z = z + shortcut
            if self.net.wires[i].branch:
                shortcut = z.detach()
            inputs.append(z.detach())
        losses, gradients = {}, {}
        for i in turn:
            x = inputs[i].detach() if i else first
            if i and self.crosses:
                below = self.block(i - 1, inputs[i - 1].detach())
                x = below + (inputs[i] - below).detach()  # with the shortcut, if one joined
            losses[i] = self.loss(i, self.block(i, x))
            own = self.adams[i][0]
            gradients[i] = torch.autograd.grad(losses[i], list(own.values()), allow_unused=True)
        for i, found in gradients.items():
            own, adam = self.adams[i]
            for p, g in zip(own.values(), found, strict=True):
                p.grad = g
            adam.step()
        return losses


@pytest.mark.parametrize(("update", "options"), [
    ("olu", {"norm": "batch"}), ("olu", {"norm": "batch-running"}), ("olu", {"norm": "layer"}),
    ("olu", {"norm": "layer-no-mean"}), ("olu", {"norm": "none"}),
    ("olu-epoch", {"norm": "batch"}), ("olu-both", {"norm": "batch"}),
    ("olu-both", {"norm": "layer"}), ("olu-both", {"norm": "none"}),
    ("olu", {"norm": "batch", "dense": True}),
    ("olu-both", {"norm": "layer", "dense": True, "alpha": 0.1}),
    ("olu", {"norm": "batch", "residual": True}), ("olu-both", {"norm": "layer", "residual": True}),
    *(("layer", {"norm": norm, "embedding": "learned"}) for norm in ("none", *KINDS)),
    ("layer", {"norm": "batch", "embedding": "learned", "dense": True}),
], ids=str)
def test_against_autograd(update: str, options: dict[str, Any]) -> None:
    net = net_of(update, **options)
    slow = Slow(net, LR)
    t = ff.Trainer(net, epochs=4, lr=LR, precision="fp64", progress=False,
                   scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    for step in range(4):
        epoch, iteration = (step, 0) if update == "olu-epoch" else (0, step)
        turn = range(3) if update in ("olu-both", "layer") else range(1 - step % 2, 3, 2)
        report = t.step(batch(step), epoch=epoch, iteration=iteration)
        losses = slow.step(batch(step), turn)
        assert [i for i, loss in enumerate(report.losses) if loss is not None] == list(turn)
        for i, loss in losses.items():
            assert_same(report.losses[i], loss)
        for name, p in net.named_parameters():
            assert_same(p, slow.p[name], (step, name))
    for name, b in net.named_buffers():
        if options["norm"] == "batch-running" and "running" in name:
            assert_same(b, slow.running[name], name)
    assert states_agree(t, slow)


def states_agree(t: ff.Trainer, slow: Slow) -> bool:
    """Both Adam states of every weight, by their owners."""
    seen = set()
    for i, (own, adam) in enumerate(slow.adams):
        for name, p in own.items():
            key = name if name.startswith((f"layers.{i}.", "encoding")) else f"{name}@next"
            mine, theirs = t.optimizer.states[key], adam.state[p]
            seen.add(key)
            assert mine.step == int(theirs["step"])
            assert_same(mine.m, theirs["exp_avg"], key)
            assert_same(mine.v, theirs["exp_avg_sq"], key)
    return seen == set(t.optimizer.states)


def test_turns() -> None:
    net = net_of("olu")
    for alternate, expected in (("batch", [(1,), (0, 2), (1,), (0, 2)]),
                                ("epoch", [(1,), (1,), (0, 2), (0, 2)]),
                                ("both", [(0, 1, 2)] * 4)):
        schedule = Overlapping(alternate)
        schedule.begin(net, 2)
        assert [schedule.turn(e, i).layers for e in (0, 1) for i in (0, 1)] == expected


def test_the_embedding_rests_with_the_first_layer() -> None:
    net = net_of("olu")
    t = ff.Trainer(net, epochs=2, precision="fp64", progress=False)
    before = net.encoding.weight.detach().clone()
    t.step(batch(0), iteration=0)
    assert torch.equal(before, net.encoding.weight)
    t.step(batch(0), iteration=1)
    assert not torch.equal(before, net.encoding.weight)


@pytest.mark.parametrize(("change", "said"), [
    (lambda net: setattr(net, "layers", net.layers[:1]), "2 layers or more, got 1"),
    (lambda net: setattr(net.layer(1), "dropout", 0.5), "layers normalised .*; layer 1 is not"),
    (lambda net: setattr(net, "propagate", "updated"), "propagate=stale, got updated"),
    (lambda net: setattr(net, "input_norm", "layer"), "input_norm=none .*, got input_norm=layer"),
])
def test_networks_it_cannot_train(change: Any, said: str) -> None:
    net = net_of("olu", norm="none")
    change(net)
    with pytest.raises(ValueError, match=rf"^\[schedule\] .*expected {said}"):
        ff.Trainer(net, progress=False)
