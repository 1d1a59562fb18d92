"""What bench/gpu.sh makes of compute-sanitizer, ncu and CMake, most of all when they go wrong."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import build as building
from bench.gpu import pool, tool
from bench.gpu.sanitize import Findings, our_kernels
from tests.bench.gpu_stage import ROOT, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def sanitize(stage: Stage, finding: str, seconds: float = 300) -> int:
    return stage.run("bench.gpu.sanitize", seconds=seconds, REHEARSED_FINDING=finding)


def test_a_device_that_the_sanitizer_refuses_is_told(stage: Stage) -> None:
    assert sanitize(stage, "refused") == 0
    assert stage.said == "memcheck: the tool refuses this device\n"


def test_findings_outlive_a_tool_that_is_stopped(stage: Stage) -> None:
    stage.program("compute-sanitizer", 'echo "case local_pass odd, cuda"\n'
                  'echo "========= Invalid __shared__ write of size 2 bytes"\nsleep 60')
    begun = time.monotonic()
    assert sanitize(stage, "", seconds=8) == 1
    assert time.monotonic() - begun < 40
    assert "memcheck: 1 findings; stopped in local_pass odd, cuda" in stage.said
    assert "Invalid __shared__ write" in (stage.out / "sanitize.log").read_text()


def heard(*lines: str) -> Findings:
    found = Findings("memcheck")
    for line in lines:
        found.hear(line)
    return found


def test_a_planted_error_that_is_not_seen_fails() -> None:
    found = heard("case one", "8 of 8 calls right, 0 wrong, 0 not reached", "case planted",
                  "========= ERROR SUMMARY: 0 errors")
    assert found.status == 1 and "a planted error was NOT seen" in found.said()[0]


@pytest.mark.parametrize(("lines", "status"), [
    (("8 of 9 calls right, 1 wrong, 0 not reached", "WRONG one: AssertionError: z"), 1),
    (("0 of 9 calls right, 0 wrong, 9 not reached",), 3),
    (("========= ERROR SUMMARY: 3 errors",), 1), (("STOPPED after 5 s",), 3), ((), 1)])
def test_what_a_tools_lines_say(lines: tuple[str, ...], status: int) -> None:
    assert heard("case one", *lines).status == status


def test_our_kernels_are_named() -> None:
    kernels = our_kernels()
    assert kernels[0] == "_ZN2ff" and {"stats_kernel", "apply_kernel", "optimizer_kernel",
                                       "batch_apply_kernel"} <= set(kernels)
    text = "".join(p.read_text() for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")))
    assert len(tool.GLOBAL.findall(text)) == text.count("__global__ ") > 10
    assert {"one_read", "optimizer_step"} <= set(tool.cuda_kernels())


def test_kernels_come_before_what_is_built_on_them() -> None:
    ids = ["tests/test_golden.py::test_golden_on_a_gpu[cafo_ce]", "tests/engine/test_store.py::a",
           "tests/test_golden.py::test_golden_on_a_gpu[df_vgg_full]", "tests/ops/test_a.py::a",
           "tests/kernels/test_a.py::a", "tests/cuda/test_a.py::a"]
    items = [SimpleNamespace(nodeid=i, path=Path(i.split("::")[0])) for i in ids]
    assert [i.nodeid for i in sorted(items, key=pool.rank)] == [ids[k] for k in (4, 5, 3, 1, 2, 0)]
    goldens = {path.stem for path in (ROOT / "tests" / "golden").glob("*.npz")}
    assert set(pool.LONGEST) <= goldens


def test_counters_that_nobody_may_read_are_told(stage: Stage) -> None:
    stage.program("ncu", 'echo "==PROF== Connected to process 1"\n'
                  'echo "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"')
    assert stage.run("bench.gpu.ncu") == 3
    assert "ERR_NVGPUCTRPERM" in stage.said and not (stage.out / "ncu.csv").exists()


def test_a_counted_call_that_fails(stage: Stage) -> None:
    stage.program("ncu", 'echo "WRONG optimizer, cuda: RuntimeError: no"')
    assert stage.run("bench.gpu.ncu") == 1 and "WRONG optimizer, cuda" in stage.said


@pytest.mark.parametrize("name", ["compute-sanitizer", "ncu"])
def test_a_machine_without_the_tool(stage: Stage, name: str) -> None:
    python = stage.folder / "bin"
    python.mkdir()
    stage.path = str(python)
    module = {"ncu": "ncu", "compute-sanitizer": "sanitize"}[name]
    assert stage.run(f"bench.gpu.{module}") == 3
    assert f"no {name} here" in stage.said


def test_a_build_that_fails_is_in_its_log(stage: Stage, tmp_path: Path) -> None:
    # tools beside the interpreter come first: an interpreter with a broken one beside it
    made = tmp_path / "venv" / "bin"
    made.mkdir(parents=True)
    (made / "python").symlink_to(sys.executable)
    (made / "cmake").write_text("#!/bin/sh\necho 'error: planted'; exit 1\n")
    (made / "cmake").chmod((made / "cmake").stat().st_mode | stat.S_IEXEC)
    before = sorted((ROOT / "ffengine").glob("_C.*"))
    done = subprocess.run(
        [str(made / "python"), "-c", "import sys; sys.executable = sys.argv.pop(1); "
         "sys.argv[0] = 'build'; from bench.gpu import build; sys.exit(build.main())",
         str(made / "python"), "--rehearse", "--seconds", "60", "--out", str(stage.out),
         "--scratch", str(stage.folder / "scratch")], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    assert done.returncode == 1, done.stderr
    assert "no CUDA kernels: cmake -S gave 1, see build.log" in done.stdout
    assert "error: planted" in (stage.out / "build.log").read_text()
    assert "error: planted" in done.stderr, "the end of the log is with the summary's complaint"
    assert sorted((ROOT / "ffengine").glob("_C.*")) == before, "a rehearsal takes nothing away"


def test_a_module_is_installed_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PACKAGE", tmp_path)
    (tmp_path / "made").mkdir()
    module = tmp_path / "made" / "_C.abi.so"
    module.write_bytes(b"new")
    (tmp_path / "_C.abi.so").write_bytes(b"old")
    with (tmp_path / "_C.abi.so").open("rb") as held:
        building.install(module)
        assert held.read() == b"old", "whoever has it open keeps it"
    assert (tmp_path / "_C.abi.so").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_C.abi.so", "made"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_build_is_of_one_architecture(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    folder = tmp_path / "folder"
    words = [building.tool("cmake"), "-S", str(ROOT), "-B", str(folder), *building.settings("90")]
    building.logged(words, log)
    cache = (folder / "CMakeCache.txt").read_text()
    assert "CMAKE_CUDA_ARCHITECTURES:UNINITIALIZED=90-real" in cache or (
        "CMAKE_CUDA_ARCHITECTURES:STRING=90-real" in cache)
    assert "FFENGINE_CUDA:STRING=ON" in cache
