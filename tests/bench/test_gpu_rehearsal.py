"""The whole of bench/gpu.sh without a GPU, and what it makes of tests and calls that go wrong.

Not part of `make test`: a stage of .ci/run of its own (`pytest -m rehearsal`).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import ncu, pages, plan, records, suite
from tests.bench.gpu_stage import FACTS, ROOT, Stage

pytestmark = pytest.mark.rehearsal
#: Processor seconds that a rehearsal may take, to end in 180 s on two cores (a quiet machine: 100).
LIMIT = 270.0
TESTS = '''
import os, signal, time
import pytest, torch

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("kept")
    yield made
    (made.parent / "gone").touch()

@pytest.mark.parametrize("i", range(8))
@pytest.mark.gpu
def test_fine(i, folder):
    assert folder.exists() and not (folder.parent / "gone").exists()
'''
PLANTED = {
    "wrong": "def test_wrong():\n    assert 1 + 1 == 3, 'planted'\n",
    "dies": "def test_dies():\n    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "loses": "def test_loses(monkeypatch):\n    from bench.gpu import pool\n"
             "    pool.context_lives = lambda: False\n    raise RuntimeError('CUDA error')\n",
    "hangs": "def test_hangs():\n    import time\n    time.sleep(60)\n",
    "unreadable": "import no_such_module\n",
}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def children_seconds() -> float:
    """Of processors, of all processes that this one started and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a rehearsal that went well, in time."""
    out, before = tmp_path_factory.mktemp("run") / "out", children_seconds()
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), "--rehearse"], capture_output=True, text=True,
        check=False, env={**os.environ, "OUT": str(out), "PYTHON": sys.executable})
    took = children_seconds() - before
    assert done.returncode == 0, done.stdout + done.stderr
    assert took <= LIMIT, f"a rehearsal took {took:.0f} s"
    return out


def test_the_files_are_these_and_no_others(rehearsal: Path) -> None:
    assert {p.name for p in rehearsal.iterdir()} == set(plan.FILES)
    assert all(p.stat().st_size for p in rehearsal.iterdir())
    assert not (ROOT / "ffengine" / "kernels").is_symlink(), "what was linked is gone"


def test_every_stage_ran_in_order(rehearsal: Path) -> None:
    names = [stage.name for slot in plan.chosen(None) for stage in slot]
    lines = [line.split() for line in (rehearsal / "summary.txt").read_text().splitlines()
             if not line.startswith(" ")]
    assert [line[0] for line in lines][:-1] == ["facts", *names]
    assert all(line[1] == "ok" for line in lines[:-1])


def test_every_row_is_right_and_says_where(rehearsal: Path) -> None:
    for name in ("smoke.jsonl", "local_pass.jsonl", "step.jsonl"):
        facts, rows = records.read(rehearsal / name)
        assert facts["kind"] == "rehearsal" and facts["commit"] and facts["isa"]
        assert rows and {r.get("check", "ok") for r in rows} <= {"ok", "absent"}
        assert {r["error"] for r in rows if r.get("check") == "absent"} <= {
            "the network is on cpu, not on a GPU"}


def test_the_rows_are_those_of_a_run(rehearsal: Path) -> None:
    rows = records.latest(records.read(rehearsal / "step.jsonl")[1])
    timed = {r["name"] for r in rows if r.get("rounds")}
    for kind in ("bf16", "fp32"):
        assert {f"{kind} {name}" for name in (
            "ours, cpu, default plan", "ours, triton, default plan", "ours, cpu, one tile",
            "bp plain", "eager step, expert")} <= timed
    assert {"bf16 bp plain, torch.compile", "bf16 ours, auto, default plan"} <= timed
    assert all(len(r["rounds"]) >= 3 for r in rows if r.get("rounds"))
    ours = [r for r in rows if r.get("rounds") and r["kind"] == "ffengine"]
    assert {r["backend"] for r in ours} == {"cpu", "triton", "auto"}
    assert all(r["gradient_error"] < 0.2 and r["tile"] and r["precision"] for r in ours)
    names = [r["name"] for r in rows if r["record"] == "memory"]
    assert names == ["bytes deeperforward/tinycnn", "bytes deeperforward/resnet17",
                     "bytes fflib/ffnn", "profile", "memory of orin-nano"]
    (run,) = [r for r in records.read(rehearsal / "smoke.jsonl")[1] if r["record"] == "run"]
    assert run["status"] == 0 and run["stages"][0]["name"] == "facts"


def test_a_rehearsal_is_never_printed_as_a_gpus(rehearsal: Path) -> None:
    for name in pages.FILES:
        with pytest.raises(ValueError, match="of a rehearsal without a GPU") as refused:
            pages.section(rehearsal / name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("what", "status", "said"), [
    ("tf32", 1, "tf32 expected a GPU, whose products it rounds"), ("devices", 0, "fflib/ffnn"),
    ("states", 0, "states")])
def test_stages_that_are_asked_for(what: str, status: int, said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), "--rehearse"], capture_output=True, text=True,
        check=False, env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable,
                          "STAGES": what})
    assert done.returncode == status and said in done.stdout, done.stdout


def suite_of(stage: Stage, *planted: str, seconds: float = 100, **environment: str) -> int:
    """Run the GPU test stage on a file of good tests and planted ones."""
    files = {"test_fine.py": TESTS, **{f"test_{name}.py": PLANTED[name] for name in planted}}
    for name, text in files.items():
        (stage.folder / name).write_text(text)
    paths = [str(stage.folder / name) for name in files]
    return stage.run("bench.gpu.suite", "--files", *paths, "--also", *paths, seconds=seconds,
                     **environment)


def log(stage: Stage) -> str:
    return (stage.out / "tests.log").read_text()


def test_tests_that_pass(stage: Stage) -> None:
    assert suite_of(stage) == 0
    assert "8 passed, 0 failed, 0 skipped, 0 not run, of 8 in 2 processes" in stage.said


def test_a_failing_test_is_in_the_log_with_its_reason(stage: Stage) -> None:
    assert suite_of(stage, "wrong") == 1
    assert "1 failed" in stage.said and "failed: " in stage.said
    assert "::test_wrong" in log(stage) and "planted" in log(stage)


def test_a_test_that_kills_its_process_costs_one_test(stage: Stage) -> None:
    assert suite_of(stage, "dies", "wrong") == 1
    assert "8 passed, 2 failed, 0 skipped, 0 not run, of 10 in 3 processes" in stage.said
    assert "the process died: SIGSEGV" in log(stage) and "planted" in log(stage)


def test_a_process_without_its_context_is_replaced(stage: Stage) -> None:
    assert suite_of(stage, "loses") == 1
    assert "8 passed, 1 failed, 0 skipped, 0 not run, of 9 in 3 processes" in stage.said


def test_out_of_time_names_the_test_in_hand(stage: Stage) -> None:
    assert suite_of(stage, "hangs", seconds=20) == 3
    assert "unfinished: " in stage.said and "::test_hangs" in log(stage)
    assert "1 not run" in stage.said


def test_a_file_that_cannot_be_collected_fails_and_the_others_run(stage: Stage) -> None:
    assert suite_of(stage, "unreadable") == 1
    assert "8 passed, 1 failed, 0 skipped, 0 not run, of 8" in stage.said
    assert "no_such_module" in log(stage)


def test_every_gpu_test_is_in_a_file_that_is_found() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-qq", "-m", "gpu",
                           "tests", "--ignore=tests/bench"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    marked = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert marked and marked <= set(suite.test_files())


def test_a_finding_is_in_the_summary_and_the_exit_status(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), "--rehearse"], capture_output=True, text=True,
        check=False, env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable,
                          "STAGES": "sanitize", "REHEARSED_FINDING": "racecheck"})
    assert done.returncode == 1
    assert "racecheck: 1 findings" in (tmp_path / "summary.txt").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"summary.txt", "sanitize.log"}


def sanitize(stage: Stage, finding: str, seconds: float = 300) -> int:
    return stage.run("bench.gpu.sanitize", seconds=seconds, REHEARSED_FINDING=finding)


def test_the_sanitizer_finds_nothing_but_what_was_planted(stage: Stage) -> None:
    assert sanitize(stage, "") == 0, stage.said
    memcheck, racecheck = stage.said.splitlines()
    assert memcheck.endswith(" 0 wrong, 0 not reached; a planted error was seen")
    assert racecheck.startswith("racecheck: 0 findings; ") and (
        racecheck.endswith(" calls right, 0 wrong, 0 not reached"))
    assert "========= ERROR SUMMARY: 1 errors" in (stage.out / "sanitize.log").read_text()


def test_a_finding_fails(stage: Stage) -> None:
    assert sanitize(stage, "memcheck") == 1
    assert "memcheck: 1 findings" in stage.said
    assert "Invalid __global__ read of size 4 bytes in the start" in stage.said


def test_counters_are_kept_and_read_back(stage: Stage) -> None:
    assert stage.run("bench.gpu.ncu") == 0
    assert "stats_kernel: 1,024 ns" in stage.said and "1 launches counted" in stage.said
    facts, (row,) = ncu.read(stage.out / "ncu.csv")
    assert facts == FACTS and row["Kernel Name"] == "stats_kernel"
    path = stage.out / "ncu.csv"
    path.write_text(path.read_text().replace("1,024", "1,023", 1))
    with pytest.raises(ValueError, match=r"^\[ncu\] .*edited by hand; measure it again$"):
        ncu.read(path)
