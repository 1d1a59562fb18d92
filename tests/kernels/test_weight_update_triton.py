"""The Triton optimizer step against torch.optim, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffengine.ops.optim import OptimConfig, OptimState, optim_call
from tests import compressed_step_cases
from tests.kernels.optimizer_cases import (
    CASES,
    COMPRESSED,
    FROM_MEMORY,
    check,
    check_row,
    step,
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
    compressed_step_cases.check(name, COMPRESSED[name], step, "cuda")


def test_bias_corrections_are_formed_in_double() -> None:
    from ffengine.kernels.weight_update import scalars

    s = scalars(optim_call(OptimConfig("adam", lr=0.05), 1), 0.5)
    assert s.step_size == pytest.approx(0.05 / 0.1, rel=1e-14)
    assert s.root_correction == pytest.approx(0.001**0.5, rel=1e-12)
    assert s.inv_scale == 0.5
    assert all(isinstance(value, float) for value in s)


@pytest.mark.parametrize(("change", "message"), [
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
def test_rejects(change: dict[str, Any], message: str) -> None:
    given = {"kind": "adam", "momentum": 0.0, "step": 1, "row": None, "half": None,
             **{name: torch.zeros(4) for name in ("weight", "grad", "m", "v")}, **change}
    state = OptimState(given["m"], given["v"], given["step"] - 1)
    with pytest.raises((ValueError, TypeError), match=r"\[weight_update\] .*" + message):
        step(given["weight"], given["grad"], state, OptimConfig(
            given["kind"], momentum=given["momentum"]), 1.0, given["half"], given["row"])


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
        step(weight, grad, OptimState(**given), OptimConfig("adamw"), 1.0)
