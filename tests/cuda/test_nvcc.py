"""Every CUDA file compiles for every architecture it is shipped for, without register spills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent.parent / "csrc"
EVERY, CLUSTERS = ("75", "80", "87", "90", "100"), ("90", "100")
#: Architectures a file has kernels for; the cluster kernels are empty on the others.
FILES = {"batch_pass.cu": EVERY, "compressed_step.cu": EVERY, "linear_step.cu": EVERY,
         "local_pass.cu": EVERY, "local_pass_cluster.cu": CLUSTERS, "weight_update.cu": EVERY}
#: Most registers a thread may have for the blocks a multiprocessor is meant to hold.
REGISTERS = 128
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers", re.S)


def nvcc() -> str | None:
    """The compiler, found as csrc/cuda/build.cmake finds it."""
    for place in (os.environ.get("CUDACXX"), shutil.which("nvcc"),
                  f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"):
        if place and shutil.which(place):
            return place
    return None


def known_architectures(compiler: str) -> set[str]:
    text = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True,
                          check=True).stdout
    return set(re.findall(r"compute_(\d+)", text))


def resources(compiler: str, name: str, folder: Path) -> list[dict[str, str]]:
    """Compiles a file; name, arch, registers and spilled bytes of each of its kernels."""
    known = known_architectures(compiler)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in FILES[name] if a in known]
    done = subprocess.run(
        [compiler, "-std=c++17", "-O3", "--threads", "2", *targets, "-Xptxas", "-v", "-c",
         str(CSRC / "cuda" / name), "-o", str(folder / f"{name}.o")],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [m.groupdict() for m in ENTRY.finditer(done.stderr)]


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("name", FILES)
def test_no_kernel_spills(name: str, tmp_path: Path,
                          record_property: Callable[[str, object], None]) -> None:
    compiler = nvcc()
    assert compiler is not None
    kernels = resources(compiler, name, tmp_path)
    assert kernels, "the compiler reported no kernel"
    for k in kernels:
        record_property(f"{k['name']} sm_{k['arch']}", int(k["registers"]))
    spilling = [k for k in kernels if k["stores"] != "0" or k["loads"] != "0"]
    assert not spilling, f"spills: {spilling}"
    crowded = [k for k in kernels if int(k["registers"]) > REGISTERS]
    assert not crowded, f"more than {REGISTERS} registers: {crowded}"


def test_every_file_is_listed() -> None:
    assert {f.name for f in (CSRC / "cuda").glob("*.cu")} == set(FILES)
