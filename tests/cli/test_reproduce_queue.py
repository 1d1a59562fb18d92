"""`ffengine reproduce` over days: killed and resumed, shared between processes, within hours."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ffengine import data, sealed
from ffengine.cli import main, parser
from ffengine.commands import reproduce
from ffengine.commands.reproduction import budget, queue, tables, training
from ffengine.commands.reproduction.results import Results
from ffengine.engine.run.checkpoint import LATEST
from ffengine.locks import locked

ROOT = Path(__file__).parents[2]
QUEUE = ["sn-mlp-mnist-pvn-last", "sn-mlp-mnist-pvn-highest", "fflib-ffnn-mnist", "--seeds", "2",
         "--epochs", "3", "--data", "digits", "--backend", "reference"]
SMALL = ["--set", "widths=(10,10,10,10)", "--set", "image_size=4", "--batch-size", "256",
         "--backend", "reference", "--data", "digits"]


@pytest.fixture(autouse=True)
def an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FFENGINE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def started(*words: str) -> subprocess.Popen[str]:
    """A process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ffengine", "reproduce", *words, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows_of(process: subprocess.Popen[str]) -> list[dict]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])["rows"]


def told(capsys, *words: str) -> tuple[int, str, str]:
    """(status, standard output, standard error), in this process."""
    status = main(["reproduce", *words])
    return status, *capsys.readouterr()


def measured(rows: list[dict]) -> list[tuple]:
    """What does not depend on the clock."""
    return [(r["recipe"], r["seeds"], r["accuracies"], r["mean"], r["sd"], r["epochs"])
            for r in rows]


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.01)


def epochs_of(folder: Path) -> int:
    """Epochs that all trainings in a folder have finished."""
    return sum(len(path.read_text().splitlines()) - 1 for path in folder.rglob("history.csv"))


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_table(tmp_path):
    """SIGKILL after every fifth epoch, parent and workers; what is finished stays as it is."""
    whole = rows_of(started(*QUEUE, "--out", "whole", "--jobs", "2"))
    again, kills, done, runs = tmp_path / "again", 0, 0, {}
    words = [*QUEUE, "--out", "again", "--jobs", "2"]
    while True:
        process = started(*words)
        until(lambda p=process, n=done: p.poll() is not None or epochs_of(again) >= n + 5)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(1)  # the workers look for their parent twice a second
        kills, done = kills + 1, epochs_of(again)
        time.sleep(1)
        assert epochs_of(again) == done, "a worker outlived its parent"
        found = Results(again / "reproduction.json").runs()
        assert all(found[place] == run for place, run in runs.items())
        runs = found
        words = ["--resume", "--out", "again"]
    assert kills >= 2
    assert measured(rows_of(process)) == measured(whole)
    assert [r["seeds"] for r in whole] == [[0, 1]] * 3


@pytest.mark.slow
def test_two_processes_on_one_results_file_lose_nothing(tmp_path):
    """They share the same queue, and a third adds recipes of its own meanwhile."""
    words = [*QUEUE, "--out", "shared", "--jobs", "1"]
    first, second = started(*words), started(*words)
    third = started("sn-mlp-mnist-cwc-last", *QUEUE[3:], "--out", "shared", "--jobs", "1")
    rows, others, own = (rows_of(process) for process in (first, second, third))
    assert rows == others and [r["seeds"] for r in rows + own] == [[0, 1]] * 4
    held = Results(tmp_path / "shared" / "reproduction.json").read()
    assert len(held["runs"]) == 6 and len(held["rows"]) == 4
    trained = list((tmp_path / "shared" / "reproduce").glob("*/history.csv"))
    assert len(trained) == 6, "a seed was trained twice"
    assert all(len(path.read_text().splitlines()) - 1 in (3, 6) for path in trained)


def test_ctrl_c_keeps_what_is_under_way(tmp_path):
    process = started("fflib-ffnn-mnist", *QUEUE[3:], "--epochs", "500", "--out", "long",
                      "--jobs", "2")
    until(lambda: epochs_of(tmp_path / "long") >= 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("ffengine: ") and "interrupted" in err.splitlines()[-1]
    assert len(list((tmp_path / "long" / "reproduce").rglob(LATEST))) == 2


def test_nothing_is_trained_twice(capsys, monkeypatch):
    """Not with more seeds, not by another reading of the same training, not after all is done."""
    trained, train = [], training.train

    def counted(job, cases, *rest):
        trained.append((cases[-1].file.name, job.seed))
        return train(job, cases, *rest)

    monkeypatch.setattr(training, "train", counted)
    words = ["--epochs", "1", "--data", "digits", "--backend", "reference", "--quiet", "--jobs",
             "1", "--json"]
    last, highest = "sn-mlp-mnist-pvn-last", "sn-mlp-mnist-pvn-highest"
    assert told(capsys, last, *words, "--seeds", "1")[0] == 0
    assert told(capsys, highest, *words, "--seeds", "2")[0] == 0
    assert trained == [(last, 0), (highest, 1)]
    assert told(capsys, last, highest, *words, "--seeds", "1,0")[0] == 0 and len(trained) == 2
    assert told(capsys, last, *words, "--seeds", "1", "--lr", "0.5")[0] == 0
    assert trained[2:] == [(last, 0)], "another rate is another training"


def test_a_row_asked_for_after_its_epoch_had_passed_takes_a_training_of_its_own(
        capsys, monkeypatch, tmp_path):
    """A long training stands behind the epoch of a shorter recipe that nobody had asked for."""
    args = parser().parse_args(["reproduce", "x", *SMALL, "--quiet", "--jobs", "1", "--out", "o"])
    cases = []
    for epochs in (1, 3):
        args.epochs = epochs
        cases += [reproduce.case_of(args, reproduce.chosen(["deeperforward-tinycnn-cifar10"])[0])]
    args.epochs = None
    with pytest.raises(KeyboardInterrupt):
        training.attempt(training.Job(args, (cases[1],), 0), stopped=lambda: epochs_of(
            tmp_path / "o") >= 2)
    both = training.Job(args, tuple(cases), 0)
    assert training.attempt(both) == (training.DONE, "") and both.missing() == []
    runs = both.results.runs()
    assert sorted(run["epochs"] for run in runs.values()) == [1, 3]
    assert len(list((tmp_path / "o" / "reproduce").glob("*/" + LATEST))) == 2


def test_a_training_that_another_process_holds_is_left_to_it(tmp_path):
    args = parser().parse_args(["reproduce", "x", *SMALL, "--epochs", "1", "--quiet", "--out", "o"])
    case = reproduce.case_of(args, reproduce.chosen(["deeperforward-tinycnn-cifar10"])[0])
    job = training.Job(args, (case,), 0)
    with locked(job.folder(case)) as mine:
        assert mine and training.attempt(job)[0] == training.BUSY
    assert training.attempt(job) == (training.DONE, "")


def test_what_does_not_fit_any_more_stops_and_goes_on_later(capsys, tmp_path):
    args = parser().parse_args(["reproduce", "x", *SMALL, "--epochs", "3", "--quiet", "--out", "o"])
    case = reproduce.case_of(args, reproduce.chosen(["deeperforward-tinycnn-cifar10"])[0])
    job = training.Job(args, (case,), 0)
    assert training.attempt(job, deadline=time.time())[0] == training.LATE
    assert epochs_of(tmp_path / "o") == 1 and budget.done(job.folder(case)) == pytest.approx(1 / 3)
    costs = budget.Costs(args, [])
    assert costs.seconds(job) is None
    costs.measure([job], 1, lambda text: None)
    measured = costs.seconds(job)
    assert 0 < measured < 60 and budget.Costs(args, []).seconds(job) == measured
    assert training.attempt(job) == (training.DONE, "") and epochs_of(tmp_path / "o") == 3
    costs.learn(job)
    assert costs.seconds(job) == 0


def test_a_training_goes_on_with_the_threads_that_it_began_with(monkeypatch):
    """Others add up in another order."""
    args = parser().parse_args(["reproduce", "x", *SMALL, "--epochs", "2", "--quiet", "--out", "o"])
    case = reproduce.case_of(args, reproduce.chosen(["deeperforward-tinycnn-cifar10"])[0])
    job, counts, tested_at = training.Job(args, (case,), 0), [], training.tested_at

    def counted(*words):
        counts.append(torch.get_num_threads())
        return tested_at(*words)

    monkeypatch.setattr(training, "tested_at", counted)
    with training.threads(1):
        assert training.attempt(job, deadline=time.time())[0] == training.LATE
    with training.threads(2):
        assert training.attempt(job)[0] == training.DONE and torch.get_num_threads() == 2
    assert counts == [1, 1]


def test_data_stay_on_the_device_that_trains_on_them():
    splits = data.load("digits")
    assert training.resident(splits, torch.device("cpu")) is splits
    moved = training.resident(splits, torch.device("meta"))
    assert {part.device.type for part in (moved.train, moved.valid, moved.test)} == {"meta"}


def test_hours_cover_most_papers_first(capsys, monkeypatch, tmp_path):
    """A row of each paper before a second one, the quick ones first; then further seeds."""
    def jobs(*names: str) -> list[argparse.Namespace]:
        return [argparse.Namespace(cases=[argparse.Namespace(file=argparse.Namespace(
            name=name, paper=name[0]))]) for name in names]

    asked = jobs("a1", "a1", "a2", "b1", "b2", "c1")
    seconds = [10.0, 10.0, 20.0, 30.0, 5.0, 100.0]
    assert budget.choose(asked, seconds, 200, 1) == [4, 0, 5, 2, 3, 1]
    assert budget.choose(asked, seconds, 60, 1) == [4, 0, 2, 1]
    assert budget.choose(asked, seconds, 100, 2) == [4, 0, 2, 3, 1]
    assert budget.choose(asked, seconds, 3, 4) == []
    assert budget.choose(asked, [0.0, *seconds[1:]], 15, 1) == [0, 4, 1], "finished ones are free"

    monkeypatch.setattr(budget, "epoch_seconds", lambda job: 3600.0 * (
        1 if job.cases[-1].file.name.endswith("pvn-last") else 9))
    words = [*QUEUE[3:5], "--epochs", "1", "--data", "digits", "--backend", "reference", "--jobs",
             "1", "--json"]
    status, out, err = told(capsys, "sn-mlp-mnist-pvn-last", "fflib-ffnn-mnist", *words,
                            "--budget-hours", "3")
    assert status == 0 and "2 of 4 trainings fit into 3 h; papers: sn" in err
    assert [r["recipe"] for r in json.loads(out)["rows"]] == ["sn-mlp-mnist-pvn-last"]
    status, out, err = told(capsys, "fflib-ffnn-mnist", *words, "--budget-hours", "3", "--quiet")
    assert status == 2 and "at least 9" in err and err.count("\n") == 1


def test_each_row_has_a_line_with_the_time_left(capsys):
    status, _, err = told(capsys, "deeperforward-tinycnn-cifar10", *SMALL, "--epochs", "2",
                          "--seeds", "2", "--jobs", "1")
    assert status == 0
    lines = [line for line in err.splitlines() if "epoch 2/2" in line]
    assert len(lines) == 2 and all("s an epoch, 0 s left" in line for line in lines)
    assert "seed 0: done; 1 to go, about" in err and "seed 1: done; 0 to go" in err


@pytest.mark.parametrize(("seconds", "text"), [
    (12.4, "12 s"), (200, "3 min"), (7500, "2 h 5 min"), (273600, "3 d 4 h")])
def test_time_left_in_words(seconds, text):
    assert queue.duration(seconds) == text


def test_joint_standard_errors():
    assert tables.joint_error(0.3, 9, 0.4, 4) == pytest.approx((0.01 + 0.04) ** 0.5)
    assert tables.joint_error(0.3, 1, None, 1) == pytest.approx(0.3 * 2 ** 0.5)
    assert tables.joint_error(None, 1, 0.4, 4) == pytest.approx(0.4 * 1.25 ** 0.5)
    assert tables.joint_error(None, 1, None, 1) is None
    row = {"paper_sd": 0.3, "paper_runs": 9, "sd": 0.4, "seeds": [0, 1, 2, 3], "difference": -1.0}
    assert tables.in_errors(row) == pytest.approx(-1 / 0.05 ** 0.5)


def damaged(path: Path, kind: str) -> None:
    good = {"kind": "reproduction", "format": 1, "version": "0", "machine": {}, "rows": [],
            "runs": []}
    changes = {"other": {"kind": "fair"}, "later": {"format": 9}}
    sealed.write(path, {**good, **changes.get(kind, {})})
    text = path.read_bytes()
    if kind == "half":
        path.write_bytes(text[:len(text) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "edited":
        path.write_text(path.read_text().replace('"rows": []', '"rows": [1]'))
    elif kind == "noise":
        path.write_bytes(b"\xff\xfe" + os.urandom(40))


@pytest.mark.parametrize(("kind", "text"), [
    ("half", "expected a result file"), ("empty", "expected a result file"),
    ("noise", "expected a result file"), ("edited", "edited by hand"),
    ("other", "expected kind reproduction, got 'fair'"), ("later", "expected format 1, got 9")])
@pytest.mark.parametrize("words", [
    ["deeperforward-tinycnn-cifar10", *SMALL, "--epochs", "1", "--jobs", "1"], ["--report"]],
    ids=["train", "report"])
def test_a_damaged_results_file_is_refused(capsys, tmp_path, kind, text, words):
    path = tmp_path / "o" / "reproduction.json"
    damaged(path, kind)
    before = path.read_bytes()
    status, out, err = told(capsys, *words, "--out", "o")
    assert status == 2 and out == "" and err.startswith("ffengine: [results]")
    assert text in err and "reproduction.json" in err and err.count("\n") == 1
    assert path.read_bytes() == before
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["reproduction.json"]


@pytest.mark.parametrize(("words", "text"), [
    (["--resume"], "--resume expected a recipe, or a queue that was begun in runs"),
    (["--report", "fflib"], "--report expected no recipe"),
    (["--report"], "ffengine reproduce RECIPE"),
    (["fflib-ffnn-mnist", "--jobs", "0"], "--jobs expected 1 or more, got 0"),
    (["fflib-ffnn-mnist", "--budget-hours", "0"], "--budget-hours expected more than 0, got 0"),
    (["fflib-ffnn-mnist", "--budget-hours", "nan"], "--budget-hours expected more than 0"),
])
def test_refusals(capsys, tmp_path, words, text):
    status, out, err = told(capsys, *words, "--quiet")
    assert status == 2 and text in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


def test_resume_alone_takes_no_other_flags(capsys):
    words = ["deeperforward-tinycnn-cifar10", *SMALL, "--epochs", "1", "--jobs", "1", "--quiet"]
    status, out, _ = told(capsys, *words)
    assert status == 0
    status, again, err = told(capsys, "--resume")
    assert status == 0 and again == out and err == ""
    status, _, err = told(capsys, "--resume", "--epochs", "2")
    assert status == 2 and "--resume goes on with epochs 1, got 2" in err
