"""The statistics of bench.states on curves drawn by hand."""

from __future__ import annotations

import pytest
import torch

from bench.states import SMOOTHED, smoothed, verdict


def test_smoothed_is_the_mean_of_the_last_steps() -> None:
    curve = [float(i * i) for i in range(25)]
    found = smoothed([curve])[0]
    assert found[0] == 0 and found[1] == 0.5
    assert found[24] == pytest.approx(sum(curve[-SMOOTHED:]) / SMOOTHED)


def test_verdict() -> None:
    plain = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 8.0]])
    near = plain + torch.tensor([[0.5, -0.5, 1.0], [0.0, 0.5, 0.0]])
    assert verdict(plain, near) == {"inside": 3, "steps": 3, "paired": 0.5, "passed": True}
    above = plain + torch.tensor([[0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    assert verdict(plain, above) == {"inside": 2, "steps": 3, "paired": 2.0, "passed": False}
    crossed = plain + torch.tensor([[4.0, 0.0, 0.0], [-4.0, 0.0, 0.0]])  # a mean hides it
    assert verdict(plain, crossed) == {"inside": 3, "steps": 3, "paired": 2.0, "passed": False}
