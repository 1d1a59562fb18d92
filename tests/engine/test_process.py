"""What starting costs, and what the process holds beside its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import start
from ffengine.engine.run import process

MB = 10**6


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


def test_the_high_water_mark_is_the_kernels() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    before = process.high_water()
    lines = Path("/proc/self/status").read_text().splitlines()
    kernels = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    assert before <= kernels + MB and kernels <= process.high_water() + MB
