"""How class scores are read off goodness, heads and predictors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ffengine.nn import LinearHead, LocalLinear, LocalNet, Readout
from ffengine.ops.config import LocalPassConfig
from ffengine.reference.local_pass import sparsemax

K = 4


def network(readout: Readout, heads: int = 0, **options: object) -> LocalNet:
    torch.manual_seed(0)
    config = LocalPassConfig(groups=K, goodness="mean_sq")
    layers = [LocalLinear(6, 8, config=config), LocalLinear(8, 8, config=config),
              LocalLinear(8, 8, config=config)]
    made = [LinearHead((i,), 8, K) for i in range(heads)]
    return LocalNet(layers, num_classes=K, in_shape=(6,), readout=readout, heads=made, **options)


def samples() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bounds", [(2, 2), (0, 2), (0, 0), (1, 2)],
                         ids=["last", "all", "first", "last-two"])
@pytest.mark.parametrize("theta", [None, 0.7])
@pytest.mark.parametrize("maximize", [True, False])
def test_goodness_over_a_range(bounds: tuple[int, int], theta: float | None,
                               maximize: bool) -> None:
    net, x = network(Readout(theta=theta, maximize=maximize), layer_range=bounds), samples()
    parts = net.goodness(x)[bounds[0]:bounds[1] + 1]
    total = sum(g if theta is None else F.softplus(g - theta) for g in parts)
    torch.testing.assert_close(net(x), total if maximize else -total)
    assert torch.equal(net(x).argmax(1), (total.argmax(1) if maximize else total.argmin(1)))


def test_softplus_is_exact_at_both_ends() -> None:
    g = torch.tensor([[-1e4, 0.0, 1e4, float("nan")]])
    scores = Readout(theta=0.0).of_goodness([g])
    assert scores[0, 0] == 0 and scores[0, 2] == 1e4 and scores[0, 3].isnan()
    assert scores[0, 1] == F.softplus(torch.tensor(0.0))


def test_heads() -> None:
    x = samples()
    for head, relu in ((0, False), (1, True), (2, False)):
        net = network(Readout("head", head=head, relu=relu), heads=3)
        zs: list[torch.Tensor] = []
        net.run(net.prepare(x), features=zs)
        logits = F.linear(zs[head], net.heads[head].weight, net.heads[head].bias)
        torch.testing.assert_close(net(x), logits.relu() if relu else logits)
        assert not net(x).requires_grad
        assert (net(x) < 0).any() != relu


@pytest.mark.parametrize(("squash", "function"), [
    ("softmax", lambda t: t.softmax(1)), ("sparsemax", sparsemax)])
def test_predictors_are_summed(squash: str, function: object) -> None:
    net, x = network(Readout("predictors", squash=squash), heads=3), samples()
    torch.testing.assert_close(net(x), sum(function(row) for row in net.logits(x)))
    torch.testing.assert_close(net(x).sum(1), torch.full((5,), 3.0))


def test_sparsemax_is_the_nearest_distribution() -> None:
    rows = sparsemax(torch.tensor([[3.0, 1.0, 0.9], [0.2, 0.1, 0.0], [1.0, 1.0, -5.0]]))
    expected = torch.tensor([[1.0, 0.0, 0.0], [13 / 30, 1 / 3, 7 / 30], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize(("build", "said"), [
    (lambda: Readout("votes"), "goodness, head, predictors, got 'votes'"),
    (lambda: Readout(squash="max"), "softmax, sparsemax, got 'max'"),
    (lambda: network(Readout("head")), "a readout by head expected heads, got none"),
    (lambda: network(Readout("predictors")), "by predictors expected heads, got none"),
    (lambda: network(Readout("head", head=2), heads=1), "head 2 expected 3 heads or more, got 1"),
    (lambda: network(Readout(), negatives="some"), "random, inverse, .*, got 'some'"),
    (lambda: network(Readout(), propagate="later"), "stale, updated, got 'later'"),
])
def test_readouts_that_make_no_sense(build: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_head_of_another_width() -> None:
    config = LocalPassConfig(groups=K)
    for layers, width, said in (((0,), 7, "expected 8 features, got 7"),
                                ((0, 1), 8, "expected 16 features, got 8"),
                                ((5,), 8, "head on layers")):
        with pytest.raises(ValueError, match=rf"^\[network\] a .*{said}"):
            LocalNet([LocalLinear(6, 8, config=config), LocalLinear(8, 8, config=config)],
                     num_classes=K, in_shape=(6,), heads=[LinearHead(layers, width, K)])
