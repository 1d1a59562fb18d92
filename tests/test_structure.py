"""The house rules a reader relies on: one stem an op, arrows down, short files, clean tools."""

from __future__ import annotations

import ast
import graphlib
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
#: Lower number, lower floor; a module imports its own floor or below. On the ground floor stand the
#: settings and the kernels' arguments, which ops, reference and kernels share. What stands beside
#: the engine (opponents, profiles, devices, analysis) is above it: training imports none of them.
FLOORS = {
    "version": 0, "needs": 0, "locks": 0, "tables": 0, "words": 0, "typed": 0,
    "ops.config": 0, "ops.optim": 0, "ops.params": 0, "ops.host": 0, "ops.tracing": 0,
    "ops.memory_accounting": 0,
    "reference": 1, "kernels": 1, "ops": 2, "env": 2, "losses": 2, "data": 3, "nn": 3, "adapt": 4,
    "engine": 4, "sealed": 5, "models": 5, "baselines": 5, "profile": 5, "devices": 5,
    "analysis": 5, "provenance": 6, "commands": 6, "cli": 7, "__main__": 8}
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


def floor(module: str) -> int:
    """Of the longest name in FLOORS that the module's name begins with."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(FLOORS[name] for name in names if name in FLOORS)


def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in SOURCES}
    found |= {f"ffengine.kernels.{p.stem}": p for p in (ROOT / "kernels").glob("*.py")}
    return {name.removesuffix(".__init__"): p for name, p in found.items()}


MODULES = modules()


def imports(source: str) -> set[str]:
    """Modules of the package that a source names, wherever: in functions, and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected imports by full names"
            inner = {a.name: f"{node.module}.{a.name}" for a in node.names}
            found |= {m if m in MODULES else str(node.module) for m in inner.values()}
    return found & MODULES.keys()


def test_every_import_counts() -> None:
    assert imports("if TYPE_CHECKING:\n from ffengine.engine.memory import plan, meter\n"
                   "def f():\n import ffengine.cli\n from ffengine.nn import LocalNet\n") == {
        "ffengine.engine.memory.plan", "ffengine.engine.memory.meter", "ffengine.cli",
        "ffengine.nn"}


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imports(path.read_text()) - {name} for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as found:
        pytest.fail("imported in a circle: " + " <- ".join(found.args[1]))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"ffengine"}))
def test_arrows_point_down(name: str) -> None:
    up = [m for m in imports(MODULES[name].read_text()) if m != "ffengine" and (
        floor(m) > floor(name))]
    assert not up, f"{name} imports from above: {', '.join(sorted(up))}"


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
