"""The Triton optimizer step against torch.optim, and its checks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.optimizer_cases import BASE, CASES, check


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    check(case, "cuda")


def test_bias_corrections_are_formed_in_double() -> None:
    from ffengine.kernels.weight_update import scalars

    s = scalars(SimpleNamespace(**{**BASE, "kind": "adam", "betas": (0.9, 0.999)}), 1, 0.5)
    assert s.step_size == pytest.approx(0.05 / 0.1, rel=1e-14)
    assert s.root_correction == pytest.approx(0.001**0.5, rel=1e-12)
    assert s.inv_scale == 0.5
    assert all(isinstance(value, float) for value in s)


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "lion"}, r"optimizer must be one of sgd, adam, adamw, got 'lion'"),
    ({"kind": "adam", "m": None}, r"adam needs the state m, got None"),
    ({"kind": "sgd", "momentum": 0.9, "m": None}, r"sgd needs the state m, got None"),
    ({"kind": "adam", "step": 0}, r"step counts from 1, got 0"),
    ({"kind": "adam", "v": torch.zeros(3)}, r"v must have the weight's shape \(4,\)"),
    ({"kind": "adam", "v": torch.zeros(8)[::2]}, r"weight and states must all be contiguous"),
    ({"kind": "adam", "v": torch.zeros(4).double()}, r"v must be float32, got torch.float64"),
])
def test_rejects(change: dict[str, object], message: str) -> None:
    from ffengine.kernels.weight_update import optimizer_step

    tensors = {name: torch.zeros(4) for name in ("weight", "grad", "m", "v")}
    step = change.get("step", 1)
    tensors |= {k: v for k, v in change.items() if k in tensors}
    settings = {**BASE, **{k: v for k, v in change.items() if k in (*BASE, "kind")}}
    with pytest.raises((ValueError, TypeError), match=r"\[weight_update\] .*" + message):
        optimizer_step(**tensors, optim=SimpleNamespace(**settings), step=step, inv_scale=1.0)
