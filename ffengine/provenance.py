"""What every result says about where it was measured: hardware, versions, commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from ffengine.devices import energy
from ffengine.env import cpu_name, machine_class, version
from ffengine.ops import backends

ROOT = Path(__file__).resolve().parent.parent
#: What a tree's digest covers: files of these folders with these suffixes.
SOURCES = ("CMakeLists.txt", "csrc", "kernels", "ffengine", "bench", "tests")
#: What measurements leave behind: one does not depend on those before it.
RESULTS = ("bench/results", "bench/baselines", "bench/RESULTS.md", "docs", "README.md")
LINKED = ("ffengine", "kernels")
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".c", ".cmake", ".txt", ".toml", ".sh")


def facts() -> dict[str, Any]:
    """Hardware, versions and commit of this run, for `extra_info` and result files."""
    ext = backends.extension()
    cuda = torch.cuda.is_available()
    return {
        "class": machine_class(),
        "cpu": cpu_name(),
        "isa": ext.isa() if ext is not None else "none",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": energy.driver_version() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        **source(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def source(root: Path = ROOT) -> dict[str, Any]:
    """Commit of a tree and whether it was changed since, results and their pages aside; where .git
    did not travel with the sources, "unknown" with their digest, and no word on changes."""
    # --show-prefix is empty at the top of a repository alone, not in a folder of somebody else's
    if _git(root, "rev-parse", "--show-prefix") == "" and (
            commit := _git(root, "rev-parse", "--short", "HEAD")):
        changed = _git(root, "status", "--porcelain", "--", ".", *(
            f":(exclude){place}" for place in RESULTS))
        return {"commit": commit, "dirty": bool(changed)}
    return {"commit": f"unknown, tree {digest(root)}", "dirty": None}


def digest(root: Path = ROOT) -> str:
    """Of a tree's sources, twelve hexadecimal digits: equal files give equal digests."""
    found = hashlib.sha256()
    for path in sorted(p for name in SOURCES for p in (
            (root / name).rglob("*") if (root / name).is_dir() else [root / name])):
        inside = path.relative_to(root)
        # the kernels' folder may be linked into the package
        if path.suffix in SUFFIXES and path.is_file() and inside.parts[:2] != LINKED:
            found.update(inside.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def _git(root: Path, *args: str) -> str | None:
    """What git says of a tree, whoever owns its files; None where it has nothing to say."""
    try:
        done = subprocess.run(["git", "-c", "safe.directory=*", "-C", str(root), *args],
                              capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
