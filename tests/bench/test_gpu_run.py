"""bench/gpu.sh's deadline, stages and exit status, with stages that do what a test wants."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as program
from bench.gpu import plan
from bench.gpu.run import DONE, FAILED, INCOMPLETE, LEAST_SECONDS, Run, Stage

ROOT = Path(__file__).parents[2]
#: Modules that stand for stages; each gets the words of every stage.
MODULES = {
    "fine": "print('first'); print('right')",
    "wrong": "import sys; print('tried'); sys.stderr.write('went wrong\\n'); sys.exit(1)",
    "hangs": "import subprocess, sys, time\n"
             "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
             "print('begun', flush=True); time.sleep(60)",
    "deaf": "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    "short": "import sys; print('half of it'); sys.exit(3)",
    "words": "import os, sys\nprint(os.environ.get('INTERPRETED'), sys.argv[1:4])\n"
             "print(sys.argv[-2:])",
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    for folder in ("out", "scratch"):
        (tmp_path / folder).mkdir()
    return Run(deadline=1000.0, python=sys.executable, root=tmp_path, out=tmp_path / "out",
               scratch=tmp_path / "scratch", groups={"pair": 100.0},
               environment={**os.environ, "PYTHONPATH": str(tmp_path)})


def summary(run: Run) -> str:
    return (run.out / "summary.txt").read_text()


def test_a_stage_that_goes_well(run: Run) -> None:
    (outcome,) = run.slot([Stage("one", 30.0, "fine")])
    assert (outcome.kind, run.status) == ("ok", DONE)
    assert summary(run).splitlines()[0].split()[:2] == ["one", "ok"]
    assert summary(run).splitlines()[1:] == ["  first", "  right"]


def test_a_stage_that_fails_shows_why_and_the_next_one_runs(run: Run) -> None:
    run.slot([Stage("one", 30.0, "wrong")])
    run.slot([Stage("two", 30.0, "fine")])
    assert run.status == FAILED
    assert "FAILED (1)" in summary(run) and "! went wrong" in summary(run)
    assert [o.kind for o in run.outcomes] == ["failed", "ok"]


@pytest.mark.parametrize("module", ["hangs", "deaf"])
def test_a_stage_past_its_limit_is_ended_with_all_it_started(run: Run, module: str) -> None:
    begun = time.monotonic()
    (outcome,) = run.slot([Stage("one", 2.0, module)])
    assert time.monotonic() - begun < 30.0
    assert (outcome.kind, run.status) == ("late", INCOMPLETE)
    assert "TIMED OUT (2 s)" in summary(run)
    if module == "hangs":
        assert "  begun" in summary(run), "what it printed before is kept"
        assert not left_in(run.root), "its child is gone too"


def left_in(folder: Path, seconds: float = 5.0) -> list[str]:
    """Processes that still work in a folder when they had the time to go."""
    end = time.monotonic() + seconds
    while (found := living(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def living(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if entry.resolve() == folder and entry.parent.name != str(os.getpid()):
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


def test_a_stage_gets_what_is_left(run: Run) -> None:
    run.end = time.monotonic() + LEAST_SECONDS + 1.5
    (outcome,) = run.slot([Stage("one", 100.0, "words")])
    assert "--seconds" in outcome.said[1]
    seconds = float(outcome.said[1].split("'")[3])
    assert LEAST_SECONDS - 3 < seconds < LEAST_SECONDS + 1.5


def test_no_time_left_is_a_skip_by_name(run: Run) -> None:
    run.end = time.monotonic() + LEAST_SECONDS - 1
    (outcome,) = run.slot([Stage("one", 100.0, "fine")])
    assert outcome.kind == "skipped" and run.status == INCOMPLETE
    assert "one          skipped: 14 s left" in summary(run)
    run.outcomes.clear()
    run.slot([Stage("rest", 100.0, "fine", rest=True)])
    assert run.status == DONE, "what takes the rest may find none"


def test_a_stage_that_stops_by_itself_is_no_failure(run: Run) -> None:
    run.slot([Stage("one", 30.0, "short")])
    assert run.status == INCOMPLETE and "cut short" in summary(run)


def test_a_group_shares_its_seconds(run: Run) -> None:
    run.left_of["pair"] = 3.0
    run.slot([Stage("one", 2.0, "hangs", group="pair")])
    assert run.left_of["pair"] < 1.1
    (outcome,) = run.slot([Stage("two", 60.0, "fine", group="pair")])
    assert outcome.kind == "skipped"


def test_a_slot_runs_side_by_side(run: Run) -> None:
    begun = time.monotonic()
    run.slot([Stage("one", 8.0, "hangs"), Stage("two", 8.0, "hangs"), Stage("three", 60.0, "fine")])
    assert time.monotonic() - begun < 15.0
    assert [o.kind for o in run.outcomes] == ["late", "late", "ok"]


def test_a_rehearsal_is_told_to_every_stage(run: Run) -> None:
    stage = Stage("one", 30.0, "words", options=("--own",), rehearsed={"INTERPRETED": "yes"})
    assert "--rehearse" not in run.slot([stage])[0].said[0]
    run.rehearse, run.patience = True, 2.0
    said = run.slot([stage])[0].said[0]
    assert said == "yes ['--own', '--rehearse', '--out']"


def test_the_plan() -> None:
    names = [stage.name for slot in plan.chosen(None) for stage in slot]
    assert names == ["build", "smoke", "test", "sanitize", "local_pass", "step", "compiled",
                     "memory", "ncu", "fp32"]
    files = {f for slot in plan.chosen(None) for stage in slot for f in stage.files}
    assert {*files, "summary.txt"} == set(plan.FILES) and len(plan.FILES) == 8
    fixed = sum(max(s.seconds for s in slot) for slot in plan.chosen(None)
                if not slot[0].group and not slot[0].rest) + sum(plan.GROUPS.values())
    assert fixed <= plan.DEADLINE - 30, "some is left for what takes the rest"
    assert [[s.name for s in slot] for slot in plan.chosen("sanitize build")] == [
        ["build"], ["sanitize"]]


def command(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *words], capture_output=True, text=True,
        check=False, env={**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable,
                          "CUDA_VISIBLE_DEVICES": "", **environment})


@pytest.mark.parametrize(("words", "environment", "said"), [
    (["--rehears"], {}, "expected --rehearse or nothing, got '--rehears'"),
    (["smoke"], {}, "expected --rehearse or nothing, got 'smoke' (STAGES=... picks stages)"),
    ([], {"STAGES": "build smok"}, "STAGES expected some of build, smoke, "),
    ([], {"DEADLINE": "soon"}, "DEADLINE expected seconds, got 'soon'"),
    ([], {"DEADLINE": "-1"}, "DEADLINE expected seconds, got '-1'"),
])
def test_bad_input_is_one_line(tmp_path: Path, words: list[str], environment: dict[str, str],
                               said: str) -> None:
    done = command(tmp_path, *words, **environment)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_without_a_device_nothing_is_done(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 2
    assert "gpu.sh: expected a CUDA device that torch can use, got none" in done.stdout
    assert "build" not in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(plan.FILES)


def test_an_interrupted_run_leaves_nothing_running(tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text(MODULES["hangs"])
    (tmp_path / "fine.py").write_text(
        "import json, sys; from pathlib import Path\n"
        "(Path(sys.argv[sys.argv.index('--scratch') + 1]) / 'facts.json').write_text('{}')")
    script = (
        "import sys; from bench.gpu import __main__ as m, plan; from bench.gpu.run import Stage\n"
        "from pathlib import Path\n"
        "plan.FACTS = Stage('facts', 30.0, 'fine'); m.ROOT = Path.cwd()\n"
        "plan.SLOTS = ((Stage('hangs', 60.0, 'hangs'),),); sys.exit(m.main([]))")
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.DEVNULL,
        env={**os.environ, "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path),
             "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))})
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("ffengine-gpu-*/hangs.out")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert not left_in(tmp_path)
    assert not list(tmp_path.glob("ffengine-gpu-*")), "the scratch folder is gone"
    assert "interrupted" in (tmp_path / "out" / "summary.txt").read_text()


def test_the_environment_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = program.environment(tmp_path, rehearse=False)
    assert "TRITON_INTERPRET" not in found, "a GPU's run compiles"
    assert found["FFENGINE_CACHE"].startswith(str(tmp_path)) and "fakes" not in found["PATH"]
    rehearsed = program.environment(tmp_path, rehearse=True)
    assert rehearsed["CUDA_VISIBLE_DEVICES"] == ""
    assert rehearsed["PATH"].split(os.pathsep)[0] == str(ROOT / "bench" / "gpu" / "fakes")
