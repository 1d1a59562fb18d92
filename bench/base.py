"""Other builds: trees of older commits, with an extension each, under build/bench-base/."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: What the extension is made from.
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")


class NoBase(Exception):
    """There is nothing to compare with; the message says why."""


class Shallow(NoBase):
    """The history here ends before the commit to compare with."""


#: Builds that are kept: the one that counters are held to, and the one that time is.
KEPT = 2


def default_ref(root: Path = ROOT) -> str:
    """What time is held to: $BENCH_BASE; else where this branch left main; else, on main itself,
    the commit that the working tree changes: HEAD, or HEAD's first parent."""
    chosen = os.environ.get("BENCH_BASE")
    if chosen:
        return chosen
    head = git("rev-parse", "HEAD", root=root).strip()
    for main in ("main", "origin/main"):
        try:
            left = git("merge-base", "HEAD", main, root=root).strip()
        except subprocess.CalledProcessError:
            continue
        if left != head:
            return left
    return "HEAD" if git("status", "--porcelain", root=root).strip() else "HEAD^"


def baseline_ref(root: Path = ROOT) -> str:
    """What counters are held to: the last commit that wrote a baseline.

    Raises:
        NoBase: the history here has none.
    """
    found = git("log", "-1", "--format=%H", "--", "bench/baselines", root=root).strip()
    if not found:
        raise NoBase("no commit here wrote bench/baselines (a shallow clone?)")
    return found


def tree(ref: str | None = None, root: Path = ROOT, *, cuda: bool = False) -> tuple[Path, str]:
    """(folder, commit) of `ref`, ready to be imported.

    Args:
        cuda: its CUDA kernels are built too.

    Raises:
        NoBase: no such commit here (a shallow clone has no parents), or its kernels do not build.
    """
    ref = ref or default_ref()
    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", root=root).strip()
    except subprocess.CalledProcessError:
        shallow = git("rev-parse", "--is-shallow-repository", root=root).strip() == "true"
        kind, why = (Shallow, "a shallow clone") if shallow else (NoBase, "a first commit?")
        raise kind(f"there is no commit {ref} here ({why})") from None
    place = root / "build" / "bench-base" / (commit[:12] + "-cuda" * cuda)
    if not (place / "ready").exists():
        shutil.rmtree(place, ignore_errors=True)
        forget(place.parent, KEPT - 1)
        files = zipfile.ZipFile(io.BytesIO(subprocess.run(
            ["git", "archive", "--format=zip", commit], cwd=root, check=True,
            capture_output=True).stdout))
        files.extractall(place)
    if same_sources(place, root):  # always anew: ours may have been built again since
        for built in (root / "ffengine").glob("_C.*"):
            shutil.copyfile(built, place / "ffengine" / built.name)
    elif not list((place / "ffengine").glob("_C.*")):
        build(place, cuda)
    (place / "ready").touch()
    return place, commit[:7]


def same_sources(one: Path, other: Path) -> bool:
    """Whether both trees' kernels are the same files, byte for byte."""
    return _contents(one) == _contents(other)


def _contents(root: Path) -> dict[str, bytes]:
    found = {}
    for name in SOURCES:
        path = root / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(root))] = file.read_bytes()
    return found


def forget(folder: Path, kept: int) -> None:
    """Remove all builds but those that were asked for last."""
    def asked(place: Path) -> float:
        ready = place / "ready"
        return ready.stat().st_mtime if ready.exists() else 0.0

    found = sorted(folder.iterdir(), key=asked) if folder.exists() else []
    for place in found[:max(len(found) - kept, 0)]:
        shutil.rmtree(place, ignore_errors=True)


def build(place: Path, cuda: bool = False) -> None:
    """The base's own C++ kernels; those for CUDA are counted, never timed."""
    tools = str(Path(sys.executable).parent)
    path = os.pathsep.join((tools, os.environ.get("PATH", "")))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=place, check=False,
        env={**os.environ, "PATH": path, "FFENGINE_EXTENSION": "1",
             **({} if cuda else {"FFENGINE_CUDA": "0"})},
        capture_output=True, text=True)
    if done.returncode:
        raise NoBase(f"its kernels do not build: {done.stderr.strip()[-200:]}")


def git(*words: str, root: Path = ROOT) -> str:
    try:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True,
                              text=True).stdout
    except OSError:
        raise NoBase("there is no git here") from None
