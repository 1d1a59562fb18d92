"""Device profiles: bundled ones are sound, bad ones are one line; predictions by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import devices as bench
from bench import results
from ffengine import models
from ffengine.devices import catalog
from ffengine.devices.catalog import Device, Figure
from ffengine.devices.prediction import Predictor, Tally, every_phase
from ffengine.devices.rates import Rates
from ffengine.engine.memory.plans import Job
from ffengine.engine.run.settings import Settings
from ffengine.engine.schedules.schedule import of
from ffengine.engine.trainer import Trainer
from ffengine.profile.watch import watching

SMALL = {"widths": (10, 20, 20, 20), "image_size": 16, "in_channels": 1}


def job(model="deeperforward/tinycnn", batch=8, precision="fp32", options=SMALL):
    with torch.device("meta"):
        net = models.create(model, **options)
    schedule = of(net, None)
    settings = Settings.resolve(models.entry(model).recipe, batch_size=batch, precision=precision)
    schedule.begin(net, settings.epochs)
    return Job(net, schedule, settings)


def device(memory=1e9, bandwidth=1e30, flops=1e30, launch=1e-30, kind="cuda"):
    figures = {"memory_bytes": Figure(memory), "usable": Figure(1.0),
               "bytes_per_second": Figure(bandwidth), "launch_seconds": Figure(launch)}
    return Device("made-up", "made up", figures, {"fp32": Figure(flops), "fp16": Figure(flops)},
                  kind=kind)


@pytest.mark.parametrize("name", catalog.names())
def test_a_bundled_profile_is_sound(name):
    found = catalog.load(name)
    assert found.name == name and found.title and found.compute_capability
    assert all("https://" in source for source in found.sources.values())
    figures = {**found.figures, **found.flops_per_second}
    assert all(figure.source != "not given" for figure in figures.values())
    assert found.value("launch_seconds") == 5e-6  # one assumption, shared by all
    value = {k: f.value for k, f in found.figures.items()}
    peak = 2 * value["cuda_cores"] * value["clock_hz"]
    assert found.flops_per_second["fp32"].value == pytest.approx(peak, rel=0.02)
    assert value["cuda_cores"] % value["sm_count"] == 0
    for higher in ("fp16", "bf16"):
        if higher in found.flops_per_second:
            assert found.flops_per_second[higher].value >= 1.9 * peak


def test_what_the_issue_asks_for_is_bundled():
    known = catalog.names()
    assert {"jetson-nano", "orin-nano", "orin-nx", "agx-orin", "rtx-3050-laptop", "t4",
            "l4"} <= set(known)
    assert [n for n in known if catalog.load(n).prediction_only] == ["jetson-nano"]
    assert known == sorted(known, key=lambda n: catalog.load(n).usable_bytes)


def test_the_template_is_a_profile(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(catalog.TEMPLATE)
    assert catalog.load(path).usable_bytes == int(0.75 * 8_589_934_592)
    every = catalog.TEMPLATE.replace("\n# ", "\n").replace("A device", "# A device").replace(
        "A figure", "# A figure").replace("[sources], or", "# [sources], or")
    path.write_text(every)
    assert catalog.load(path).flops_per_second.keys() == {"fp32", "tf32", "fp16", "bf16"}


@pytest.mark.parametrize("old, new, said", [
    ('name = "my-device"', "", "missing key 'name'"),
    ("launch_seconds = {", "lunch_seconds = {", "[figures] unknown key 'lunch_seconds'"),
    ("bytes_per_second = { value = 100e9", "# ", "[figures] missing key 'bytes_per_second'"),
    ("value = 100e9", 'value = "fast"', "bytes_per_second expected a number above 0, got"),
    ("value = 100e9", "value = -1", "bytes_per_second expected a number above 0, got"),
    ("value = 100e9", "value = 0", "bytes_per_second expected a number above 0, got"),
    ("value = 100e9", "value = inf", "bytes_per_second expected a number above 0, got"),
    ("value = 100e9", "value = true", "bytes_per_second expected a number above 0, got"),
    ("value = 0.75", "value = 1.5", "usable expected a number above 0 up to 1, got"),
    ("value = 100e9, source", "value = 100e9, sauce", "expected a number, or a table of value"),
    ('"sheet: memory bandwidth"', '"a friend: told me"', "source expected to begin with one of"),
    ("fp32 =", "fp31 =", "[flops_per_second] unknown key 'fp31'"),
    ("fp32 =", "fp16 =", "[flops_per_second] missing key 'fp32'"),
    ("[flops_per_second]", "flops_per_second = 3\n[more]", "unknown key 'more'"),
    ('sheet = "title', "sheet = 4 # ", "sources expected texts by a short name"),
    ("[figures]", "[figures", "not TOML"),
])
def test_a_bad_profile_is_one_line(tmp_path, old, new, said):
    assert old in catalog.TEMPLATE
    path = tmp_path / "mine.toml"
    path.write_text(catalog.TEMPLATE.replace(old, new, 1))
    with pytest.raises(ValueError) as refused:
        catalog.load(path)
    text = str(refused.value)
    assert text.startswith("[device] mine.toml") and said in text and "\n" not in text


def test_an_unknown_profile_is_one_line(tmp_path):
    for name in ("nano", "../recipes/t4", "template"):
        with pytest.raises(ValueError, match=r"\[device\] unknown device .*known: jetson-nano"):
            catalog.load(name)
    with pytest.raises(ValueError, match=r"\[device\] expected a device file, got .*no such file"):
        catalog.load(tmp_path / "mine.toml")
    with pytest.raises(ValueError, match="t4 has no bf16 rate; known: fp32, fp16"):
        catalog.load("t4").rates("bf16")


def test_arithmetic_by_hand():
    """Forward and weight gradient: four FLOP a weight and output pixel."""
    made = job()
    net, rate = made.net, 1e9
    flops = sum(4 * net.layer(i).weight.numel() * torch.Size(net.layer(i).out_shape(
        net.input_of(i, net.shapes[i]))[1:]).numel() for i in range(4)) * 8
    found = Predictor(made).on(device(flops=rate))
    assert sum(s.flops for s in found.shares) == flops
    assert found.floor == pytest.approx(flops / rate) and found.bound == "arithmetic"
    assert [s.layer for s in found.shares] == [0, 1, 2, 3]


def test_bytes_and_launches_by_hand():
    predictor = Predictor(job())
    by_bytes = predictor.on(device(bandwidth=1e9))
    calls = predictor.calls(by_bytes.plan)
    assert by_bytes.floor == pytest.approx(sum(cost.bytes for _, _, cost in calls) / 1e9)
    assert by_bytes.bound == "bytes"
    weights = sum(p.numel() * 4 for p in predictor.job.net.parameters())
    assert sum(cost.bytes for _, name, cost in calls if name == "weight_update") > 6 * weights
    launched = predictor.on(device(launch=1e-6))
    kernels = sum(s.kernels for s in launched.shares)
    assert launched.floor == pytest.approx(1e-6 * kernels) and launched.bound == "launches"
    assert kernels >= 5 * 4 and launched.calls >= 3 * 4


def test_a_call_takes_the_longer_of_the_two():
    predictor = Predictor(job())
    plan = predictor.on(device()).plan
    rates = Rates(1e9, {torch.float32: 3e10}, 1e-30)
    floor = sum(max(c.bytes / 1e9, c.flops / 3e10) for _, _, c in predictor.calls(plan))
    found = predictor.of_plan(device(), rates, plan)
    assert found.floor == pytest.approx(floor)
    assert found.floor < sum(c.bytes / 1e9 + c.flops / 3e10 for _, _, c in predictor.calls(plan))
    assert found.by_bound["bytes"] > 0 < found.by_bound["arithmetic"]


def test_small_tiles_move_more_and_compute_the_same():
    predictor = Predictor(job())
    whole, tiled = (predictor.of_plan(device(), device().rates("fp32"),
                                      predictor.planner.fixed([1], tile)) for tile in (8, 1))
    assert sum(s.flops for s in whole.shares) == sum(s.flops for s in tiled.shares)
    assert sum(s.bytes for s in whole.shares) < sum(s.bytes for s in tiled.shares)
    assert whole.calls < tiled.calls


def test_a_dry_runs_calls_are_those_of_a_real_step():
    torch.manual_seed(0)
    net = models.create("deeperforward/tinycnn", **SMALL)
    trainer = Trainer(net, batch_size=8, progress=False, backend="reference")
    tally = Tally(trainer.net)
    x, y = torch.randn(8, *net.in_shape), torch.randint(0, 10, (8,))
    with watching(tally):
        trainer.step(x, y)
    planning = trainer.planning
    expected = Predictor(planning.job).calls(planning.plans(8).at(0))
    assert [(i, n, c.bytes, c.flops) for i, n, c in tally.calls] == [
        (i, n, c.bytes, c.flops) for i, n, c in expected]


def test_what_does_not_fit_says_so():
    predictor = Predictor(job(batch=64))
    smallest, fastest = predictor.planner.smallest(), predictor.planner.fastest()
    assert smallest.peak_bytes < fastest.peak_bytes
    roomy, close, tight, small = (predictor.on(device(memory=m)) for m in (
        fastest.peak_bytes, fastest.peak_bytes - 1, smallest.peak_bytes, smallest.peak_bytes - 1))
    assert roomy.fits and roomy.plan.peak_bytes == fastest.peak_bytes
    assert close.fits and smallest.peak_bytes < close.plan.peak_bytes < fastest.peak_bytes
    assert tight.fits and tight.plan.peak_bytes <= smallest.peak_bytes
    assert not small.fits and small.plan.peak_bytes == smallest.peak_bytes
    assert not predictor.on(device(), budget=smallest.peak_bytes - 1).fits
    assert json.loads(json.dumps(small.values()))["fits"] is False


def test_every_phase_of_a_layerwise_schedule():
    made = job("sn/mlp", options={})
    found = [phase.on(device(flops=1e9)) for phase in every_phase(made)]
    assert len(found) == len(made.net.layers) and len({p.turn for p in found}) == len(found)


def test_expected_is_the_measured_range(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "MEASURED", tmp_path / "measured.json")
    predictor = Predictor(job())
    assert predictor.on(device(flops=1e9)).expected is None
    rows = [{"precision": "fp32", "ratio": r} for r in (1.5, 2.0, 4.0)]
    bench.keep(rows, "cpu", 1e-9)
    gpu = predictor.on(device(flops=1e9))
    assert gpu.expected == pytest.approx((1.5 * gpu.floor, 2 * gpu.floor, 4 * gpu.floor))
    assert gpu.slow is not None and gpu.slow.kind == "cpu"  # no GPU was measured
    bench.keep(rows, "cuda", 10.0)  # the host is the slower: it is waited for, not added
    assert predictor.on(device(flops=1e9)).expected == (10 * gpu.calls,) * 3
    on_cpu = predictor.on(device(flops=1e9, kind="cpu"))
    assert on_cpu.expected[1] == pytest.approx(2 * gpu.floor + 1e-9 * gpu.calls)
    assert results.read(catalog.MEASURED, "slowdown")["slowdown"].keys() == {"cpu", "cuda"}
    assert catalog.slowdown("cuda", "bf16") is None
    bench.keep([{"precision": "bf16", "ratio": 3.0}], "cuda", 1e-9)
    assert catalog.slowdown("cuda", "fp16").where.endswith(", bf16")
    assert catalog.slowdown("cuda", "fp32").kind == "cpu"


def test_what_is_not_emulated():
    there, here = catalog.load("orin-nano"), catalog.load("h100")
    apart = catalog.not_emulated(there, here, "fp32")
    assert apart["sm_count"] == {"there": 8, "here": 132, "ratio": 8 / 132}
    assert apart["bytes_per_second"]["ratio"] == pytest.approx(102e9 / 3.35e12)
    assert apart.keys() == {"sm_count", "clock_hz", "bytes_per_second", "fp32 FLOP/s"}
    bare = replace(there, figures={k: f for k, f in there.figures.items() if k != "sm_count"})
    assert "sm_count" not in catalog.not_emulated(bare, here, "fp32")


def test_the_bench_predicts_no_row_by_itself():
    this = device(bandwidth=1e9, flops=1e10, kind="cpu")
    cpu = torch.device("cpu")
    cases = [bench.Case.of("deeperforward/tinycnn", n, "fp32", cpu, **SMALL) for n in (2, 4)]
    assert [len(taken) for taken in bench.timed(cases, 2)] == [2, 2]
    seconds = [[3.0, 1.0, 2.0], [8.0, 8.0, 8.0]]
    first, second = bench.compared(cases, seconds, this, None, host=1e-3)
    for row, median in ((first, 2.0), (second, 8.0)):
        assert row["ratio"] == pytest.approx(
            (median - 1e-3 * row["calls"]) / row["floor_seconds"])
        assert row["metered_bytes"] == pytest.approx(row["planned_bytes"], rel=0.02)
    assert first["expected_seconds"] == pytest.approx(
        second["ratio"] * first["floor_seconds"] + 1e-3 * first["calls"])
    assert bench.ratios([first, second])["fp32"]["max"] == max(first["ratio"], second["ratio"])
    assert "deeperforward/tinycnn" in bench.table([first, second])


def test_this_machine_is_a_profile(monkeypatch):
    monkeypatch.setattr(catalog, "machine_rates", lambda dtypes, device: Rates(
        1e10, dict.fromkeys(dtypes, 1e11), 1e-6))
    this = catalog.this_machine("cpu", ("fp32", "bf16"))
    assert this.kind == "cpu" and this.usable_bytes > 1e8
    assert this.rates("bf16").flops_per_second[torch.bfloat16] == 1e11
    assert json.dumps(this.values())
    faster = replace(this, figures={**this.figures, "bytes_per_second": Figure(2e10)})
    again = bench.this_machine(torch.device("cpu"), before=faster)
    assert again.value("bytes_per_second") == 2e10
    assert again.flops_per_second["fp32"].value == 1e11
