""".ci/run: its stages in order, what a red one does, and the time they may take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / ".ci" / "run"
TABLE = [(name, int(limit), command) for name, limit, command in re.findall(
    r'^  "(\w+) +(\d+) (.+)"$', RUN.read_text(), re.M)]
STAGES = [name for name, _, _ in TABLE]
#: Stands in for make and for every script that a stage calls: notes its call, and fails or hangs
#: where it was told to.
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$0 $*" in
  *"${FAIL:-nothing}"*) exit "${STATUS:-3}";;
  *"${HANG:-nothing}"*) sleep 60;;
esac
"""


def run(folder: Path, *stages: str, limit: int | None = None,
        **told: str) -> tuple[int, list[str], list[str]]:
    """(exit status, calls, lines printed after the stages) in a checkout of fakes."""
    scripts = {word for _, _, command in TABLE for word in command.split() if "/" in word}
    for script in ("bin/make", ".ci/run", *scripts):
        (folder / script).parent.mkdir(exist_ok=True)
        (folder / script).write_text(FAKE)
        (folder / script).chmod(0o755)
    shutil.copy(RUN, folder / ".ci" / "run")
    if limit is not None:
        text = re.sub(r'^(  "\w+ +)\d+', rf"\g<1>{limit}", RUN.read_text(), flags=re.M)
        (folder / ".ci" / "run").write_text(text)
    calls = folder / "calls"
    done = subprocess.run(
        [folder / ".ci" / "run", *stages], capture_output=True, text=True, cwd="/",
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls),
             **told})
    lines = done.stdout.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("── stages"))
    made = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, [call.strip() for call in made], lines[end + 1:]


def test_all_stages_in_order(tmp_path: Path) -> None:
    status, calls, end = run(tmp_path)
    assert status == 0 and len(end) == len(TABLE) >= 7
    assert calls == [re.sub(r"^(bash )?\S*/", "", command) for _, _, command in TABLE]
    assert [line.split()[:2] for line in end] == [[name, "passed"] for name in STAGES]


def test_they_fit_into_75_minutes() -> None:
    assert sum(limit for _, limit, _ in TABLE) <= 75 * 60
    assert {name: limit for name, limit, _ in TABLE}["test"] <= 900


def test_a_red_stage_is_named_at_the_end_and_the_rest_run(tmp_path: Path) -> None:
    status, calls, end = run(tmp_path, FAIL="make lint")
    assert status == 1 and len(calls) == len(TABLE) and end[-1] == "FAILED: lint"
    assert any(line.split()[:3] == ["lint", "FAILED", "(3)"] for line in end)


@pytest.mark.parametrize("stage", ["setup", "test"])
def test_a_red_suite_ends_the_run(tmp_path: Path, stage: str) -> None:
    status, calls, end = run(tmp_path, FAIL=f"make {stage}")
    assert status == 1 and calls[-1] == f"make {stage}" and end[-1] == f"FAILED: {stage}"
    assert len(calls) == STAGES.index(stage) + 1


def test_a_stage_that_hangs_is_stopped(tmp_path: Path) -> None:
    status, _, end = run(tmp_path, "lint", limit=1, HANG="make lint")
    assert status == 1 and end[-1] == "FAILED: lint" and "FAILED (over 1 s)" in end[0]


def test_what_a_machine_lacks_is_skipped_by_name(tmp_path: Path) -> None:
    status, calls, end = run(tmp_path, FAIL="aarch64", STATUS="77")
    assert status == 0 and len(calls) == len(TABLE)
    assert [line.split()[:2] for line in end if "passed" not in line] == [["aarch64", "skipped"]]


def test_some_stages_by_name(tmp_path: Path) -> None:
    status, calls, _ = run(tmp_path, "gpu", "lint")
    assert status == 0 and calls == ["make lint", "make rehearsal"]
    status, calls, end = run(tmp_path, "lent")
    assert status == 1 and end == [f"FAILED: lent, which is no stage: {' '.join(STAGES)} "]


APT = """#!/bin/sh
echo "apt-get $*" >>"$CALLS"
[ "$1" = install ] && [ -n "$WORKS" ] || exit "${APT_STATUS:-0}"
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do ln -s fake "$(dirname "$0")/$tool"; done
"""


def aarch64(folder: Path, **told: str) -> tuple[int, list[str], str]:
    """(exit status, calls, output) of .ci/aarch64 where little is installed."""
    tools, calls = folder / ".venv" / "bin", folder / "calls"
    for path in (tools, folder / ".ci"):
        path.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "aarch64", folder / ".ci")
    for name, text in {"fake": FAKE, "apt-get": APT, "make": FAKE, "python": FAKE,
                       "sudo": '#!/bin/sh\nshift\nexec "$@"\n'}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("sh", "bash", "dirname", "basename", "id", "ln", "env"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run([folder / ".ci" / "aarch64"], capture_output=True, text=True,
                          env={"PATH": str(tools), "CALLS": str(calls), **told})
    return done.returncode, [c.split()[0] for c in calls.read_text().splitlines()], done.stdout


def test_aarch64_installs_its_tools(tmp_path: Path) -> None:
    status, calls, _ = aarch64(tmp_path, WORKS="1")
    assert status == 0 and calls == ["apt-get", "apt-get", "make", "python", "python"]


@pytest.mark.parametrize("apt", ["0", "100"], ids=["no-such-package", "apt-fails"])
def test_aarch64_is_skipped_where_apt_cannot_install_them(tmp_path: Path, apt: str) -> None:
    status, calls, out = aarch64(tmp_path, APT_STATUS=apt)
    assert status == 77 and set(calls) == {"apt-get"}
    assert out == ("skipped: no g++-aarch64-linux-gnu and qemu-user, and apt cannot install them\n")
