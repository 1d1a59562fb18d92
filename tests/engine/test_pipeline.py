"""Pipelines: ranks over gloo on loopback train what one process trains, and end together."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ffengine as ff
from ffengine.engine.context import Turn
from ffengine.engine.parallel import balance, launch
from ffengine.engine.parallel.cutting import piece_of, staged
from ffengine.engine.parallel.pipeline import Pipeline
from ffengine.engine.program import Facts, Instruction, Loop, Program
from ffengine.engine.run import checkpoint
from ffengine.engine.schedules.schedule import of
from tests.engine.pipeline_worker import CUTS, RUNS, TILES, At, build, train
from tests.engine.pipeline_worker import plan as plan_of
from tests.engine.training import network

ROOT = Path(__file__).parents[2]


def ranks(count: int, scenario: str, folder: Path) -> list[tuple[int, str, Any]]:
    """(exit status, standard error, what it said) of every rank of a scenario."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port())}
    started = [subprocess.Popen(
        [sys.executable, "-m", "tests.engine.pipeline_worker", scenario, str(folder)], cwd=ROOT,
        env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(count)]
    found = []
    for rank, process in enumerate(started):
        _, errors = process.communicate(timeout=300)
        said = folder / f"{scenario}-{rank}.json"
        found.append((process.returncode, errors, json.loads(said.read_text())
                      if said.exists() else None))
    return found


def assert_same_run(ours: Path, alone: Path) -> None:
    """Weights, states, generators and all numbers of the history that are not of time or memory."""
    for name in (checkpoint.LATEST, checkpoint.BEST):
        a, b = checkpoint.load(ours, name), checkpoint.load(alone, name)
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(t, b.tensors[k]) for k, t in a.tensors.items())
        for key in ("optimizer", "position", "layer_range", "best_accuracy", "settings"):
            assert a.meta[key] == b.meta[key], key
    measured = ("seconds", "images_per_second", "peak_bytes")
    rows = [[{k: v for k, v in row.items() if k not in measured}
             for row in csv.DictReader((folder / "history.csv").open())]
            for folder in (ours, alone)]
    assert rows[0] == rows[1]


def test_two_stages_train_what_one_process_trains(tmp_path: Path) -> None:
    found = ranks(2, "same", tmp_path)
    assert [status for status, *_ in found] == [0, 0], found[0][1] + found[1][1]
    first, last = (said for *_, said in found)
    # other weights on rank 1: both say the same
    assert first["refused"] == last["refused"]
    assert first["refused"].startswith("[pipeline] expected the same weights on every rank, got "
                                       "another on rank 1")
    for name, precision, epochs in RUNS:
        alone = train(name, tmp_path / "alone" / f"{name}-{precision}", epochs,
                                      precision=precision)
        assert_same_run(tmp_path / f"{name}-{precision}", tmp_path / "alone" /
                        f"{name}-{precision}")
        # each stage holds states of its own layers alone
        states = [{n.split("@")[0] for n in alone.optimizer.states if piece_of(
            alone.net, range(*said[name][:2])).holds(n)} for said in (first, last)]
        sizes = [sum(2 * alone.net.get_parameter(n).numel() for n in names) for names in states]
        assert [said[name][2] for said in (first, last)] == sizes and all(sizes)
        # and, once others have theirs, the last one's parameters alone; the first evaluates
        own = sum(p.numel() * p.element_size() for n, p in alone.net.named_parameters()
                  if n in states[1])
        assert own <= last[name][3] <= own + 8 * 60
    cuts = checkpoint.load(tmp_path / "resnet-fp64").meta["plan"]["phases"][0]
    assert set(CUTS) < set(cuts[1]) and set(TILES) == set(cuts[2])


def test_four_stages_go_on_where_one_process_was_interrupted(tmp_path: Path) -> None:
    """Within an epoch. Then one of them is killed, which the others say; one process goes on from
    the last checkpoint."""
    def interrupt(trainer: Any) -> None:
        trainer.save(tmp_path / "interrupted.safetensors")

    alone = train("resnet", tmp_path / "alone", 3, precision="fp32", callbacks=(
        At(5, interrupt),))
    (tmp_path / "more").mkdir()
    header, row, *_ = (tmp_path / "alone" / "history.csv").read_text().splitlines(keepends=True)
    (tmp_path / "more" / "history.csv").write_text(header + row)
    found = ranks(4, "more", tmp_path)
    assert [status for status, *_ in found] == [0, 0, -9, 0], [errors for _, errors, _ in found]
    said = [found[rank][2] for rank in (0, 1, 3)]
    assert_same_run(tmp_path / "more", tmp_path / "alone")
    (a, b) = said[0]["layers"][2]
    assert len(said[0]["layers"]) == 4 and all(s["layers"] == said[0]["layers"] for s in said)
    # its connection closed, or, where a rank had none to it, it gave no sign of life
    assert said[0]["error"].startswith(f"[pipeline] rank 2, stage 2 (layers {a}-{b - 1}): died: ")
    assert [(s["error"], s["kind"]) for s in said] == [(said[0]["error"], "StageFailed")] * 3
    assert max(s["seconds"] for s in said) < 15
    assert not list((tmp_path / "more").glob(".*"))  # nothing half written
    again = train("resnet", tmp_path / "again", 3, precision="fp32", resume=tmp_path / "more")
    assert again.epoch == alone.epoch == 3 and set(CUTS) < set(again.plan.cuts)


def test_a_rank_that_hangs_ends_the_run_on_all(tmp_path: Path) -> None:
    """Its process too, with the line that the others have."""
    (first, _, said), (other, errors, nothing) = ranks(2, "hangs", tmp_path)
    line = "[pipeline] rank 1, stage 1 (layers 2-3): hangs: no progress in 3 s"
    assert (first, other, nothing) == (0, 2, None)
    assert said["error"] == line and said["kind"] == "StageFailed" and 3 < said["seconds"] < 15
    assert [e for e in errors.splitlines() if e.startswith("ffengine")] == [f"ffengine: {line}"]
    train("tiny", tmp_path / "on", 3, precision="fp32", resume=tmp_path / "hangs")
    train("tiny", tmp_path / "alone", 3, precision="fp32")
    on, alone = (checkpoint.load(tmp_path / name).tensors for name in ("on", "alone"))
    assert all(torch.equal(t, on[name]) for name, t in alone.items())


def refusal(name: str, stages: int = 2, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"^\[pipeline\] ") as error:
        Pipeline(stages).check(ff.models.create(name, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_networks_that_cannot_be_cut_are_refused_with_the_reason() -> None:
    small = {"in_channels": 1, "image_size": 8}
    assert "at most 4, one a layer, got 5" in refusal("deeperforward/tinycnn", 5, **small)
    assert "a loss trains the layer before its own too" in refusal(
        "trifecta/shallow", image_size=8, in_channels=1, widths=(8,) * 6)
    assert "trains one layer at a time" in refusal("sn/mlp", image_size=8)
    assert "its layers see the layers above" in refusal("fflib/ffrnn", image_size=8, layers=(9, 9))
    assert "one loss trains all its layers" in refusal("bp/deeperforward/tinycnn", **small)
    assert "by a pass of its own" in refusal("fflib/ffnn-c", image_size=8, layers=(9, 9))
    assert "by the goodness of all layers" in refusal("fflib/ffnn", image_size=8, layers=(9, 9),
                                                      negatives="hardest")
    Pipeline(2).check(network())
    for wrong in ({"stages": 0}, {"stages": 2, "queue": 17}, {"stages": 2, "timeout": 0.0},
                  {"stages": 2, "layers": (1, 2)}):
        with pytest.raises(ValueError, match=r"^\[pipeline\] \w+ expected .*, got "):
            Pipeline(**wrong).check(network())  # type: ignore[arg-type]


def test_a_stage_receives_what_the_one_before_sends() -> None:
    """Every cut of a ResNet: maps and live shortcuts; together the stages are the program."""
    net, plan = build("resnet"), plan_of("resnet", "fp32")
    schedule = of(net, None)
    schedule.begin(net, 1)
    depth = len(net.layers)
    facts = Facts(Turn(tuple(range(depth)), depth), 16)
    whole = schedule.program(net, plan, facts)
    travels = {}
    for cut in (4, 11):  # where the plan cuts: elsewhere a tile would go through two stages
        stages = [staged(whole, net, facts, piece_of(net, layers))
                  for layers in (range(cut), range(cut, depth))]
        last, first = stages[0].parts[-1], stages[1].parts[0]
        assert isinstance(last, Instruction) and isinstance(first, Instruction)
        assert (last.op, first.op) == ("send", "receive")
        assert [role for role, _ in last.reads] == list(first.writes)
        travels[cut] = list(first.writes)
        lines = [[(part.op, part.index) for part in flat(program)] for program in (*stages, whole)]
        assert lines[0][:-1] + lines[1][1:] == lines[2]
    assert travels == {4: ["x3", "x4"], 11: ["x11"]}
    with pytest.raises(ValueError, match="expected tiles of one stage's layers"):
        staged(whole, net, facts, piece_of(net, range(5)))


def flat(program: Program) -> list[Instruction]:
    """All instructions."""
    return [line for part in program.parts
            for line in (part.lines if isinstance(part, Loop) else [part])]


def test_the_slowest_stage_is_as_fast_as_can_be() -> None:
    seconds = [3.0, 1.0, 1.0, 1.0, 4.0, 2.0]

    def anything(stage: int, layers: range) -> bool:
        return True

    assert balance.balanced([seconds] * 2, anything) == [range(4), range(4, 6)]
    assert balance.balanced([seconds] * 3, anything) == [range(3), range(3, 5), range(5, 6)]
    # a device twice as fast takes more of the layers
    assert balance.balanced([seconds, [s / 2 for s in seconds]], anything) == [
        range(2), range(2, 6)]
    # and one with little memory what fits it
    assert balance.balanced([seconds] * 2, lambda stage, layers: stage == 1 or len(
        layers) < 3) == [range(2), range(2, 6)]
    assert balance.balanced([seconds] * 2, lambda stage, layers: len(layers) < 3) is None
