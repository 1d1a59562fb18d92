"""Every model's plans, launches and weights are those of before.json."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compare import differences
from tests.golden_checks import before
from tests.models import every

ROOT = Path(__file__).parents[2]


def compared(**environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the suite's poisoned allocations would be counted as launches."""
    return subprocess.run([sys.executable, "-m", "tests.golden_checks.before"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_every_step_is_as_it_was() -> None:
    done = compared()
    if done.returncode == before.ELSEWHERE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_instruction_set_is_named_and_not_compared() -> None:
    done = compared(FFENGINE_ISA="baseline")
    assert done.returncode == before.ELSEWHERE, done.stdout + done.stderr
    made_on = before.read()["needs"]["processor"]
    assert done.stdout.startswith(f"the baseline is of processor {made_on}, this is ")
    assert done.stdout.count("\n") == 1


def test_the_file_holds_every_model() -> None:
    kept = before.read()["rows"]
    assert {name.split(" ")[0] for name in kept} == set(every.NAMES)
    assert {name.split(" ")[2] for name in kept} == {"cpu", "reference"}
    assert all("peak_bytes" in row for name, row in kept.items() if not name.startswith("bp/"))


def test_one_bit_of_a_weight_is_seen() -> None:
    net = every.network("sn/mlp")
    first = before.digest(net)
    weight = net.layer(1).weight.detach()
    weight.view(torch.int32)[0, 0] ^= 1
    second = before.digest(net)
    assert first != second
    assert list(differences({"rows": {"sn/mlp": {"weights": first}}},
                            {"rows": {"sn/mlp": {"weights": second}}})) == [
        f"sn/mlp: weights {first} -> {second}"]
