"""The house rules a reader relies on: one stem an op, arrows down, short files, clean tools."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ffengine"
SOURCES = sorted(PACKAGE.rglob("*.py"))
#: Ops that a reader may look for; every other file of ffengine/ops only supports them.
OPS = [p.stem for p in sorted((PACKAGE / "ops").glob("*.py"))
       if (PACKAGE / "reference" / p.name).exists() and p.stem != "__init__"]
#: Lower number, lower floor; a module imports its own floor or below.
FLOORS = {"cli": 7, "commands": 6, "analysis": 5, "baselines": 5, "models": 5, "adapt": 4,
          "engine": 4, "data": 3, "nn": 3, "ops": 2, "kernels": 1, "reference": 1}
#: Settings that the definition of correct shares with the ops it defines.
SHARED = {"ffengine.ops.config", "ffengine.ops.host", "ffengine.ops.optim",
          "ffengine.ops.weight_update"}
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".sh", ".yml", ".txt", ".in"}
#: Spelled in halves so that this file passes its own test.
FORBIDDEN = ["/wo" + "rk/", "/tm" + "p/w", "../sha" + "red"]


def files() -> list[Path]:
    skip = {"build", "dist", "runs"}
    return [p for p in sorted(ROOT.rglob("*"))
            if (p.suffix in SUFFIXES or p.name in ("Makefile", "run")) and p.is_file() and not any(
                (part in skip and ROOT / part in p.parents) or part.endswith(".egg-info")
                or (part.startswith(".") and part != ".ci") for part in p.relative_to(ROOT).parts)]


def test_there_are_ops() -> None:
    assert {"local_pass", "weight_update"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_stem_in_every_folder(op: str) -> None:
    for place in (f"kernels/{op}.py", f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu"):
        assert (ROOT / place).is_file(), f"expected {place}"
    assert list((ROOT / "tests" / "ops").glob(f"test_{op}*.py"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_names_its_places(op: str) -> None:
    doc = ast.get_docstring(ast.parse((PACKAGE / "ops" / f"{op}.py").read_text())) or ""
    for place in (f"ffengine/reference/{op}.py", f"csrc/cpu/{op}.cpp", f"kernels/{op}.py",
                  f"csrc/cuda/{op}.cu"):
        assert place in doc


def floor(module: str) -> int | None:
    parts = module.split(".")
    return FLOORS.get(parts[1]) if len(parts) > 1 else None


def imports(tree: ast.AST) -> list[str]:
    """Modules of the package that a file imports when it runs (not only for type checkers)."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ffengine"):
            found += [f"{node.module}.{a.name}" if node.module == "ffengine" else str(node.module)
                      for a in node.names]
            if node.module in ("ffengine.ops", "ffengine.reference"):
                found += [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("ffengine")]
        found += imports(node)
    return [m for m in found if m not in ("ffengine.ops", "ffengine.reference")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    here = floor(".".join(parts))
    if here is None:
        return
    up = [m for m in imports(ast.parse(path.read_text()))
          if (floor(m) or 0) > here and not (parts[1] == "reference" and m in SHARED)]
    assert not up, f"{path.relative_to(ROOT)} imports from above: {', '.join(up)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_points_outside_the_repository() -> None:
    found = [f"{p.relative_to(ROOT)}: {word}" for p in files()
             for word in FORBIDDEN if word in p.read_text(errors="replace")]
    assert not found, "\n".join(found)


def test_the_readme_names_what_is_there() -> None:
    folders = "ffengine|bench|csrc|kernels|tests"
    named = re.findall(rf"(?:{folders})/[\w/]+\.\w+", (ROOT / "README.md").read_text())
    missing = [p for p in named if not (ROOT / p).exists() and not p.endswith("X.py")]
    assert named and not missing


@pytest.mark.parametrize("command", [["ruff", "check", "-q", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_tools_have_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
