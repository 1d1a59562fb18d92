"""What starting costs, and what the process holds beside its tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ffengine.engine.run import process

ROOT = Path(__file__).parents[2]
MB = 10**6
#: In a process of its own: bytes and processor seconds over `import torch`, then what freed blocks
#: leave in the heap, as glibc has it and as it is told.
SCRIPT = """
import gc, io, json, sys, time
from contextlib import redirect_stdout
from resource import RUSAGE_SELF, getrusage
import torch
torch.set_num_threads(1)

def grown():
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024 - start

def spent():
    return time.process_time() - clock

start, clock = getrusage(RUSAGE_SELF).ru_maxrss * 1024, time.process_time()
import ffengine as ff
ff.Trainer, ff.models.create
told = {"torch": clock, "first": [grown(), spent()]}
from ffengine.cli import main
with redirect_stdout(io.StringIO()):
    assert main(["models"]) == 0
told["models"] = [grown(), spent()]
net = ff.models.create("deeperforward/tinycnn", in_channels=1, image_size=8,
                       widths=(10, 20, 20, 20))
ff.Trainer(net, epochs=1, progress=False).step(torch.rand(8, 1, 8, 8), torch.arange(8))
told["step"] = [grown(), spent()]
told["stack"] = [m for m in ("torch._dynamo", "torch._inductor", "sympy") if m in sys.modules]

from ffengine.engine.run import process

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def left():
    before = resident()
    for _ in range(3):  # the heap's own thresholds rise with what is freed
        blocks = [torch.ones(6 << 18) for _ in range(8)]
        kept = torch.ones(1000)
        del blocks
    return resident() - before

told["left"] = [left()]
told["told"] = process.give_back()
gc.collect()
told["left"].append(left())
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_starting_costs_little_beside_torch(told: dict) -> None:
    """Seconds as shares of what torch's own import takes on this machine, about 1 s."""
    held, seconds = told["first"]
    assert held <= 15 * MB and seconds <= 0.3 * told["torch"], told
    assert told["models"][1] <= 0.5 * told["torch"], told
    assert told["step"][0] <= 35 * MB and told["stack"] == [], told


def test_freed_blocks_go_back_where_the_heap_is_told(told: dict) -> None:
    assert told["told"] is True
    assert told["left"][1] < 4 * MB, told


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
