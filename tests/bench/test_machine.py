"""What a result says of the tree that it was measured with, .git or none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bench import machine

ROOT = Path(__file__).parents[2]


def copied(to: Path) -> Path:
    """Some of this tree's sources, as they travel without .git."""
    (to / "ffengine").mkdir(parents=True)
    shutil.copy(ROOT / "CMakeLists.txt", to)
    shutil.copytree(ROOT / "kernels", to / "kernels")
    (to / "ffengine" / "a.py").write_text("a = 1\n")
    return to


def git(tree: Path, *words: str) -> str:
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tree,
                          check=True, capture_output=True, text=True).stdout.strip()


def test_without_git_the_digest_stands_for_the_commit(tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    digest = machine.digest(tree)
    assert machine.source(tree) == {"commit": f"unknown, tree {digest}", "dirty": None}
    assert len(digest) == 12 and machine.digest(copied(tmp_path / "again")) == digest
    (tree / "ffengine" / "kernels").symlink_to("../kernels")
    (tree / "ffengine" / "rows.json").write_text("{}")
    assert machine.digest(tree) == digest, "a link or a result is no source"
    (tree / "ffengine" / "a.py").write_text("a = 2\n")
    assert machine.digest(tree) != digest


def test_with_git(tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    git(tree, "init", "-q")
    assert machine.source(tree)["commit"].startswith("unknown, tree "), "nothing committed yet"
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    commit = git(tree, "rev-parse", "--short", "HEAD")
    assert machine.source(tree) == {"commit": commit, "dirty": False}
    (tree / "bench" / "results").mkdir(parents=True)
    (tree / "bench" / "results" / "before.json").write_text("{}")
    (tree / "README.md").write_text("")
    assert machine.source(tree) == {"commit": commit, "dirty": False}, "the result before this one"
    (tree / "new.py").write_text("")
    assert machine.source(tree) == {"commit": commit, "dirty": True}


def test_a_folder_in_another_repository_has_not_its_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "theirs").write_text("")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "theirs")
    assert machine.source(copied(tmp_path / "tree"))["commit"].startswith("unknown, tree ")


def test_no_git_at_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.source()["commit"] == f"unknown, tree {machine.digest()}"


def test_the_digest_of_a_tree_can_be_asked_for(tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    said = subprocess.run([sys.executable, "-m", "bench.machine", str(tree)], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    assert said.strip() == machine.digest(tree)


def test_facts_name_versions() -> None:
    facts = machine.facts()
    assert facts["commit"] and {"driver", "cuda", "triton", "torch", "isa", "gpu"} <= facts.keys()
    assert facts["driver"] is None or facts["gpu"]
