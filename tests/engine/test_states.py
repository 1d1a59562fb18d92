"""Training with optimizer states, and weights, in fewer bits: bytes, checkpoints, accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.training import batch, loaders, network, same, trainer, weights

import ffengine as ff
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.optim import round_weights, rounds_weights
from ffengine.engine.run.settings import Settings
from ffengine.ops.optim import OptimConfig

#: Trainer arguments of every format.
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"states": "bf16"}, "8bit": {"states": "8bit"},
    "sgd": {"states": "8bit", "optimizer": "sgd"},
    "bf16-weights": {"weights": "bf16", "precision": "bf16"},
    "smallest": {"states": "8bit", "weights": "bf16", "precision": "bf16"}}


def made(seed: int = 0, net: Any = None, **options: Any) -> ff.Trainer:
    """Layers of 250, 5000, 7200 and 14400 weights."""
    net = network(seed, widths=(10, 20, 40, 40)) if net is None else net
    return trainer(seed, net, **{"backend": "auto", **options})


def held(t: ff.Trainer) -> dict[str, torch.Tensor]:
    return t.optimizer.export_state()[0]


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(kind, tmp_path):
    train, valid, _ = loaders()
    straight, first = made(**KINDS[kind]), made(out=tmp_path, **KINDS[kind])
    straight.fit(train, valid)
    first.fit(train, valid, until=2)
    resumed = made(net=network(5, widths=(10, 20, 40, 40)), out=tmp_path, **KINDS[kind])
    resumed.resume(tmp_path)
    resumed.fit(train, valid)
    assert same(weights(straight.net), weights(resumed.net))
    assert same(held(straight), held(resumed))


def test_another_precision_is_refused(tmp_path):
    made(out=tmp_path, states="8bit").save()
    for options, text in (({}, "expected states fp32, got 8bit"),
                          ({"states": "bf16"}, "expected states bf16, got 8bit"),
                          ({"states": "8bit", "weights": "bf16", "precision": "bf16"},
                           "expected precision bf16, got fp32")):
        t = made(**options)
        before = weights(t.net)
        with pytest.raises(ValueError, match=text) as caught:
            t.resume(tmp_path)
        assert "\n" not in str(caught.value) and same(before, weights(t.net))
    tensors, values = made(states="8bit").optimizer.export_state()
    with pytest.raises(ValueError, match="expected bf16 optimizer states, got 8bit"):
        made(states="bf16").optimizer.import_state(tensors, values)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_as_declared(kind):
    t = made(**KINDS[kind])
    states = t.optimizer.state_tensors()
    assert t.floor_bytes == nbytes(t.net.parameters()) + nbytes(states)
    t.plan_for(8)  # a dry run, which is not to be metered
    with MemoryMeter(parameter=t.net.parameters(), state=states) as meter:
        t.step(*batch())
    assert meter.report.floor_bytes == t.floor_bytes
    assert meter.report.at_peak["state"] == nbytes(states)


def test_sizes_by_hand():
    small, large = 250, 5000 + 7200 + 14400
    assert made().floor_bytes == 12 * (small + large)
    assert made(states="bf16").floor_bytes == 12 * small + 8 * large
    scales = 2 * 4 * (20 + 29 + 57)  # blocks of 256
    assert made(states="8bit").floor_bytes == 12 * small + 6 * large + scales
    least = made(**KINDS["smallest"])
    assert least.floor_bytes == 12 * small + 4 * large + scales
    assert [p.dtype for p in least.net.parameters()] == [torch.float32] + [torch.bfloat16] * 3


@pytest.mark.parametrize("kind", ["8bit", "smallest"])
def test_the_plan_is_what_the_meter_reads(kind):
    """Whole batch and tiles, whose sums of gradients are fp32 whatever the weights are."""
    free = made(batch_size=64, **KINDS[kind])
    tight = made(batch_size=64, memory_budget=free.plan.peak_bytes * 3 // 4, **KINDS[kind])
    assert max(free.plan.tile) == 64 and min(tight.plan.tile) < 64
    for t in (free, tight):
        t.meter_next()
        t.step(*batch(64))
        assert abs(t.peak_bytes - t.plan.peak_bytes) <= 0.02 * t.plan.peak_bytes
        assert t.settings.states == "8bit"  # asked for, so no budget changes it


def test_random_bits_are_the_seeds_and_the_parameters():
    runs = [made(net=network(widths=(10, 20, 40, 40)), states="8bit", seed=seed)
            for seed in (1, 1, 2)]
    for t in runs:
        t.step(*batch())
    first, again, other = (held(t) for t in runs)
    assert same(first, again)
    assert not torch.equal(first["layers.3.weight.m"], other["layers.3.weight.m"])
    streams = {s.stream for s in runs[0].optimizer.states.values()}
    assert len(streams) == 4 and min(streams) >= 1 << 31


def test_settings_that_cannot_be():
    for options, text in (({"states": "4bit"}, "states must be one of fp32, bf16, 8bit"),
                          ({"weights": "8bit"}, "weights must be one of fp32, bf16"),
                          ({"weights": "bf16"}, "weights=bf16 expected precision bf16, got fp32"),
                          ({"states": "8bit", "precision": "fp64", "backend": "reference"},
                           "states=8bit expected a precision below fp64, got fp64")):
        with pytest.raises(ValueError, match=text):
            made(**options)
    assert Settings("adam", 1, 1, 0, 1, 1, 1, 0, "fp32", states="8bit").optim() == OptimConfig(
        "adam", 1, state_precision="8bit")


def test_a_network_of_bf16_weights_scores_in_fp32():
    net = network(widths=(10, 20, 40, 40)).eval()
    plain = network(widths=(10, 20, 40, 40)).eval()
    round_weights(net)
    assert rounds_weights(net) == {f"layers.{i}.weight" for i in (1, 2, 3)}
    x = batch()[0]
    assert net(x).dtype is torch.float32
    plain.load_state_dict(net.state_dict())  # the same numbers in fp32
    assert torch.equal(net(x), plain(x))
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["8bit", "smallest"])
def test_digits_are_learned_as_with_fp32(kind):
    """Held-out accuracy, a mean of two seeds, within 1.5 points of fp32 states and weights."""
    splits = ff.data.load("digits", image_size=8)
    test = ff.data.loader(splits.test, batch_size=256)

    def accuracy(**options: Any) -> float:
        found = 0.0
        for seed in (0, 1):
            t = made(seed, epochs=15, lr=0.02, **options)
            t.fit(ff.data.loader(splits.train, batch_size=64))
            found += t.evaluate(test) / 2
        return found

    plain = accuracy(precision=KINDS[kind].get("precision", "fp32"))
    assert plain > 0.9 and abs(accuracy(**KINDS[kind]) - plain) <= 0.015
