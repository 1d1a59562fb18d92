"""Whoever reads standard output and standard error, or nobody: a command says no less, and fails by
nothing but its own errors."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ffengine.cli import main

ROOT = Path(__file__).parents[2]
TRAIN = ("train deeperforward/tinycnn --data synthetic --data-set shape=(1,8,8) "
         "--data-set train=16 --data-set test=8 --set widths=(10,10,10,10) --batch-size 8 "
         "--epochs 2")
#: Standard error is closed; the reader of standard output goes away in the middle.
SCRIPT = """
import os, sys
from ffengine.cli import main
assert sys.stderr is None
first = main(["models"])
with open("mine", "wb") as file:
    taken = file.fileno()
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
second = main(["models"])
third = main(["plan", "nothing"])
with open("said", "w") as file:
    print(first, second, third, taken > 2, sys.stderr is None, file=file)
"""


def reader_gone() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return io.TextIOWrapper(os.fdopen(write, "wb"), encoding="utf-8")


def test_closed_and_broken_streams(tmp_path: Path) -> None:
    done = subprocess.run(
        f"exec {shlex.quote(sys.executable)} -c {shlex.quote(SCRIPT)} 2>&-", shell=True, text=True,
        cwd=tmp_path, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert "deeperforward/resnet17" in done.stdout and "nothing" not in done.stdout
    assert (tmp_path / "said").read_text() == "0 0 2 True True\n"


def test_a_run_goes_on_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, reader_gone())
    assert main([*shlex.split(TRAIN), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.json").exists()


def test_a_terminal_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are listed as "98.1 ± 0.2"."""
    page = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", page)
    assert main(["reproduce"]) == 0
    page.flush()
    assert b" ? " in page.buffer.getvalue()  # type: ignore[attr-defined]
    assert page.errors == "strict"


def test_a_full_disk_behind_a_redirection(capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as page:
        monkeypatch.setattr(sys, "stdout", page)
        assert main(["models"]) == 2
    assert capsys.readouterr().err == "ffengine: [Errno 28] No space left on device\n"
