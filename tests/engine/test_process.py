"""What starting costs, and what the process holds beside its tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import start
from ffengine.engine.run import process

ROOT = Path(__file__).parents[2]
MB = 10**6
#: In a process of its own: bytes of a block of 6 MB that lie in a mapping of its own, which goes
#: back when it is freed; by glibc's rule, which learned from a larger one, and as it is told.
SCRIPT = """
import ctypes, json, torch
from ffengine.engine.run import process

class Info(ctypes.Structure):
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]

ask = ctypes.CDLL(None).mallinfo2
ask.restype = Info

def mapped():
    before = ask().field_4  # hblkhd
    block = torch.ones(6_000_000 // 4)
    return ask().field_4 - before

del (large := [torch.ones(5_000_000)])[:]
print(json.dumps([mapped(), process.give_back(), mapped()]))
"""


def test_starting_costs_little_beside_torch() -> None:
    told = start.measure(1)
    assert start.failures({**told, "torch": (told["torch"][0], 1.5 * told["torch"][1])}) == []


def test_a_limit_that_is_passed_is_named() -> None:
    names, step = start.LIMITS["names"], start.LIMITS["step"]
    told = {"torch": (200 * MB, 1.0), "names": (6 * MB, names.share + 0.1),
            "models": (9 * MB, 0.4), "step": (step.bytes + 5 * MB, 0.9)}
    found = start.failures(told)
    assert [line.partition(":")[2].partition(":")[0] for line in found] == [
        f" {limit.what}" for limit in (names, step)]
    assert f"6.0 MB of {names.bytes // MB}, {names.share + 0.1:.2f} s, " in found[0]
    assert f"({names.share:.2f} allowed)" in found[0]


def test_freed_blocks_go_back_where_the_heap_is_told() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, True, pytest.approx(6 * MB, rel=0.01)]


@pytest.mark.parametrize("name, value", [("MALLOC_TRIM_THRESHOLD_", "1000000"),
                                         ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=100000")])
def test_the_environments_own_word_stands(monkeypatch: pytest.MonkeyPatch, name: str,
                                          value: str) -> None:
    monkeypatch.setenv(name, value)
    assert process.give_back() is False


def test_the_high_water_mark_is_the_kernels() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    before = process.high_water()
    lines = Path("/proc/self/status").read_text().splitlines()
    kernels = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    assert before <= kernels + MB and kernels <= process.high_water() + MB
