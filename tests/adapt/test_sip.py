"""SIP: ranges against a plain double loop, ties, pruning."""

from __future__ import annotations

import itertools

import pytest
import torch

from ffengine import models
from ffengine.adapt import prune, select
from ffengine.adapt.sip import best_range, range_hits


def network():
    torch.manual_seed(0)
    return models.create("deeperforward/resnet17", num_classes=5, planes=(5, 10, 20, 40),
                         image_size=16)


def batches(sizes=(7, 4)):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 16, 16, generator=generator),
             torch.randint(0, 5, (n,), generator=generator)) for n in sizes]


def test_hits_are_those_of_every_range() -> None:
    goodness, y = torch.rand(6, 40, 5), torch.randint(0, 5, (40,))
    hits = range_hits(goodness, y)
    for start, end in itertools.product(range(6), repeat=2):
        expected = (goodness[start:end + 1].sum(0).argmax(1) == y).sum() if start <= end else 0
        assert hits[start, end] == expected


@pytest.mark.parametrize(("hits", "best"), [
    ([[3, 5, 5], [0, 5, 5], [0, 0, 1]], (0, 1)),
    ([[3, 4, 5], [0, 5, 5], [0, 0, 9]], (2, 2)),
    ([[5, 5, 5], [0, 5, 5], [0, 0, 5]], (0, 0)),
    ([[0, 0], [0, 0]], (0, 0)),
])
def test_ties_keep_the_smallest_end_then_start(hits, best) -> None:
    assert best_range(torch.tensor(hits)) == best


def test_select_reports_and_applies() -> None:
    net, data = network().train(), batches()
    result = select(net, data, apply=False)
    assert net.layer_range == (1, 16)
    assert net.training
    assert result.accuracy == result.table.max() == result.table[result.start, result.end]
    assert torch.equal(result.layer_accuracy, result.table.diagonal())
    select(net, data)
    assert net.layer_range == (result.start, result.end)
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data)
    assert right / 11 == result.accuracy


def test_select_wants_samples() -> None:
    with pytest.raises(ValueError, match=r"^\[sip\] expected at least one sample"):
        select(network(), [])


def test_prune_drops_layers_and_keeps_scores() -> None:
    net, x = network(), torch.randn(3, 3, 16, 16)
    net.set_range(2, 6)
    smaller = prune(net)
    assert len(smaller.layers) == 7
    assert len(net.layers) == 17
    assert torch.equal(smaller(x), net(x))
    assert not {id(p) for p in smaller.parameters()} & {id(p) for p in net.parameters()}
