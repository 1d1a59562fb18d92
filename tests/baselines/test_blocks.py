"""Block-wise training, FFconv, and DeeperForward, CaFo and CFSE on the support-neuron paper's
layers, against transcriptions in torch's own modules, fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.training import assert_same
from torch import nn

import ffengine as ff
from ffengine.nn import LocalNet

ROWS, CLASSES, LR = 6, 4, 0.01
CHANNELS, POOLS = (4, 8, 12), (2,)


def network(name: str, **options: Any) -> LocalNet:
    torch.manual_seed(0)
    return ff.models.create(name, **{"num_classes": CLASSES, "in_channels": 2, "image_size": 6,
                                     **options})


def trainer(net: LocalNet, **settings: Any) -> ff.Trainer:
    return ff.Trainer(net, **{"recipe": ff.models.Recipe(optimizer="adam", lr=LR), "epochs": 1,
                              "precision": "fp64", "progress": False, **settings})


def samples(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(ROWS, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (ROWS,), generator=generator))


def copied(module: nn.Module, **values: torch.Tensor | None) -> nn.Module:
    """The module in fp64 with these parameters."""
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                getattr(module, name).copy_(value)
    return module.double()


def block(layer: Any, conv: bool, pool: bool, groups: int = 1) -> nn.Sequential:
    """Conv3x3, relu, BatchNorm, pool, or linear, relu, with a layer's weights."""
    weight, bias = layer.weight, layer.bias
    if not conv:
        return nn.Sequential(nn.Flatten(), copied(nn.Linear(*weight.shape[::-1]), weight=weight,
                                                  bias=bias), nn.ReLU())
    made = nn.Conv2d(weight.shape[1] * groups, len(weight), 3, padding=1, groups=groups)
    return nn.Sequential(copied(made, weight=weight, bias=bias), nn.ReLU(),
                         nn.BatchNorm2d(len(weight)).double(),
                         nn.MaxPool2d(2) if pool else nn.Identity())


def same_weights(net: LocalNet, theirs: list[nn.Module], ours: list[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        wanted = [p for m in other.modules() for p in m.parameters(recurse=False)]
        got = [p for p in (mine.weight, mine.bias, mine.norm_weight, mine.norm_bias)
               if p is not None]
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b, mine)
        norms = [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            assert_same(mine.running_mean, norm.running_mean)
            assert_same(mine.running_var, norm.running_var)


@pytest.mark.parametrize("isolated", [True, False])
def test_blocks_learn_from_their_own_classifiers(isolated: bool) -> None:
    """An optimizer a block; the published code's loss_b.backward() where gradients run through."""
    net = network("baselines/blockwise", channels=CHANNELS, pools=POOLS, layers=(7,),
                  isolated=isolated)
    blocks = [block(layer, i < 3, i == 1) for i, layer in enumerate(net.hidden)]
    tops = [copied(nn.Linear(*p.weight.shape[::-1]), weight=p.weight, bias=p.bias)
            for p in (*net.predictors, net.layers[0])]
    steps = [torch.optim.Adam([*b.parameters(), *top.parameters()], lr=LR)
             for b, top in zip(blocks, tops, strict=True)]
    t = trainer(net)
    for seed in range(3):
        x, y = samples(seed)
        report = t.step(x, y)
        for optimizer in steps:
            optimizer.zero_grad()
        for b, top in zip(blocks, tops, strict=True):
            x = b(x.detach() if isolated else x)
            seen = F.adaptive_avg_pool2d(x, 1).flatten(1) if x.dim() == 4 else x
            logits = top(seen)
            loss = F.cross_entropy(logits, y)
            loss.backward(retain_graph=True)
        assert_same(report.losses[0], loss)
        assert_same(report.scores, logits)
        for optimizer in steps:
            optimizer.step()
    same_weights(net, blocks, list(net.hidden))
    for mine, other in zip((*net.predictors, net.layers[0]), tops, strict=True):
        assert_same(mine.weight, other.weight)


def test_a_block_of_several_layers() -> None:
    """Inside a block the gradient runs; from a block it does not."""
    net = network("baselines/blockwise", channels=CHANNELS, layers=(7,), block=2).double()
    assert net.ends == (1,) and len(net.predictors) == 1
    x, y = samples(0)
    _, _, gradients = net.gradients(x, y, torch.float64)
    loss = F.cross_entropy(net.votes(net.blocks(x, True))[0], y)
    first = torch.autograd.grad(loss, [net.hidden[0].weight, net.predictors[0].weight])
    assert_same(gradients["hidden.0.weight"], first[0])
    assert_same(gradients["predictors.0.weight"], first[1])
    with pytest.raises(ValueError, match="block expected 1 or more, got 0"):
        network("baselines/blockwise", block=0)


def test_ffconv() -> None:
    """Enan's auxiliary layers, 1x1 convolutions averaged over pixels, and log-sum-exp loss."""
    net = network("baselines/ffconv", channels=CHANNELS, pools=POOLS, layers=())
    blocks = [block(layer, True, i == 1) for i, layer in enumerate(net.hidden)]
    tops = [copied(nn.Conv2d(w.shape[1], CLASSES, 1), weight=w[:, :, None, None], bias=b)
            for w, b in ((p.weight, p.bias) for p in (*net.predictors, net.layers[0]))]
    adam = torch.optim.Adam([p for m in (*blocks, *tops) for p in m.parameters()], lr=LR)
    t = trainer(net)

    def goodness(x: torch.Tensor) -> torch.Tensor:
        found = []
        for b, top in zip(blocks, tops, strict=True):
            x = b(x)
            found.append(top(x).mean((2, 3)))
        return torch.stack(found, 1)

    for seed in range(3):
        x, y = samples(seed)
        report = t.step(x, y)
        g = goodness(x)
        positive = g[torch.arange(ROWS), :, y].mean(1)
        loss = -(positive - torch.logsumexp(g, 2).mean(1)).mean()
        assert_same(report.losses[0], loss)
        adam.zero_grad()
        loss.backward()
        adam.step()
    same_weights(net, blocks, list(net.hidden))
    for b in blocks:
        b.eval()
    assert_same(net(samples(9)[0]), goodness(samples(9)[0]).sum(1))


def sets(h: torch.Tensor, groups: int) -> torch.Tensor:
    return h.reshape(ROWS, groups, -1)


def test_deeperforward_on_these_layers() -> None:
    """Mean goodness before GroupNorm, cross-entropy; early layers on super-classes."""
    net = network("baselines/deeperforward", channels=(4, 8), pools=POOLS, layers=(12,),
                  superclasses=(0, 1, 1, 0), on_supers=2)
    assert net.layer_range == (2, 2) and not net.selects_range
    weights = [layer.weight.detach().double().requires_grad_() for layer in net.layers]
    adams = [torch.optim.Adam([w], lr=LR) for w in weights]
    t = trainer(net)
    for seed in range(3):
        x, y = samples(seed)
        report = t.step(x, y)
        z = F.layer_norm(x, x.shape[1:])
        for i, w in enumerate(weights):
            h = F.relu(F.conv2d(z, w, padding=1) if i < 2 else z.flatten(1) @ w.t())
            h = F.max_pool2d(h, 2) if i == 1 else h
            groups = 2 if i < 2 else CLASSES
            loss = F.cross_entropy(sets(h, groups).mean(2),
                                   torch.tensor((0, 1, 1, 0))[y] if i < 2 else y)
            assert_same(report.losses[i], loss)
            adams[i].zero_grad()
            loss.backward()
            z = F.group_norm(h, groups).detach()
            adams[i].step()
    for mine, other in zip(net.layers, weights, strict=True):
        assert_same(mine.weight, other)


def test_cfse_on_these_blocks() -> None:
    """CwC on mean squares, every other block grouped; scores add up the layers that tell classes.
    """
    supers = (0, 1, 1, 0)
    net = network("baselines/cfse", channels=(4, 4, 8, 8), pools=(2, 4), superclasses=supers,
                  on_supers=2)
    groups = (1, 2, 1, 4)
    blocks = [block(layer, True, i % 2 == 1, groups[i]) for i, layer in enumerate(net.layers)]
    adams = [torch.optim.Adam(b.parameters(), lr=LR) for b in blocks]
    t = trainer(net)

    def goodness(h: torch.Tensor, i: int) -> torch.Tensor:
        return sets(h, 2 if i < 2 else CLASSES).square().mean(2)

    for seed in range(3):
        x, y = samples(seed)
        report = t.step(x, y)
        for i, b in enumerate(blocks):
            x = b(x.detach())
            raised = goodness(x, i).clamp(-50, 50).exp()
            right = raised[torch.arange(ROWS), torch.tensor(supers)[y] if i < 2 else y]
            loss = -((right + 1e-9) / (raised.sum(1) + 1e-9)).log().mean()
            assert_same(report.losses[i], loss)
            adams[i].zero_grad()
            loss.backward()
            adams[i].step()
    same_weights(net, blocks, list(net.layers))
    x, scores = samples(9)[0], torch.zeros(ROWS, CLASSES, dtype=torch.float64)
    for i, b in enumerate(blocks):
        x = b.eval()(x)
        scores = scores + (goodness(x, i) if i >= 2 else 0)
    assert_same(net(samples(9)[0]), scores)


def test_cafo_on_these_layers() -> None:
    """Layers as drawn; predictors by the softmax's cross-entropy; probabilities are added up."""
    net = network("baselines/cafo", channels=(4,), pools=(1,), layers=(8,))
    t = trainer(net)
    drawn = copy.deepcopy(net)
    blocks = [block(drawn.layers[0], True, True), block(drawn.layers[1], False, False)]
    tops = [torch.ones(CLASSES, n, dtype=torch.float64, requires_grad=True) for n in (36, 8)]
    for stage, top in enumerate(tops):
        adam = torch.optim.Adam([top], lr=LR)
        for step in range(2):
            x, y = samples(step)
            report = t.step(x, y, epoch=stage, iteration=step)
            for b in blocks[:stage + 1]:
                x = b.eval()(x)
            loss = F.cross_entropy(x.flatten(1) @ top.t(), y)
            assert_same(report.heads[stage][0], loss)
            adam.zero_grad()
            loss.backward()
            adam.step()
    for head, top in zip(net.heads, tops, strict=True):
        assert_same(head.weight, top)
    x, total = samples(9)[0], torch.zeros(ROWS, CLASSES, dtype=torch.float64)
    for b, top in zip(blocks, tops, strict=True):
        x = b(x)
        total = total + (x.flatten(1) @ top.t()).softmax(1)
    assert_same(net(samples(9)[0]), total)
    assert not any(p.requires_grad for p in net.layers.parameters())
