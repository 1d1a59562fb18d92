"""A stage's rows survive whatever happens to the process that measures them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import records
from bench.gpu.records import Records

ROOT = Path(__file__).parents[2]
#: A stage whose jobs do what their names say.
STAGE = '''
import os, signal, sys, time
from bench.gpu.session import Session
from bench.gpu.work import worker

def wrong():
    yield {"name": "one of wrong", "text": "fine"}
    raise ValueError("not\\n  right")

def told():
    yield {"check": "failed", "error": "told"}

def dies():
    yield {"name": "before dies"}
    os.kill(os.getpid(), signal.SIGSEGV)

def loses():
    Session.lives = lambda self: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

JOBS = {"good": lambda: [{"value": float("nan")}], "wrong": wrong, "told": told, "dies": dies,
        "loses": loses, "hangs": lambda: time.sleep(60), "last": lambda: [{}],
        "slow": lambda: time.sleep(60)}

def jobs(session, args):
    for name in args.names.split(","):
        yield name, JOBS[name]

if __name__ == "__main__":
    sys.exit(worker(None, jobs, names={"required": True}))
'''
FACTS = {"kind": "rehearsal", "gpu": None}


class Stage:
    """Runs the stage under the supervisor."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        for made in (self.out, folder / "scratch"):
            made.mkdir()
        (folder / "stage.py").write_text(STAGE)
        (folder / "scratch" / "facts.json").write_text(json.dumps(FACTS))
        self.said = ""

    def run(self, jobs: str, *words: str, limit: float = 30, seconds: float = 60) -> int:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu.jobs", "stage", "--file", "rows.jsonl", "--record",
             "stage", "--limit", str(limit), "--seconds", str(seconds), "--rehearse", "--out",
             str(self.out), "--scratch", str(self.folder / "scratch"), "--names", jobs, *words],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(self.folder)))})
        self.said = done.stdout
        return done.returncode

    def rows(self) -> dict[str, tuple[str, str | None]]:
        return {r["name"]: (r["check"], r.get("error")) for r in self.raw()}

    def raw(self) -> list[dict[str, Any]]:
        return records.read(self.out / "rows.jsonl")[1]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_an_exception_is_a_row_and_the_others_are_measured(stage: Stage) -> None:
    assert stage.run("good,wrong,told,last") == 1
    assert stage.rows() == {
        "good": ("ok", None), "one of wrong": ("ok", None),
        "wrong": ("failed", "ValueError: not right"), "told": ("failed", "told"),
        "last": ("ok", None)}
    assert "3 ok, 2 failed" in stage.said and "wrong: failed: ValueError: not right" in stage.said


def test_a_process_that_dies_costs_one_row(stage: Stage) -> None:
    assert stage.run("good,dies,last") == 1
    assert stage.rows() == {"good": ("ok", None), "before dies": ("ok", None),
                            "dies": ("failed", "the process died: SIGSEGV"), "last": ("ok", None)}
    assert len(stage.raw()) == 4, "what went well is not measured again"
    assert "after dies another process goes on" in stage.said


def test_a_lost_context_is_left_with_its_process(stage: Stage) -> None:
    assert stage.run("good,loses,last") == 1
    rows = stage.rows()
    assert rows["loses"][0] == "failed" and "illegal memory access" in str(rows["loses"][1])
    assert rows["last"] == ("ok", None)


def test_rows_that_are_compared_are_measured_again_together(stage: Stage) -> None:
    assert stage.run("good,dies,last", "--together") == 1
    assert [r["name"] for r in stage.raw()] == ["good", "before dies", "dies", "good", "last"]


def test_a_job_without_an_answer(stage: Stage) -> None:
    begun = time.monotonic()
    assert stage.run("good,hangs,last", limit=2) == 1
    assert time.monotonic() - begun < 45
    assert stage.rows()["hangs"] == ("failed", "no answer in 6 s")  # it is a rehearsal
    assert stage.rows()["last"] == ("ok", None)


def test_out_of_time_in_a_job(stage: Stage) -> None:
    assert stage.run("good,slow,last", limit=60, seconds=8) == 3
    assert stage.rows() == {"good": ("ok", None), "slow": ("cut", "the stage's time was over")}


def test_out_of_time_between_jobs(stage: Stage) -> None:
    stage.folder.joinpath("stage.py").write_text(STAGE.replace(
        "def jobs(session, args):", "def jobs(session, args):\n    session.end = 0.0"))
    assert stage.run("good,last") == 3
    assert "no time for good, last" in stage.said and not stage.rows()


def test_a_stage_that_cannot_start_is_a_row(stage: Stage) -> None:
    assert stage.run("nothing") == 1
    assert stage.rows() == {"start": ("failed", "exit status 1")}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    made = Records(path, {**FACTS, "pair": (1, 2)})
    made.add("step", name="a", seconds=1.5, odd=float("inf"))
    Records(path, {"kind": "another"}).add("step", name="b", seconds=2.5)
    return path


def test_rows_come_back_as_they_were(written: Path) -> None:
    facts, rows = records.read(written)
    assert facts == {"record": "facts", "format": 1, **FACTS, "pair": [1, 2]}
    assert rows == [{"record": "step", "name": "a", "seconds": 1.5, "odd": None},
                    {"record": "step", "name": "b", "seconds": 2.5}]


def test_a_line_that_a_kill_cut_off_is_dropped(written: Path) -> None:
    whole = written.read_text()
    written.write_text(whole + '{"record": "st')
    assert len(records.read(written)[1]) == 2
    Records(written, FACTS).add("step", name="c")
    assert [r["name"] for r in records.read(written)[1]] == ["a", "b", "c"]


@pytest.mark.parametrize("edit", [
    lambda lines: [lines[0], lines[1].replace("1.5", "1.4"), lines[2]],
    lambda lines: [lines[0], lines[2]], lambda lines: [lines[1], lines[2]],
    lambda lines: [lines[0], lines[2], lines[1]],
    lambda lines: [lines[0].replace("rehearsal", "gpu"), *lines[1:]],
], ids=["a number", "a row gone", "no facts", "another order", "the kind"])
def test_what_was_edited_is_refused(written: Path, edit: Any) -> None:
    written.write_text("".join(edit(written.read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=r"^\[records\] .*") as refused:
        records.read(written)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "said"), [
    ("", "expected facts on the first line, got nothing"), ("{}\n", "expected a run's JSON lines"),
    ("[1]\n", "expected a run's JSON lines"), ("{\n", "expected a run's JSON lines")])
def test_no_rows_at_all(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        records.read(path)


def test_another_kind_or_format(tmp_path: Path) -> None:
    Records(tmp_path / "a", {"kind": "guess"})
    with pytest.raises(ValueError, match="expected kind gpu or rehearsal, got 'guess'"):
        records.read(tmp_path / "a")


def test_the_latest_row_of_a_name_counts() -> None:
    rows = [{"record": "step", "name": "a", "v": 1}, {"record": "step", "name": "b", "v": 2},
            {"record": "step", "name": "a", "v": 3}, {"record": "other", "name": "a", "v": 4}]
    assert [r["v"] for r in records.latest(rows)] == [3, 2, 4]
