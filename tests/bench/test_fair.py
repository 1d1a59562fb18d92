"""bench.fair and its opponents: every family has its rows, and the rows say what is true."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.training import assert_same, grouped
from models import every as models
from models.every import TINY

from bench import fair, machine, plots, results
from bench.contenders import Contender, Phase
from bench.judging import judged, table, verdict
from bench.problem import Problem, turns
from ffengine.baselines.steps import BackpropStep, UnfusedStep, backprop_recipes
from ffengine.devices import rates
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.plans import phase_starts
from ffengine.engine.schedules.schedule import of
from ffengine.nn.differentiable import batch_statistics
from ffengine.ops.product_rule import exact
from ffengine.ops.weight_update import OptimConfig

NAMES = sorted(TINY)


def network(name: str, **changed: Any) -> Any:
    """Without dropout, whose draws differ from from one contender to the next."""
    found = changed if "deeperforward" not in name else {"dropout": 0.0, **changed}
    return models.network(name, **found)


#: Without a learning rate nothing moves, and gradients are all there is to compare.
PLAIN = OptimConfig(kind="sgd", lr=1.0)
BATCH_FREE = [n for n in NAMES if n != "deeperforward/resnet100" and not (
    batch_statistics(network(f"bp/{n}")))]
OPTIONS = {"num_classes": 10, "in_channels": 1}


def asked(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"budget": None, "authors": None, "only": "all", "compile": False,
                                 "rounds": 1, "limit": 60.0, **changed})


def problem(name: str, batch: int = 8, precision: str = "fp32", **options: Any) -> Problem:
    plain = fair.NO_DROPOUT.get(name.partition("/")[0], {})
    return Problem.of(name, batch, precision, **{**OPTIONS, **plain, **TINY[name], **options})


def twin(name: str) -> Any:
    net = network(f"bp/{name}").double()
    net.train()
    return net


def samples(net: Any, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    return (torch.rand(n, *net.in_shape, generator=source, dtype=torch.float64),
            torch.randint(net.num_classes, (n,), generator=source))


@pytest.mark.parametrize("name", BATCH_FREE)
def test_every_recipe_steps_by_the_gradient_of_the_whole_batch(name: str) -> None:
    net = twin(name)
    x, y = samples(net)
    loss = torch.nn.functional.cross_entropy(net.differentiable_logits(x), y)
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    true = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    before = {n: p.detach().clone() for n, p in named}
    for recipe, options in backprop_recipes(len(y)):
        for channels_last in (False, True):
            contender = BackpropStep(twin(name), PLAIN, torch.float64, channels_last=channels_last,
                                **options)
            contender.step(x, y)
            after = dict(contender.net.named_parameters())
            for (n, _), gradient in zip(named, true, strict=True):
                if gradient is not None:
                    assert_same(before[n] - after[n].detach(), gradient, (recipe, n))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (
    "deeperforward/resnet33", "deeperforward/resnet100", "deeperforward/cnn14", "trifecta/deep")])
def test_the_unfused_step_is_the_engines_rule(name: str) -> None:
    optim = OptimConfig(kind="sgd", lr=0.1)
    try:
        contender = UnfusedStep(network(name).double(), optim, torch.float64, epochs=4)
    except ValueError as refused:
        assert "layers that train in turn" in str(refused)
        assert name.startswith(("cff/", "cafo/")) or name == "fflib/ffrnn"
        return
    net = network(name)
    trainer = grouped(net, epochs=4, lr=0.1, lr_min=0.1, optimizer="sgd", weight_decay=0.0,
                 precision="fp64", backend="reference", progress=False)
    x, y = samples(net)
    trainer.planning.keep({  # no search: any plan will do
        "samples": len(x), "costs": "modelled", "seconds": None, "gave_up": [],
        "phases": [[epoch, [], [rows_of(net, len(x))], [False]]
                   for epoch in phase_starts(trainer.schedule)]})
    for _, epoch, iteration in turns(trainer.schedule):
        factor = trainer.settings.rate_factor(trainer.schedule.rate_epoch(epoch))
        for group in (g for o in contender.optimizers() for g in o.param_groups):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        trainer.step(x, y, epoch=epoch, iteration=iteration)
        contender.step(x, y, epoch=epoch, iteration=iteration)
    moved = 0
    for key, ours in trainer.net.state_dict().items():
        plain = contender.net.state_dict()[key]
        if ours.is_floating_point():
            assert_same(ours, plain, key)
            moved += not torch.equal(ours, network(name).state_dict()[key].to(ours.dtype))
    assert moved


@pytest.mark.parametrize("name", ["deeperforward/tinycnn", "trifecta/shallow", "sn/mlp",
                                  "cafo/cnn", "fflib/ffrnn", "hinton/threshold"])
def test_every_family_has_its_rows(name: str) -> None:
    made = problem(name)
    assert fair.check(made) < 1e-3
    rows = fair.measure(made, asked())
    names = [r["name"] for r in rows]
    assert names[0] == "ffengine" and len(set(names)) == len(names)
    assert {r["kind"] for r in rows} == {"ffengine", "eager", "bp"}
    assert [n for n in names if n.startswith("bp")] == [n for n, _ in backprop_recipes(8)]
    for row in rows:
        if row["failed"] is not None:
            assert "micro-batch" in row["name"] and batch_statistics(network(f"bp/{name}"))
            assert not row["gated"]
            continue
        assert 0 < row["working_bytes"] < row["peak_bytes"]
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["images_per_second"]["median"] == pytest.approx(8 / row["seconds"]["median"])
        other = "micro-batch" in row["name"] and batch_statistics(network(f"bp/{name}"))
        assert (row["note"] == "other batch statistics") == other and not (other and row["gated"])
    assert any(r["front"] for r in rows)
    assert "gate:" in verdict(rows) and all(n in table(rows) for n in names)


def test_metering_some_pieces_gives_the_peak_of_the_whole_step() -> None:
    made = problem("deeperforward/tinycnn", batch=16)
    recipes = dict(backprop_recipes(16))
    for name in ("bp micro-batch 1", "bp 8 micro-batches of 2, checkpointed"):
        contender = fair.backprop_contenders(made, name, False)
        (_, builds), = contender
        some, whole = builds[0](), builds[0]()
        assert recipes[name]["micro_batch"] and some.phases[0].show is not None
        whole.phases[0].show = None
        for each in (some, whole):
            each.warm()
        assert some.metered(made.x, made.y)["peak_bytes"] == (
            whole.metered(made.x, made.y)["peak_bytes"])


def test_turns_share_the_epochs() -> None:
    for name, total in (("deeperforward/tinycnn", 1), ("trifecta/shallow", 1), ("fflib/ffnn-c", 1),
                        ("sn/mlp", 2), ("cafo/cnn", 3), ("hinton/threshold", 2)):
        schedule = network(name).schedule or of(network(name), None)
        schedule.begin(network(name), 10)
        found = turns(schedule)
        assert sum(weight for weight, _, _ in found) == pytest.approx(total), name
    net = network("cwcomp/cfse", ilt="fast", dataset="mnist")
    net.schedule.begin(net, 20)
    shares = [weight for weight, _, _ in turns(net.schedule)]
    assert shares[0] == pytest.approx(1 / 20) and sum(shares) == pytest.approx(1)


def contender(name: str, step: Any, kind: str = "bp") -> Contender:
    return Contender(name, kind, [Phase(step)], lambda: {"parameter": [], "state": []})


def test_a_side_that_fails_stays_a_row() -> None:
    made = problem("deeperforward/tinycnn")

    def broken() -> None:
        raise RuntimeError("no\nmemory")

    row, kept = fair.prepared(made, "bp plain", "bp", [lambda: contender("bp plain", broken)])
    assert kept is None and row["failed"] == "no memory"
    turn = iter(range(9))

    def late() -> None:
        if next(turn) > 0:
            raise ValueError("[late] fails")

    times = fair.rounds_of({"late": contender("late", late),
                            "fine": contender("fine", lambda: None)}, 3, 60)
    assert times["late"] == "[late] fails" and len(times["fine"]) == 3
    assert "failed: no memory" in table([row | {"front": False}])


def test_rounds_stop_at_the_limit_after_one() -> None:
    def waits(seconds: float) -> Contender:
        return contender("waits", lambda: time.sleep(seconds))

    assert len(fair.rounds_of({"short": waits(0.01)}, 500, 0.0)["short"]) == 1
    times = fair.rounds_of({"long": waits(0.06), "short": waits(0.01)}, 500, 1.0)
    assert len(times["long"]) == 1 and 1 < len(times["short"]) < 110


def row(name: str, kind: str, peak: int, *rounds: float) -> dict[str, Any]:
    other = "other batch statistics" if name.endswith("*") else ""
    return {"name": name, "kind": kind, "peak_bytes": peak, "rounds": list(rounds), "failed": None,
            "note": other, "seconds": {"median": sorted(rounds)[len(rounds) // 2]}}


def test_front_and_domination() -> None:
    made = problem("deeperforward/tinycnn")
    rows = judged([
        row("lean", "ffengine", 50, 3.0, 3.0), row("fast", "ffengine", 90, 1.0, 1.0),
        row("bp plain", "bp", 100, 1.1, 1.1), row("bp checkpointed", "bp", 80, 2.0, 2.0),
        row("bp micro-batch 1", "bp", 40, 9.0, 9.0), row("bp as lean", "bp", 90, 2.0, 2.0),
        row("bp as fast", "bp", 95, 1.0, 1.0)], made)
    assert [r["front"] for r in rows] == [True, True, False, True, True, False, False]
    bp = rows[2:]
    assert [r["dominated"] for r in bp] == [True, False, False, False, False]
    assert [r["leaner"] for r in bp] == [True, True, False, True, True]
    assert all(r["gated"] for r in bp) and [r["passes"] for r in bp] == [r["dominated"] for r in bp]
    assert "1 of 5" in verdict(rows)


def test_gates_follow_the_network() -> None:
    def gates(name: str) -> tuple[list[bool], Any]:
        rows = judged([row("ours", "ffengine", 1, 1.5), row("bp plain", "bp", 2, 1.0),
                            row("bp micro-batch 1*", "bp", 2, 1.0)], problem(name))
        return [r["gated"] for r in rows[1:]], rows[1]["time_limit"]

    assert gates("deeperforward/tinycnn") == ([True, False], 1.0)
    assert gates("fflib/ffnn") == ([True, False], 1.6)
    assert gates("cwcomp/cfse") == ([True, False], None)
    assert gates("trifecta/shallow") == ([True, False], None)
    assert gates("hinton/threshold") == ([False, False], None)


def test_pieces_of_ours_do_not_beat_whole_batches() -> None:
    rows = judged([
        row("whole", "ffengine", 90, 5.0), row("pieces*", "ffengine", 10, 1.0),
        row("bp plain", "bp", 50, 2.0), row("bp pieces*", "bp", 50, 2.0)],
        problem("cwcomp/cfse"))
    assert [r["dominated"] for r in rows[2:]] == [False, True]


def test_command_writes_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rates, "FLUSH_BYTES", 1 << 20)
    words = ["sn/mlp", "--batch-size", "8", "--precision", "fp32,bf16", "--rounds", "1", "--json",
             "--only", "plain", "--set", "image_size=8", "--set", "layers=(20,20)",
             "--out", str(tmp_path)]
    assert fair.main(words) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    for values in printed:
        stem = f"sn-mlp-b8-{values['precision']}"
        kept = results.read(tmp_path / f"{stem}.json", "fair")
        assert kept["rows"] == values["rows"] and "stages" in kept["step"]
        assert (tmp_path / f"{stem}.png").stat().st_size > 10_000


def test_processor_seconds_of_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rates, "FLUSH_BYTES", 1 << 20)
    threads, seen = torch.get_num_threads(), [0]

    def process_time() -> float:
        seen.append(torch.get_num_threads())
        return float(len(seen))

    monkeypatch.setattr(time, "process_time", process_time)
    words = ["sn/mlp", "--batch-size", "8", "--precision", "fp32", "--rounds", "1", "--json",
             "--only", "plain", "--set", "image_size=8", "--set", "layers=(20,20)", "--cpu-time",
             "--out", str(tmp_path)]
    assert fair.main(words) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])[0]
    assert values["clock"] == "processor seconds of one thread"
    assert set(seen[1:]) == {1} and all(r["seconds"]["median"] in (1.0, 2.0)
                                        for r in values["rows"])
    assert torch.get_num_threads() == threads and machine.clock is time.perf_counter


def test_gate_decides_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(passes: bool) -> Any:
        found = {**row("bp plain", "bp", 2, 1.0), "gated": True, "passes": passes}
        return lambda problem, args: {"rows": [found]}

    for passes, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(fair, "run", judged(passes))
        assert fair.main(["sn/mlp", "--gate"]) == status
        assert fair.main(["sn/mlp"]) == 0


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_products_go_by_one_rule_on_every_side(precision: str, deterministic: bool) -> None:
    """What cuDNN and cuBLAS are told, inside our convolutions and outside them, as others call."""
    made = replace(problem("sn/mlp"), precision=precision, deterministic=deterministic)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def seen() -> tuple[str, str, bool, bool]:
        return (matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic,
                cudnn.benchmark)

    with made.rules():
        with exact("cuda"):
            ours = seen()
        theirs = seen()
    rounding = "tf32" if precision == "tf32" else "ieee"
    assert ours == theirs == (rounding, rounding, deterministic, not deterministic)
    assert made.trainer().settings.precision == ("bf16" if precision == "bf16" else "fp32")


@pytest.mark.parametrize("words, said", [
    (["sn/mlp", "--precision", "tf32"], "tf32 expected a GPU, whose products it rounds, got cpu"),
    (["nothing/here"], "unknown model"), (["bp/sn/mlp"], "local training"),
    (["sn/mlp", "--precision", "fp8"], "fp32 or bf16"), (["sn/mlp", "--rounds", "0"], "--rounds"),
    (["sn/mlp", "--cpu-time", "--device", "cuda"], "--cpu-time expected --device cpu, got cuda"),
    (["sn/mlp", "--batch-size", "0"], "--batch-size"), (["sn/mlp", "--set", "depth=3"], "depth"),
])
def test_bad_input_is_one_line(words: list[str], said: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert fair.main(words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_authors_code_of_another_checkout_is_a_row(tmp_path: Path) -> None:
    from bench.contenders import authors_contender

    for name in ("deeperforward/tinycnn", "fflib/ffnn", "trifecta/shallow", "sn/mlp"):
        made = problem(name)
        found, kept = fair.prepared(made, "authors' step", "authors",
                                    [lambda m=made: authors_contender(m, tmp_path)])
        assert kept is None and found["failed"].startswith("[bench] ")


def test_picture_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install ffengine\[plot\]"):
        plots.pyplot()
