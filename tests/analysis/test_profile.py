"""A profile's spans, sums, costs and memory against the engine's own word."""

from __future__ import annotations

import math

import pytest
import torch

from ffengine.engine import execute
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.rows import Rows
from ffengine.engine.trainer import Trainer
from ffengine.ops import linear_step, local_pass, weight_update
from ffengine.profile import record, table, watch
from ffengine.profile.spans import Sum
from tests.analysis.profiling import COPY_RATE, PRODUCT_RATE, fix_rates, profiled, trainer

#: A model of every schedule, at the smallest size it takes.
MODELS = {
    "fflib/ffrnn": {"image_size": 8, "layers": (40, 40)},
    "fflib/ffnn-c": {"image_size": 8, "layers": (40, 40)},
    "trifecta/shallow": {"image_size": 8, "in_channels": 1, "widths": (10, 10, 20, 20, 20, 20)},
    "cwcomp/cfse": {"image_size": 8, "in_channels": 1},
    "cff/adaptive": {"image_size": 8, "in_channels": 1},
    "hinton/peer-norm": {"image_size": 8, "in_channels": 1},
    "cafo/cnn": {"image_size": 8, "in_channels": 1},
    "sn/mlp": {"image_size": 8, "in_channels": 1},
}


@pytest.fixture(autouse=True)
def made_up_rates(monkeypatch):
    fix_rates(monkeypatch)


def tiled():
    return trainer(cuts=[1], tile=[2, 8])


def test_every_layer_of_every_tile_is_there():
    made = profiled(tiled())
    (phase,) = made.phases
    layers = [s for s in phase.spans if s.name == "layer"]
    assert [(s.layer, s.segment, s.tile) for s in layers] == [
        *((i, 0, (start, 2)) for start in range(0, 8, 2) for i in (0, 1)),
        (2, 1, (0, 8)), (3, 1, (0, 8))]
    for index, span in enumerate(phase.spans):
        if span.name == "layer":
            inside = [s.name for s in phase.spans if s.parent == index or (
                s.parent >= 0 and phase.spans[s.parent].parent == index)]
            first = ["encode"] if span.layer == 0 else []
            assert [n for n in inside if n not in ("update", "transform", "join", "operands")] == [
                *first, "forward", "local_pass", "weight_update"]


def test_times_nest_and_add_up():
    (phase,) = profiled(tiled()).phases
    for span in phase.spans:
        assert span.end >= span.begin and span.own > -1e-9
        if span.parent >= 0:
            above = phase.spans[span.parent]
            assert above.begin <= span.begin and span.end <= above.end
    total = phase.total()
    assert total.seconds == pytest.approx(phase.seconds) == pytest.approx(
        sum(s.seconds for s in [*phase.by_layer().values(), phase.outside()]))
    assert sum(total.parts.values()) == pytest.approx(phase.seconds)
    inside = sum(s.seconds for s in phase.by_segment().values())
    assert inside < phase.seconds and phase.measured["min"] <= phase.measured["max"]


def test_bytes_are_the_ops_own_and_flops_the_shapes():
    made = tiled()
    (phase,) = profiled(made).phases
    net, item = made.net, 4
    for i, row in phase.by_layer().items():
        weights = net.layer(i).weight.numel()
        a_shape = net.layer(i).out_shape(net.input_of(i, net.shapes[i]))
        assert row.flops == 2 * 2 * 8 * weights * math.prod(a_shape[1:])
    x_shape, a_shape, w = net.shapes[1], net.layer(1).out_shape(net.input_of(1, net.shapes[1])), (
        net.layer(1).weight)
    second = [s for s in phase.spans if s.layer == 1]
    seen = net.input_of(1, x_shape)
    sweeps = [s.bytes for s in second if s.name == "local_pass"]
    assert sweeps == 4 * [local_pass.bytes_moved((2, *a_shape), torch.float32,
                                                 net.layer(1).config)]
    updates = [s.bytes for s in second if s.name == "weight_update"]
    assert updates == [weight_update.bytes_moved(
        (2, *seen), (2, *a_shape), tuple(w.shape), torch.float32, accumulate=True,
        finish=tile == 3, optim=made.settings.optim()) for tile in range(4)]
    forward = [s.bytes for s in second if s.name == "forward"]
    assert forward == 4 * [item * (2 * (math.prod(seen) + math.prod(a_shape)) + w.numel())]


def test_a_streamed_layer_is_one_call():
    made = trainer("fflib/ffnn", 64, image_size=8, layers=(40, 40))
    (phase,) = profiled(made, 64).phases
    (call,) = [s for s in phase.spans if s.name == "linear_step"]
    assert call.layer == 1 and call.flops == 4 * 128 * 40 * 40
    assert call.bytes == linear_step.bytes_moved(
        (128, 40), (40, 40), torch.float32, made.net.layer(1).config, optim=made.settings.optim())
    assert phase.by_layer()[1].flops == call.flops, "what it calls is its own"


def test_the_roofline_is_of_each_call():
    (phase,) = profiled(tiled()).phases
    for span in phase.spans:
        by_bytes, by_flops = span.bytes / COPY_RATE, span.flops / PRODUCT_RATE
        assert span.floor == pytest.approx(max(by_bytes, by_flops))
        if span.floor:
            assert span.bound == ("arithmetic" if by_flops > by_bytes else "bytes")
    total = phase.total()
    assert total.share == pytest.approx(sum(s.floor for s in phase.spans) / phase.seconds)


@pytest.mark.parametrize("cuts, tile", [([1], [2, 8]), ([], [8]), ([0, 2], [4, 8, 1])])
def test_memory_is_the_meters_and_near_the_plan(cuts, tile):
    made = trainer(cuts=cuts, tile=tile)
    (phase,) = profiled(made).phases
    made.peak_bytes = 0
    made.meter_next()
    made.step(record._samples(made, 8))
    assert phase.peak.total == made.peak_bytes, "watching changed what is live"
    assert phase.peak.total == pytest.approx(phase.plan.peak_bytes, rel=0.02)
    assert [s.time for s in phase.samples] == sorted(s.time for s in phase.samples)
    assert phase.at_peak().peak_bytes == phase.peak.total == max(s.peak_bytes for s in phase.spans)
    here = phase.at_peak()
    assert here.begin <= phase.peak.time <= here.end and here.layer is not None
    first, last = phase.samples[0], phase.samples[-1]
    assert first.live[:2] == last.live[:2], "parameters and states stay"
    assert any(s.live[2] for s in phase.samples) == (min(tile) < 8), "gradients of tiled runs"


class Deaf:
    """A listener that notes nothing."""

    def open(self, watched, args):
        return True

    def close(self, watched, result, args, options):
        pass


def test_watching_keeps_no_map_alive():
    """A concatenated map is freed before its branch is pooled, watched or not."""
    net = trainer("deeperforward/resnet17", image_size=16, in_channels=1,
                  planes=(10, 20, 40, 80)).net
    i = [w.join for w in net.wires].index("concat")

    def peak():
        z, shortcut = [torch.ones(4, 10, 16, 16)], torch.ones(4, 10, 16, 16)
        with MemoryMeter() as meter, torch.no_grad():
            net.join(i, z.pop(), shortcut)
        return meter.report.peak_bytes

    alone = peak()
    with watch.watching(Deaf()):
        assert peak() == alone == 4 * 4 * (4 * 10 * 16 * 16)  # both maps, and both joined


@pytest.mark.parametrize("name", MODELS)
def test_every_schedule_in_all_its_phases(name):
    made = trainer(name, **MODELS[name])
    starts = record.phases(made)
    chosen = starts if len(starts) < 4 else [starts[0], starts[-1]]
    got = profiled(made, starts=chosen)
    trained = {i for s in starts for i in s.turn.layers}
    assert trained or name == "cafo/cnn"
    for phase, start in zip(got.phases, chosen, strict=True):
        made.peak_bytes = 0
        made.meter_next()
        made.step(record._samples(made, 8), epoch=start.epoch, iteration=start.iteration)
        assert phase.peak.total == made.peak_bytes, "watching changed what is live"
        for i in start.turn.layers:
            parts = phase.by_layer()[i].parts
            assert {"forward", "sweep", "update"} <= parts.keys() or "linear_step" in parts, i
        assert bool(start.turn.heads) == ("head" in phase.total().parts)
        assert "sweep" not in phase.outside().parts, "a sweep belongs to a layer"
        for head in start.turn.heads:
            classes, features = made.net.heads[head].weight.shape
            (span,) = [s for s in phase.spans if s.part == "head"]
            assert span.flops == 4 * 8 * classes * features
            assert phase.spans.index(span) not in {s.parent for s in phase.spans}, "counted twice"
        assert table.headline(got, phase).startswith("Memory peaks at ")
    lines = table.text(got).splitlines()
    assert sum(line.startswith("phase ") for line in lines) == len(chosen)


@pytest.mark.gpu
def test_on_a_gpu_events_keep_the_time():
    (phase,) = profiled(Trainer(trainer().net, batch_size=8, device="cuda", progress=False)).phases
    assert phase.seconds > 0 and phase.allocated_bytes is not None
    assert phase.allocated_bytes >= phase.peak.live[0] + phase.peak.live[1]
    assert all(s.end >= s.begin for s in phase.spans)


def test_nothing_stays_watched():
    before = {(w.name, w.function) for w in watch.table()}
    made = trainer()
    profiled(made)
    assert {(w.name, w.function) for w in watch.table()} == before
    assert execute.layer_turn.__module__ == "ffengine.engine.execute"
    assert not hasattr(execute.layer_turn, "__wrapped__") and "train" not in vars(made.schedule)


def test_nothing_stays_watched_after_an_error():
    class Breaks:
        def open(self, watched, args):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), watch.watching(Breaks()):
        Rows(0, 1).put(torch.zeros(1), torch.zeros(1))
    assert not hasattr(Rows.put, "__wrapped__")


def test_steps_that_differ_are_refused(monkeypatch):
    made = trainer()
    real, calls = made.schedule.train, []

    def train(ctx, *rest):
        calls.append(1)
        if len(calls) == 3:  # the second timed step
            ctx.net.transform(0, torch.zeros(1, 1, 8, 8))
            made.net.layer(0).preactivation(torch.zeros(1, 1, 8, 8))
        return real(ctx, *rest)

    monkeypatch.setattr(type(made.schedule), "train", lambda self, *a: train(*a))
    with pytest.raises(ValueError, match="make the same calls"):
        profiled(made)


def test_backpropagation_is_refused():
    with pytest.raises(ValueError, match=r"\[profile\] expected a network of layer-local"):
        profiled(trainer("bp/sn/mlp", image_size=8))


def test_a_sum_names_what_bounds_it():
    (phase,) = profiled(trainer()).phases
    some = [s for s in phase.spans if s.bound][:1]
    assert Sum.of(some).bound == some[0].bound and Sum.of([]).bound == "" == Sum.of(
        s for s in phase.spans if not s.floor).bound
    assert Sum.of([]).share == 0.0
