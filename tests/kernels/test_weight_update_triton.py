"""The Triton optimizer step against torch.optim, and its checks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ffengine.ops.optim import OptimConfig, OptimState
from tests import compressed_step_cases
from tests.kernels.optimizer_cases import (
    BASE,
    CASES,
    COMPRESSED,
    FROM_MEMORY,
    check,
    check_row,
    compressed_step,
)


@pytest.mark.parametrize("case", [*CASES, *COMPRESSED, *FROM_MEMORY])
def test_interpreted(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", FROM_MEMORY)
def test_from_memory_compiled(case: str) -> None:
    check_row(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_states_compiled(name: str) -> None:
    compressed_step_cases.check(name, COMPRESSED[name], compressed_step, "cuda")


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
    ({"kind": "sgd", "row": torch.zeros(3)}, r"row must be contiguous float32 \(8,\), got "),
    ({"kind": "sgd", "half": torch.zeros(4)}, r"half must be bfloat16 or float16 beside a float32"),
    ({"kind": "sgd", "half": torch.zeros(5).half()}, r"half must have the weight's shape \(4,\)"),
    ({"kind": "sgd", "half": torch.zeros(8).half()[::2]}, r"half must lie in memory as the weight"),
])
def test_rejects(change: dict[str, object], message: str) -> None:
    from ffengine.kernels.weight_update import optimizer_step

    tensors = {name: torch.zeros(4) for name in ("weight", "grad", "m", "v")}
    step = change.get("step", 1)
    tensors |= {k: v for k, v in change.items() if k in tensors}
    tensors |= {k: v for k, v in change.items() if k in ("row", "half")}
    settings = {**BASE, **{k: v for k, v in change.items() if k in (*BASE, "kind")}}
    with pytest.raises((ValueError, TypeError), match=r"\[weight_update\] .*" + message):
        optimizer_step(**tensors, optim=SimpleNamespace(**settings), step=step, inv_scale=1.0)


@pytest.mark.parametrize(("change", "message"), [
    ({"m": torch.zeros(300)}, r"v must be float32, got torch.uint8"),
    ({"v": torch.zeros(300).bfloat16()}, r"v must be uint8, got torch.bfloat16"),
    ({"v_scale": None}, r"v_scale must be float32 \(2,\), got None"),
    ({"m_scale": torch.zeros(1)}, r"m_scale must be float32 \(2,\), got .*\(1,\)"),
    ({"weight": torch.zeros(300).half()}, r"weight must be float32, got torch.float16"),
    ({"grad": torch.zeros(299)}, r"grad must have the weight's shape \(300,\), got \(299,\)"),
])
def test_rejects_compressed(change: dict[str, torch.Tensor | None], message: str) -> None:
    given = {"weight": torch.zeros(300), "grad": torch.zeros(300),
             "m": torch.zeros(300, dtype=torch.uint8), "v": torch.zeros(300, dtype=torch.uint8),
             "m_scale": torch.zeros(2), "v_scale": torch.zeros(2), **change}
    weight, grad = given.pop("weight"), given.pop("grad")
    with pytest.raises((ValueError, TypeError), match=r"\[weight_update\] " + message):
        compressed_step(weight, grad, OptimState(**given), OptimConfig("adamw"), 1.0)
