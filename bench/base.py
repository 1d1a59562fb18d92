"""The other build: the tree of an older commit, with an extension, under build/bench-base/."""

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


def default_ref() -> str:
    """$BENCH_BASE; else the commit that the working tree changes: HEAD, or HEAD's first parent."""
    chosen = os.environ.get("BENCH_BASE")
    if chosen:
        return chosen
    return "HEAD" if git("status", "--porcelain").strip() else "HEAD^"


def tree(ref: str | None = None, root: Path = ROOT) -> tuple[Path, str]:
    """(folder, commit) of `ref`, ready to be imported.

    Raises:
        NoBase: no such commit here (a shallow clone has no parents), or its kernels do not build.
    """
    ref = ref or default_ref()
    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", root=root).strip()
    except subprocess.CalledProcessError:
        raise NoBase(f"there is no commit {ref} here (a shallow clone?)") from None
    place = root / "build" / "bench-base" / commit[:12]
    if not (place / "ready").exists():
        shutil.rmtree(place.parent, ignore_errors=True)  # one base is kept
        files = zipfile.ZipFile(io.BytesIO(subprocess.run(
            ["git", "archive", "--format=zip", commit], cwd=root, check=True,
            capture_output=True).stdout))
        files.extractall(place)
    if same_sources(place, root):  # always anew: ours may have been built again since
        for built in (root / "ffengine").glob("_C.*"):
            shutil.copyfile(built, place / "ffengine" / built.name)
    elif not list((place / "ffengine").glob("_C.*")):
        build(place)
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


def build(place: Path) -> None:
    """The base's own C++ kernels; those for CUDA are not timed here."""
    tools = str(Path(sys.executable).parent)
    path = os.pathsep.join((tools, os.environ.get("PATH", "")))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=place, check=False,
        env={**os.environ, "PATH": path, "FFENGINE_CUDA": "0", "FFENGINE_EXTENSION": "1"},
        capture_output=True, text=True)
    if done.returncode:
        raise NoBase(f"its kernels do not build: {done.stderr.strip()[-200:]}")


def git(*words: str, root: Path = ROOT) -> str:
    try:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True,
                              text=True).stdout
    except OSError:
        raise NoBase("there is no git here") from None
