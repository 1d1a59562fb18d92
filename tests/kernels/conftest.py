"""The interpreter suites share one run of their cases."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # `pytest` alone, unlike `python -m pytest`, leaves it out
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where workers keep compiled kernels: one folder for every process of a test run."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "triton-cache")


@pytest.fixture(scope="session")
def interpreted() -> dict[str, str]:
    """Case id -> "" or what went wrong, for every interpreter case, from two processes."""
    from tests.kernels.worker import Worker

    workers = [Worker("tests.kernels.interpreter_worker", str(part), "2") for part in range(2)]
    found: dict[str, str] = {}
    for worker in workers:
        found |= worker.result()
    return found
