"""What runs under the ops' tests here: aarch64's instructions and its control register."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from ffengine.ops import backends
from ffengine.ops.launch import launch
from ffengine.ops.optim import OptimConfig, OptimState
from ffengine.ops.optimizer_step import step_arguments
from tests.aarch64.build import BUILD

EXTENSION = backends.extension()
KERNELS = sorted(BUILD.glob("module/CMakeFiles/ff_baseline.dir/csrc/cpu/*_kernel.cpp.o"))


def test_the_guest_is_an_aarch64_program() -> None:
    header = (BUILD / "guest").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == 183
    assert EXTENSION is not None and EXTENSION.isas() == ["baseline"]


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name.partition(".")[0])
def test_kernels_use_neon(path: Path) -> None:
    """Four floats an instruction; the products multiply and add in one."""
    text = subprocess.run(["aarch64-linux-gnu-objdump", "-d", str(path)], capture_output=True,
                          text=True, check=True).stdout
    assert text.count(".4s") > 50
    assert "gemm" not in path.name or "fmla" in text


def sgd(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The weight after a step of rate 1, by the guest."""
    assert EXTENSION is not None
    stepped = weight.clone()
    launch("optimizer_step", "cpu", *step_arguments(
        stepped, grad, OptimState(None, None), OptimConfig("sgd", lr=1.0), 1.0))
    return stepped


def test_denormals_are_zeros_when_asked_for_in_every_thread() -> None:
    assert EXTENSION is not None
    smallest = torch.finfo(torch.float32).tiny
    weight, grad = torch.full((1 << 18,), smallest), torch.full((1 << 18,), smallest / 2)
    assert (sgd(weight, grad) == smallest / 2).all()
    assert EXTENSION.flush_denormals(True) is False
    try:
        assert (sgd(weight, grad) == smallest).all()
    finally:
        assert EXTENSION.flush_denormals(False) is True
    assert (sgd(weight, grad) == smallest / 2).all()


def test_settings_reach_every_call() -> None:
    assert EXTENSION is not None
    EXTENSION.set_num_threads(3)
    assert EXTENSION.num_threads() == 3
    EXTENSION.set_num_threads(0)


def test_an_error_comes_back_as_one() -> None:
    assert EXTENSION is not None
    with pytest.raises(ValueError, match="expected an instruction set of this machine"):
        EXTENSION.set_isa("avx2")
    assert EXTENSION.isa() == "baseline"

