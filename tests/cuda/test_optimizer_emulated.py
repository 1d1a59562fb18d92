"""The CUDA optimizer steps' own source, emulated on the CPU, against fp64."""

from __future__ import annotations

import ctypes

import emulate
import pytest
from test_optimizer_cuda import CONFIGS, three_steps

from tests.compressed_step_cases import CASES, check


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate.build(tmp_path_factory.mktemp("emulated"),
                         ("weight_update.cu", "compressed_step.cu"), "optimizer_entry.cpp")


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("n", [7, 1100])
@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps(name: str, n: int, offset: int, library: ctypes.CDLL) -> None:
    three_steps(name, n, offset, "cpu", lambda *step: emulate.run_step(library, *step))


@pytest.mark.parametrize("name", CASES)
def test_compressed_step(name: str, library: ctypes.CDLL) -> None:
    check(name, CASES[name], lambda *step: emulate.run_compressed(library, *step))
