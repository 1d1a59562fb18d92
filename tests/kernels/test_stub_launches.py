"""Every kernel variant through this Triton version's own loader and launcher, into a driver that
does nothing: arguments that a launcher refuses are found without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.worker import ROOT, Worker

#: Kernels of a call.
KERNELS = {
    "batch": ["batch_stats_kernel", "batch_apply_kernel"],
    "linear-step": ["linear_prepare_kernel", "linear_finish_kernel"],
    "optimizer": ["optimizer_kernel"],
    "peer": ["peer_stats_kernel", "peer_apply_kernel"],
    "rows": ["rows_stats_kernel", "finish_kernel", "rows_apply_kernel"],
    "runs": ["stats_kernel", "finish_kernel", "apply_kernel"],
}


def kernels_of(variant: str) -> list[str]:
    if variant.startswith("middle"):
        return ["batch_middle_kernel"] * (1 if variant == "middle-alone" else 3)
    if variant.startswith("batch"):
        return KERNELS["peer" if variant == "batch-peer" else "batch"]
    if variant.startswith("linear-step"):
        return KERNELS["linear-step"]
    if variant.startswith(("states", "adamw", "sgd")):
        return KERNELS["optimizer"]
    return KERNELS["rows" if variant.startswith("pixels") or "nhwc" in variant else "runs"]


@pytest.fixture(scope="module")
def launched(triton_cache: str) -> dict[str, Any]:
    return Worker("tests.stub_driver", "tests.kernels.stub_worker",
                  TRITON_CACHE_DIR=triton_cache).result()


def test_every_variant_launches(launched: dict[str, Any]) -> None:
    assert len(launched["launches"]) > 20
    for variant, launches in launched["launches"].items():
        assert [kernel for kernel, _grid in launches] == kernels_of(variant), variant
        assert all(grid[1:] == [1, 1] for _kernel, grid in launches), variant


def test_a_launch_costs_the_host_less_than_triton_s_own_call(launched: dict[str, Any]) -> None:
    """With its wrapper 5 to 7 µs of process time against 9 to 15, seen on a Zen 5."""
    host = launched["host"]
    assert {name: row["launches"] for name, row in host.items()} == {
        "local_pass": 3, "optimizer_step": 1, "batch_pass": 2}
    for name, row in host.items():
        assert row["microseconds"] < 0.8 * row["by_triton"], (name, row)


def script(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A script under the stub, in a process of its own."""
    path = tmp_path / "script_under_stub.py"
    path.write_text(text)
    where = os.pathsep.join([str(ROOT), str(tmp_path)])
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tests.stub_driver", "script_under_stub"], cwd=ROOT,
        env={**kept, "PYTHONPATH": where, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=300, check=False)


def test_every_variant_is_compiled_and_the_oldest_triton_is_the_metadata_s() -> None:
    from bench.aot_variants import VARIANTS
    from tests.kernels import test_aot_batch_pass, test_aot_triton

    assert set(VARIANTS) == {*test_aot_triton.ALL, *test_aot_batch_pass.ALL}
    allowed = re.search(r'"triton>=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"triton==(\d+\.\d+)\.0", (ROOT / ".ci/oldest_triton.txt").read_text())
    assert allowed and pinned and allowed[1] == pinned[1]


def test_alignments_of_a_form_are_kernels_of_their_own(tmp_path: Path) -> None:
    """A tensor that begins 4 bytes later must not meet the machine code of 16-byte loads."""
    done = script("""
import json, torch
from ffengine.kernels import linear_step
from ffengine.ops.params import LinearCall
from tests import stub_driver

a, sums = torch.zeros(8 * 512 + 1), torch.zeros(1, 512)
for _ in range(2):
    for at in (0, 1):
        linear_step.finish((a[at:at + 8 * 512].view(8, 512), None, sums), LinearCall(chunk=8))
form = linear_step._finish_form(512, torch.float32, 8, True, False)[0]
wide = [kernel.asm["ptx"].count("ld.global.v4") for kernel in form.compiled.values()]
print(json.dumps([stub_driver.DRIVER.count(), wide]))
""", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    count, wide = json.loads(done.stdout.splitlines()[-1])
    assert count == 4 and len(wide) == 2
    assert wide[0] > 0 and wide[1] == 0


def test_grids_above_65535_lie_along_x(tmp_path: Path) -> None:
    """More splits, chunks and blocks than a grid's y takes; more programs than its x does."""
    done = script("""
import json, torch
from ffengine.kernels import batch_pass, linear_step, local_pass
from ffengine.ops import config as c
from ffengine.ops.call import make_call
from ffengine.ops.params import BatchPassCall, BatchPassTensors, LinearCall, LocalPassTensors
from tests import stub_driver

zero = torch.zeros(1)
large = zero.expand(2, 1, 16384, 32768)  # 536,870,912 numbers a sample, one in memory
wide = zero.expand(1, 70_000 * 64)
labels = torch.zeros(1, dtype=torch.int64)
with stub_driver.DRIVER.recorded() as launches:
    batch_pass.batch_pass(
        BatchPassTensors(large, table=torch.zeros(5, 1), weight=torch.zeros(2, 1), z=large),
        BatchPassCall(1, False, False, False, False, False))
    batch_pass.batch_pass(BatchPassTensors(wide, y=labels, table=wide[0], da=wide),
                          BatchPassCall(3, False, False, False, False, False))
    linear_step.finish((zero.expand(70_000 * 64, 1), None, zero.expand(70_000, 1)),
                       LinearCall(chunk=64))
rows = zero.expand(2**31, 1)
held = dict.fromkeys(LocalPassTensors._fields)
held |= {"a": rows, "offsets": labels, "z": rows, "g": rows, "stats": rows[:, :, None]}
try:
    local_pass.local_pass(LocalPassTensors(**held), make_call(
        rows, c.LocalPassConfig(groups=1), c.Tile(), 1.0, 0, False))
    error = ""
except ValueError as refused:
    error = str(refused)
print(json.dumps([[launch.grid for launch in launches], error]))
""", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    grids, error = json.loads(done.stdout.splitlines()[-1])
    assert grids == [[131072, 1, 1], [70000, 1, 1], [70000, 1, 1]]
    assert error.startswith("[local_pass] expected at most 2^31 - 1 programs, got 2147483648")


def test_a_captured_step_follows_memory(tmp_path: Path) -> None:
    """With a clock and rows of numbers, two steps differ in no argument that a graph would keep."""
    done = script("""
import json, torch
from ffengine.kernels import weight_update
from ffengine.ops import config as c
from ffengine.ops.local_pass import local_pass
from ffengine.ops.optim import OptimConfig, OptimState
from ffengine.ops.optimizer_step import step_arguments
from tests import stub_driver

a, y = torch.zeros(4, 20, 4, 4), torch.zeros(4, dtype=torch.int64)
weight, clock, row = torch.zeros(64, 64), torch.zeros(1, dtype=torch.int32), torch.zeros(8)

def step(i, memory):
    beside = {"row": row} if memory else {}
    with stub_driver.DRIVER.recorded() as launches:
        local_pass(a, y, config=c.LocalPassConfig(dropout=c.Dropout(0.2, 1, 2, i)), want_da=True,
                   clock=clock if memory else None, backend="triton")
        for precision in ("fp32", "bf16", "8bit"):
            optim = OptimConfig("adamw", lr=0.1 / i, state_precision=precision)
            state = OptimState.create(weight, optim)
            state.step = i
            tensors, _, call = step_arguments(weight, weight, state, optim, 1.0, **beside)
            weight_update.optimizer_step(tensors, call)
    return [(launch.kernel, launch.grid, launch.numbers) for launch in launches]

print(json.dumps([len(step(1, True)), step(1, True) == step(2, True),
                  step(1, False) == step(2, False)]))
""", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [6, True, False]


def test_the_driver_refuses_what_a_device_refuses(tmp_path: Path) -> None:
    """A grid's y above 65,535, and a call that misses an argument."""
    done = script("""
import json, torch, triton, triton.language as tl
from tests import stub_driver

@triton.jit
def fill_kernel(p, x, n: tl.constexpr):
    tl.store(p + tl.arange(0, n), x)

found, t = [], torch.zeros(16)
fill_kernel[(1, 65535)](t, 1.0, n=16)
for grid, arguments in (((1, 65536), (t, 1.0)), ((1,), (t,))):
    try:
        fill_kernel[grid](*arguments, n=16)
        found.append("")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps([stub_driver.DRIVER.count(), *found]))
""", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    count, tall, short = json.loads(done.stdout.splitlines()[-1])
    assert count == 1
    assert "RuntimeError" in tall and "stub" in tall
    assert "TypeError" in short and "'x'" in short
