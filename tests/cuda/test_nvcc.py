"""Every CUDA file compiles for every architecture it is shipped for, without register spills, and
moves 16 bytes at a time where it is meant to."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import machine_code

CSRC = Path(__file__).parent.parent.parent / "csrc"
EVERY, CLUSTERS = ("75", "80", "87", "90", "100"), ("90", "100")
#: Architectures a file has kernels for; the cluster kernels are empty on the others.
FILES = {"batch_middle.cu": EVERY, "batch_pass.cu": EVERY, "compressed_step.cu": EVERY,
         "linear_step.cu": EVERY, "local_pass.cu": EVERY, "local_pass_cluster.cu": CLUSTERS,
         "weight_update.cu": EVERY}
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


NEEDS_NVCC = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")


def known_architectures(compiler: str) -> set[str]:
    text = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True,
                          check=True).stdout
    return set(re.findall(r"compute_(\d+)", text))


class Compiled(NamedTuple):
    """A file's object, and name, arch, registers and spilled bytes of each of its kernels."""

    binary: Path
    kernels: list[dict[str, str]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """Compiles a file for all its architectures that the compiler knows, once."""
    compiler, folder = nvcc(), tmp_path_factory.mktemp("nvcc")
    assert compiler is not None
    known = known_architectures(compiler)

    @functools.cache
    def compile_file(name: str) -> Compiled:
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in FILES[name] if a in known]
        binary = folder / f"{name}.o"
        done = subprocess.run(
            [compiler, "-std=c++17", "-O3", "--threads", "2", *targets, "-Xptxas", "-v", "-c",
             str(CSRC / "cuda" / name), "-o", str(binary)],
            capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return Compiled(binary, [m.groupdict() for m in ENTRY.finditer(done.stderr)])

    return compile_file


@pytest.mark.slow
@NEEDS_NVCC
@pytest.mark.parametrize("name", FILES)
def test_no_kernel_spills(name: str, compiled: Callable[[str], Compiled],
                          record_property: Callable[[str, object], None]) -> None:
    kernels = compiled(name).kernels
    assert kernels, "the compiler reported no kernel"
    for k in kernels:
        record_property(f"{k['name']} sm_{k['arch']}", int(k["registers"]))
    spilling = [k for k in kernels if k["stores"] != "0" or k["loads"] != "0"]
    assert not spilling, f"spills: {spilling}"
    crowded = [k for k in kernels if int(k["registers"]) > REGISTERS]
    assert not crowded, f"more than {REGISTERS} registers: {crowded}"


#: A kernel that was written for vectors: four fp32 or eight 16-bit numbers.
VECTOR = r"I(?:fLi4E|6__halfLi8E|13__nv_bfloat16Li8E)"


class Wide(NamedTuple):
    """Accesses of 16 bytes that a kernel must have, in each of `variants` kernels of the pattern;
    `only`: it stores nothing to device memory in narrower pieces."""

    loads: int
    stores: int
    variants: int = 3
    only: bool = False


#: By file and pattern; batch_middle is of few numbers. Of local_pass: a and a shortcut, z and da,
#: four vectors of each at a time.
WIDE: dict[str, dict[str, Wide]] = {
    "batch_middle.cu": {},
    "local_pass.cu": {
        rf"gather_nhwc{VECTOR}": Wide(4, 0), rf"gather_nchw{VECTOR}": Wide(4, 0),
        rf"apply_nhwc{VECTOR}": Wide(8, 8), rf"apply_nchw{VECTOR}": Wide(8, 8)},
    # and its copy into shared memory
    "local_pass_cluster.cu": {rf"one_read{VECTOR}Lb1E": Wide(5, 8),
                              rf"one_read{VECTOR}Lb0E": Wide(5, 8)},
    "batch_pass.cu": {
        rf"stats_nhwc{VECTOR}Lb[01]E": Wide(4, 0, 6), rf"stats_nchw{VECTOR}Lb0E": Wide(4, 0),
        rf"stats_nchw{VECTOR}Lb1E": Wide(2, 0),
        # rows: four of a, then four of z and of da; windows: four of a, one of z and four of da
        rf"apply_nhwc{VECTOR}Lb0E": Wide(4, 8, only=True),
        rf"apply_nhwc{VECTOR}Lb1E": Wide(4, 5, only=True),
        rf"apply_nchw{VECTOR}Lb0E": Wide(4, 8), rf"apply_nchw{VECTOR}Lb1E": Wide(2, 2),
        rf"peer_stats{VECTOR}": Wide(1, 0), rf"peer_apply{VECTOR}": Wide(2, 1, only=True)},
    "linear_step.cu": {rf"linear_finish{VECTOR}": Wide(1, 1),
                       r"linear_prepareI(?:fLi4ELi4|6__halfLi8ELi8|13__nv_bfloat16Li8ELi8)E":
                           Wide(2, 1)},
    # gradient, weight, m and v; those but the gradient are written
    "weight_update.cu": {r"optimizer_stepILi4E": Wide(4, 3, 1)},
    "compressed_step.cu": {r"compressed_stepILNS_11StateFormatE0ELS\d?_0E": Wide(8, 6, 1)},
}


@pytest.mark.slow
@NEEDS_NVCC
@pytest.mark.skipif(machine_code.tool() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("name", FILES)
def test_main_loops_move_16_bytes(name: str, compiled: Callable[[str], Compiled]) -> None:
    """In sm_90's machine code: LDG, LDGSTS and STG of 128 bits."""
    kernels = {key: counters for key, counters in
               machine_code.kernels(compiled(name).binary).items() if key.startswith("sm_90 ")}
    for pattern, wide in WIDE[name].items():
        found = {key: c for key, c in kernels.items() if re.search(pattern, key)}
        assert len(found) == wide.variants, f"{pattern}: {sorted(found)} of {sorted(kernels)}"
        for key, c in found.items():
            assert c["loads_16"] >= wide.loads and c["stores_16"] >= wide.stores, f"{key}: {c}"
            assert not wide.only or c["stores_16"] == c["stores"], f"{key}: {c}"


def test_every_file_is_listed() -> None:
    assert {f.name for f in (CSRC / "cuda").glob("*.cu")} == set(FILES) == set(WIDE)
