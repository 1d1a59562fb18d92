"""The statistics of bench.states on curves drawn by hand."""

from __future__ import annotations

import pytest
import torch

from bench.states import SMOOTHED, said, smoothed, verdict, within


def test_smoothed_is_the_mean_of_the_last_steps() -> None:
    curve = [float(i * i) for i in range(25)]
    found = smoothed([curve])[0]
    assert found[0] == 0 and found[1] == 0.5
    assert found[24] == pytest.approx(sum(curve[-SMOOTHED:]) / SMOOTHED)


@pytest.mark.parametrize(("moved", "ratio", "passed"), [
    ([[0.1, -0.1, 0.2], [0.0, 0.1, 0.0], [0.1, 0.0, 0.0]], (0.08 / 20) ** 0.5, True),
    ([[9.0, 9.0, 9.0]] * 3, (729 / 20) ** 0.5, False),
    ([[4.0, 0.0, 0.0], [-4.0, 0.0, 0.0], [0.0] * 3], (32 / 20) ** 0.5, False),  # a mean hides it
])
def test_verdict(moved: list[list[float]], ratio: float, passed: bool) -> None:
    plain = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 4.0], [2.0, 4.0, 6.0]])
    found = verdict(plain, plain + torch.tensor(moved))
    # pairs differ by 2, 1, 0; 1, 2, 2; 1, 1, 2: squares add up to 20
    assert found["ratio"] == pytest.approx(ratio)
    assert (found["steps"], found["passed"]) == (3, passed)


def test_a_curve_is_within_the_range_of_others() -> None:
    others = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 8.0]])
    assert within(torch.tensor([1.0, 2.5, 9.0]), others) == 2


def test_page_and_report_compute_from_the_curves() -> None:
    torch.manual_seed(0)
    fp32 = torch.randn(4, 30).cumsum(1)
    near, far = fp32 + 0.05 * torch.randn(4, 30), fp32 + 40.0
    lines = said({"curves": {"fp32": fp32.tolist(), "8bit": near.tolist(), "bf16": far.tolist()}})
    assert lines[0].startswith("8bit: differs") and ": within the seed-to-seed" in lines[0]
    assert lines[1].startswith("bf16: differs") and "NOT within" in lines[1]
