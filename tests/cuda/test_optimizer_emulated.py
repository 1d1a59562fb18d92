"""The CUDA optimizer steps' own source, emulated on the CPU, against fp64."""

from __future__ import annotations

import emulate
import pytest
import torch
from test_optimizer_cuda import CONFIGS, EXTRAS, compressed, compressed_by_row, three_steps

from ffengine.ops.optim import OptimState
from tests.compressed_step_cases import CASES, GRADIENTS_16, check


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate.install(monkeypatch)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("n", [7, 1100])
@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps(name: str, n: int, offset: int) -> None:
    three_steps(name, n, offset, "cpu")


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", CONFIGS)
def test_extras(name: str, offset: int, extras: str) -> None:
    three_steps(name, 1100, offset, "cpu", **EXTRAS[extras])


@pytest.mark.parametrize("name", CASES | GRADIENTS_16)
def test_compressed_step(name: str) -> None:
    check(name, (CASES | GRADIENTS_16)[name], compressed, "cpu")


@pytest.mark.parametrize("name", CASES)
def test_compressed_step_by_row(name: str) -> None:
    check(name, CASES[name], compressed_by_row, "cpu")


def test_half_of_a_bf16_weight_is_refused() -> None:
    weight, optim = torch.zeros(8, dtype=torch.bfloat16), CONFIGS["sgd"]
    with pytest.raises(ValueError, match="16-bit copy expected an fp32 weight, got bf16"):
        compressed(weight, torch.zeros(8), OptimState.create(weight, optim), optim, 1.0,
                   half=torch.empty(8, dtype=torch.float16))
