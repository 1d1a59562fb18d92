"""Every kernel variant through this Triton version's own loader and launcher, into a driver that
does nothing: arguments that a launcher refuses are found without a GPU."""

from __future__ import annotations

import json
import os
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
    assert len(launched) > 20
    for variant, row in launched.items():
        assert [kernel for kernel, _grid in row["launches"]] == kernels_of(variant), variant
        assert row["microseconds"] > 0, variant


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
