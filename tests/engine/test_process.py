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
#: In a process of its own: what freed blocks leave in the heap, as glibc has it and as it is told.
SCRIPT = """
import json, torch
from ffengine.engine.run import process

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def left():
    before = resident()
    for _ in range(3):  # the heap's own thresholds rise with what is freed
        pairs = [(torch.ones(6 << 18), torch.ones(1000)) for _ in range(8)]
        small = [pair[1] for pair in pairs]  # which keep what lies below them
        del pairs
    return resident() - before

torch.set_num_threads(1)
print(json.dumps([left(), process.give_back(), left()]))
"""


def test_starting_costs_little_beside_torch() -> None:
    told = start.measure(1)
    assert start.failures({**told, "torch": (told["torch"][0], 1.5 * told["torch"][1])}) == []


def test_a_limit_that_is_passed_is_named() -> None:
    told = {"torch": (200 * MB, 1.0), "names": (6 * MB, 0.3), "models": (9 * MB, 0.4),
            "step": (40 * MB, 0.9)}
    found = start.failures(told)
    assert [line.partition(":")[2].partition(":")[0] for line in found] == [
        f" {start.LIMITS[name].what}" for name in ("names", "step")]
    assert "6.0 MB of 15, 0.30 s, 0.30 of torch's 1.00 s (0.25 allowed)" in found[0]


def test_freed_blocks_go_back_where_the_heap_is_told() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    untold, taken, told = json.loads(done.stdout.splitlines()[-1])
    assert taken is True and told < 4 * MB < 20 * MB < untold


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
