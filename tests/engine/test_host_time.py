"""What the host does in a step on a GPU, seen under the stub driver (tests/stub_driver)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: Function calls of a ResNet-17 step in one tile, C functions included; 10,555 with triton 3.9. A
#: count is exact where seconds are not (2.7 ms, measured while four other jobs shared two cores).
MOST_CALLS = 12_000


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    where = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.stub_driver", "tests.engine.host_worker"], cwd=ROOT,
        env={**kept, "PYTHONPATH": where,
             "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_steps_of_other_rates_launch_with_equal_arguments(step: dict[str, Any]) -> None:
    """So that a captured step is right when it is replayed: what changes is read from memory."""
    assert step["rates"][0] != step["rates"][1]
    assert step["differ"] == []


def test_four_launches_a_layer(step: dict[str, Any]) -> None:
    """Three of local_pass (shortcut and concatenation included), one of the optimizer."""
    assert step["launches"] == 17 * 4


def test_settings_and_calls_are_made_once(step: dict[str, Any]) -> None:
    assert step["calls"] <= MOST_CALLS
