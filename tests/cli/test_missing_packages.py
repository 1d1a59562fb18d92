"""A package that a command does not use may be missing; what needs it says which one to install."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ffengine.needs import need

#: Runs in a process of its own: argv is the modules to hide and the command lines to run.
SCRIPT = """
import contextlib, importlib, io, json, pkgutil, sys
hidden, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
class NoKernels:
    def find_spec(self, name, path=None, target=None):
        if name == "ffengine._C" and name in hidden:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, NoKernels())
sys.modules.update(dict.fromkeys(set(hidden) - {"ffengine._C"}))
import ffengine, ffengine.kernels
names = [m.name for package in (ffengine, ffengine.kernels)
         for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
failed = {}
for name in names:
    if name.endswith("__main__") or name == "ffengine._C":
        continue
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
from ffengine.cli import main
ran = []
for words in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    ran.append([status, out.getvalue(), err.getvalue()])
print(json.dumps({"modules": len(names), "failed": failed, "ran": ran}))
"""
COLLECT = """
import json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
import pytest
class Count:
    def pytest_collection_finish(self, session):
        self.found = len(session.items)
count = Count()
words = ["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
status = pytest.main(words, [count])
print("", count.found)
sys.exit(status)
"""
ROOT = Path(__file__).parents[2]
NET = ["--set", "widths=(10,10,10,10)", "--batch-size", "16", "--epochs", "2"]
SYNTHETIC = ["synthetic", "--data-set", "shape=(1,8,8)", "--data-set", "train=32", "--data-set",
             "test=16"]
EVERY = "PIL pooch requests sklearn scipy tensorboard matplotlib tqdm triton safetensors"


def train(out: str, *words: str) -> list[str]:
    return ["train", "deeperforward/tinycnn", "--out", out, *NET, "--data", *words]


def without(folder: Path, packages: str, *commands: list[str]) -> dict[str, Any]:
    """Every module imported and the commands run in `folder`, with some packages hidden.

    Returns "failed": module -> why it does not import; "ran": (status, stdout, stderr) of each.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(packages.split()), json.dumps(commands)],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
             "FFENGINE_DATA": str(folder / "data"), "FFENGINE_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] > 100
    return dict(found)


@pytest.mark.parametrize("packages, fails, needs", [
    ("pooch requests", train("other", "mnist"),
     "[data] downloading mnist needs pooch: pip install pooch"),
    ("sklearn", train("other", "digits"),
     "[data] digits needs scikit-learn: pip install scikit-learn"),
    ("scipy", train("other", "svhn"), "[data] "),  # which is read without it: the files are empty
    ("PIL", train("other", "folder:pets"),
     "[data] decoding images needs pillow: pip install pillow"),
    ("matplotlib", ["profile", "deeperforward/tinycnn", "--batch-size", "2", "--out", "other"],
     "[profile] profile.png expected matplotlib, got none: pip install ffengine[plot], or "
     "--no-png"),
    ("safetensors", ["eval", "run"],
     "[checkpoint] reading a checkpoint needs safetensors: pip install safetensors"),
    ("triton", train("other", *SYNTHETIC, "--backend", "triton"),
     "[trainer] backend 'triton' cannot run here: triton is not installed"),
    ("tensorboard", None, ""),
    ("tqdm", None, ""),
], ids=["pooch", "scikit-learn", "scipy", "pillow", "matplotlib", "safetensors", "triton",
        "tensorboard", "tqdm"])
def test_only_what_needs_a_package_misses_it(tmp_path: Path, packages: str,
                                             fails: list[str] | None, needs: str) -> None:
    """All modules import, training works, and one line says what to install for the rest."""
    (tmp_path / "data" / "svhn").mkdir(parents=True)
    for part in ("train", "test"):
        (tmp_path / "data" / "svhn" / f"{part}_32x32.mat").touch()
    for name in "ab":
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "pets" / name / f"{i}.png").touch()
    found = without(tmp_path, packages, train("run", *SYNTHETIC), *([fails] if fails else []))
    kernels = {name for name in found["failed"] if name.startswith("ffengine.kernels.")}
    assert set(found["failed"]) == kernels
    assert all("triton" in found["failed"][name] for name in kernels)
    assert bool(kernels) == (packages == "triton")

    status, _, err = found["ran"][0]
    assert status == 0, err
    assert {"history.csv", "latest.safetensors"} <= set(os.listdir(tmp_path / "run"))
    assert [line.partition(":")[0] for line in err.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2", "epoch 2/2"]
    assert err.count("pip install tensorboard") == (packages == "tensorboard")
    for refused, out, line in found["ran"][1:]:
        assert (refused, out) == (2, "") and line.startswith(f"ffengine: {needs}")
        assert line.count("\n") == 1
        assert not (tmp_path / "other").exists()


def test_bare_machine(tmp_path: Path) -> None:
    """No GPU, Triton, compiled kernels or any of the packages: the reference trains on files."""
    for name, data in mnist().items():
        (tmp_path / "data" / "mnist").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "mnist" / name).write_bytes(data)
    profile = ["profile", "deeperforward/tinycnn", *NET[:4], "--no-png", "--steps", "1"]
    found = without(tmp_path, f"{EVERY} ffengine._C", ["env", "--json"], train("run", "mnist"),
                    profile)
    (status, out, err), (trained, report, line), (profiled, *_) = found["ran"]
    assert status == 0, err
    backends = json.loads(out)["backends"]
    assert [name for name, state in backends.items() if state["usable"]] == ["reference"]
    assert (trained, profiled) == (0, 0) and "test accuracy" in report, line
    assert "[trainer] runs on the reference: cpu: the C++ kernels are not built" in line


def test_gpu_tests_are_collected_without_them(tmp_path: Path) -> None:
    """A machine with a GPU and little else can still run what is marked for it."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps(EVERY.split())], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 300


def mnist() -> dict[str, bytes]:
    """Files of MNIST's format, 40 training and 20 test images."""
    files = {}
    for prefix, count in (("train", 40), ("t10k", 20)):
        pixels = bytes(i * 7 % 256 for i in range(count * 784))
        files[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, count, 28, 28) + pixels
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, count) + bytes(
            i % 10 for i in range(count))
    return files


def test_importing_costs_nothing() -> None:
    """Neither the package nor the command line's help loads torch, which takes seconds."""
    code = ("import sys, ffengine, ffengine.cli; ffengine.cli.parser().format_help(); "
            "print([m for m in ('torch', 'numpy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_that_is_there_but_broken_says_why(monkeypatch: pytest.MonkeyPatch,
                                                     tmp_path: Path) -> None:
    (tmp_path / "sklearn.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    with pytest.raises(ImportError, match=r"^\[data\] digits needs scikit-learn: pip install "
                       r"scikit-learn \(it is there, but does not import: No module .*such_thing"):
        need("sklearn", "[data] digits")
