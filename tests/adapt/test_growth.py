"""Growth and degeneration: who grows, what trains, who goes; and both while training."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models.every import batch, network, trainer

from ffengine import data
from ffengine.adapt import apply
from ffengine.adapt.evolving import Evolving, count_of
from ffengine.adapt.growth import Degeneration, Growth, degenerate, grow, growing, weak_units
from ffengine.adapt.responses import below, survey
from ffengine.engine.run.evaluation import class_accuracy
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn import LocalNet


@pytest.fixture(scope="module")
def digits() -> data.Splits:
    return data.load("digits", normalize="off", seed=0)


@pytest.fixture(scope="module")
def trained(digits: data.Splits) -> LocalNet:
    """One linear layer 64 -> 30 after a few epochs: room to grow."""
    net = network("sn/mlp", layers=(30,))
    run = trainer(net, epochs=4, lr=2e-3, batch_size=64)
    run.fit(data.loader(digits.train, batch_size=64, shuffle=True, seed=0))
    return net


def batches(net: LocalNet, count: int = 3):
    return [batch(net, 40, seed=seed) for seed in range(count)]


def test_responses_are_the_class_means_of_what_a_neuron_adds_to_its_set() -> None:
    for name in ("sn/mlp", "sn/cifar100", "deeperforward/tinycnn"):
        net = network(name).double()
        net.eval()
        samples, layer = batches(net), 1
        seen = survey(net, layer, samples, "reference")
        x, y = torch.cat([x for x, _ in samples]), torch.cat([y for _, y in samples])
        g = net.goodness(x, backend="reference")[layer]
        edges = net.layer(layer).config.offsets(net.layer(layer).units)
        sizes = torch.tensor(edges).diff()
        per_unit = net.layer(layer).config.goodness != "sum_sq"
        for k in range(10):
            sums = torch.stack([seen.responses[k, s:e].sum() for s, e in pairwise(edges)])
            mean = g[y == k].mean(0) * (sizes if per_unit else 1)
            torch.testing.assert_close(sums, mean)
        target = y if net.layer(layer).label_map is None else net.layer(layer).label_map[y]
        assert torch.equal(seen.right, g.argmax(1) == target) and torch.equal(seen.labels, y)


def test_the_weakest_grow() -> None:
    accuracy = [0.9, 0.2, None, 0.5]
    assert growing(accuracy, Growth()) == [1]
    assert growing(accuracy, Growth(threshold=0.6)) == [1, 3]
    assert growing(accuracy, Growth(threshold=0.2)) == []


def test_growth_raises_the_class_and_moves_nothing_that_was_there(
        digits: data.Splits, trained: LocalNet) -> None:
    train, valid = (data.loader(p, batch_size=200) for p in (digits.train, digits.valid))
    label = growing(class_accuracy(trained, valid)[1], Growth())[0]
    clone, _ = grow(trained, 0, label, train, Growth(epochs=0))
    bigger, edit = grow(trained, 0, label, train, Growth(lr=1e-3))
    new = 3 * (label + 1)
    assert edit.new(0) == [new] and bigger.layer(0).units == 31
    own = survey(trained, 0, train).responses[label, 3 * label:new]
    like = 3 * label + int(own.argmax())
    assert torch.equal(clone.layer(0).weight[new], trained.layer(0).weight[like])
    kept = [u for u in range(31) if u != new]
    assert torch.equal(bigger.layer(0).weight[kept], trained.layer(0).weight)
    assert not torch.equal(bigger.layer(0).weight[new], clone.layer(0).weight[new])
    before, after = (class_accuracy(n, train)[1][label] for n in (trained, bigger))
    assert before is not None and after is not None and after > before
    assert torch.equal(apply(trained, edit).layer(0).weight, bigger.layer(0).weight)


def test_new_neurons_train_on_wrong_samples_of_the_class_and_as_many_others(
        trained: LocalNet, digits: data.Splits) -> None:
    from ffengine.adapt.growth import chosen

    train = data.loader(digits.train, batch_size=200)
    seen = survey(trained, 0, train)
    x, y = chosen(trained, 0, 8, train, seen, 0, "auto")
    wrong = (seen.labels == 8) & ~seen.right
    assert int(y.sum()) == int(wrong.sum()) == len(y) // 2 > 0
    all_x = torch.cat([below(trained, 0, x) for x, _ in train])
    rows = {tuple(r) for r in all_x[wrong].tolist()}
    assert rows == {tuple(r) for r in x[y == 1].tolist()}


def test_the_margin_is_maximised() -> None:
    """Goodness of new neurons rises on X_mis against X_dif, step by step, as printed in 3.5."""
    from ffengine.adapt.growth import train_units

    net = network("sn/mlp", layers=(10,)).double()
    x = torch.rand(40, 64, dtype=torch.float64)
    y = torch.arange(40) % 2
    x[y == 1, :20] += 1

    def margin() -> float:
        g = net.layer(0).preactivation(x)[:, [4, 7]].relu().square().sum(1)
        return float(g[y == 1].sum() - g[y == 0].sum())

    before, others = margin(), net.layer(0).weight[[0, 1]].clone()
    train_units(net.layer(0), [4, 7], x, y, Growth(batch_size=10, epochs=3, lr=1e-2), "reference")
    assert margin() > before and torch.equal(net.layer(0).weight[[0, 1]], others)


@pytest.mark.parametrize("init", ["clone", "random"])
def test_channels_grow_with_running_statistics_of_all_samples(init) -> None:
    net = network("sn/cifar10")
    samples = batches(net)
    with torch.no_grad():
        net.run(net.prepare(samples[0][0]), backend="reference", training=True)
    bigger, edit = grow(net, 1, 6, samples, Growth(neurons=2, init=init, epochs=2, lr=1e-3),
                        backend="reference")
    layer, new = bigger.layer(1), edit.new(1)
    assert new == [7, 8] and layer.config.offsets(layer.units)[6:9] == (6, 9, 10)
    h = torch.cat([layer.preactivation(below(bigger, 1, x))[:, new].relu() for x, _ in samples])
    torch.testing.assert_close(layer.running_mean[new], h.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var[new], h.transpose(0, 1).flatten(1).var(1))
    assert torch.equal(layer.norm_weight[:7], net.layer(1).norm_weight[:7])


def test_who_degenerates() -> None:
    responses = torch.tensor([0.1, 0.5, 0.4, 0.0, 0.0, 0.9, 0.2, 0.0])
    edges = (0, 3, 5, 8)
    assert weak_units(responses, edges, Degeneration(lowest=2)) == [4, 7]
    assert weak_units(responses, edges, Degeneration(lowest=5)) == [4, 7, 0, 6, 2]
    assert weak_units(responses, edges, Degeneration(threshold=0.1)) == [4, 7, 0]
    assert weak_units(responses, edges, Degeneration(fraction=0.21)) == [4, 7, 0]
    assert weak_units(responses, edges, Degeneration(fraction=1.0)) == [4, 7, 0, 6, 2]
    with pytest.raises(ValueError, match="at most 5 neurons"):
        weak_units(responses, edges, Degeneration(lowest=6))


def test_the_least_responding_neurons_go(trained: LocalNet, digits: data.Splits) -> None:
    train = data.loader(digits.train, batch_size=200)
    own = survey(trained, 0, train).own(tuple(range(0, 31, 3)))
    smaller, edit = degenerate(trained, 0, train, Degeneration(lowest=2))
    assert edit is not None and smaller.layer(0).units == 28
    gone = edit.gone(0)
    assert max(own[gone]) <= min(own[u] for u in range(30) if u not in gone)
    assert degenerate(trained, 0, train, Degeneration(threshold=0.0))[1] is None or own.min() == 0


def test_sets_change_while_training_and_only_for_the_better(digits: data.Splits) -> None:
    train = data.loader(digits.train, batch_size=64, shuffle=True, seed=0)
    valid = data.loader(digits.valid, batch_size=200)
    net = network("sn/mlp", layers=(20, 20))
    limit = count_of(net) + 100
    run = trainer(net, epochs=2, lr=5e-3, batch_size=64)
    evolving = Evolving(train, valid, parameters=limit)
    run.fit(train, valid, callbacks=[evolving])
    assert len(run.history.rows) == 4 and count_of(run.net) <= limit
    assert run.history.rows[-1].extra == {"parameters": count_of(run.net)}
    kept = [a for a in evolving.attempts if a.kept]
    assert {a.layer for a in evolving.attempts} == {0, 1}
    assert all((a.after >= a.before) == a.kept for a in evolving.attempts)
    assert {a.kind for a in kept} == {"grow", "degenerate"}
    assert len(run.notes["edits"]) == len(kept) and kept[-1].parameters == count_of(run.net)
    units = [20 + sum((a.kind == "grow") - (a.kind == "degenerate") for a in kept
                      if a.layer == i) for i in range(2)]
    assert [run.net.layer(i).units for i in range(2)] == units


@pytest.mark.parametrize(("make", "said"), [
    (lambda net, s: grow(net, 3, 0, s, Growth()), r"expected a layer of 0\.\.1, got 3"),
    (lambda net, s: grow(net, 0, 10, s, Growth()), r"expected a class of 0\.\.9, got 10"),
    (lambda net, s: grow(network("fflib/ffnn"), 0, 0, s, Growth()), "for each of the 10 classes"),
    (lambda net, s: degenerate(net, 0, [], Degeneration(lowest=1)), "at least one batch"),
    (lambda net, s: Growth(threshold=1.5), r"accuracy in \[0, 1\], got 1.5"),
    (lambda net, s: Growth(neurons=0), "got neurons=0"),
    (lambda net, s: Growth(init="copy"), "clone, random"),
    (lambda net, s: Degeneration(), "one of threshold, fraction and lowest"),
    (lambda net, s: Degeneration(lowest=1, fraction=0.1), "one of threshold, fraction and lowest"),
    (lambda net, s: trainer(net, schedule=Schedule()).fit(s, callbacks=[
        Evolving(s, s, parameters=10)]), "at least the network's"),
    (lambda net, s: Evolving(s, s, parameters=10, every=0), "1 epoch or more, got 0"),
])
def test_what_cannot_grow_is_said_in_a_line(make, said: str) -> None:
    net = network("sn/mlp")
    with pytest.raises(ValueError, match=said) as caught:
        make(net, batches(net, 1))
    assert "\n" not in str(caught.value)
