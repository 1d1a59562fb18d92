"""The AMX weight gradient on processors without AMX: its own source, tiles in plain C++."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from ffengine.ops import backends
from ffengine.ops.weight_update import conv_shape
from tests.ops.test_weight_update import SHAPES, conv_case, gradient, random_shapes
from tests.tolerances import assert_close

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc/cpu"
WIDE = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mavx512bf16"]
#: Source, flags.
FILES = {
    "weight_update.cpp": [], "gemm_plan.cpp": [], "optimizer.cpp": [],
    "gemm_kernel.cpp": ["-DFF_ISA=baseline"], "optimizer_kernel.cpp": ["-DFF_ISA=baseline"],
    "compressed_kernel.cpp": ["-DFF_ISA=baseline"],
    "gemm_bf16.cpp": WIDE, "gemm_amx.cpp": [*WIDE, f"-include{HERE / 'emulator/amx.h'}"],
}
EXTENSION = backends.extension()

pytestmark = pytest.mark.skipif(
    EXTENSION is None or "avx512bf16" not in EXTENSION.isas(),
    reason="AMX's packing needs AVX-512 BF16, which this machine lacks")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("amx")
    common = ["g++", "-std=c++17", "-O1", "-fPIC", "-fopenmp", "-DFF_HAS_AMX",
              "-DFF_HAS_AVX512BF16"]
    objects = [str(HERE / "emulator/entry.cpp")]
    for name, flags in FILES.items():
        objects.append(str(folder / f"{name}.o"))
        subprocess.run([*common, *flags, "-c", str(CSRC / name), "-o", objects[-1]], check=True,
                       capture_output=True)
    built = folder / "emulated.so"
    subprocess.run([*common, "-shared", *objects, "-o", str(built)], check=True,
                   capture_output=True)
    return ctypes.CDLL(str(built))


def emulated(library: ctypes.CDLL, weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor,
             shape: tuple[int, ...]) -> torch.Tensor:
    grad = torch.zeros_like(weight)
    last = [t.dim() == 4 and not t.is_contiguous() for t in (x, da, weight)]
    library.emulate_gradient(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(da.data_ptr()),
                             ctypes.c_void_p(grad.data_ptr()),
                             (ctypes.c_int64 * 14)(*shape, *last))
    return grad


@pytest.mark.parametrize("layout", ["lll", "ccc", "lcl"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradient_of_a_convolution(shape: tuple[int, ...], layout: str,
                                   library: ctypes.CDLL) -> None:
    weight, x, da, geometry = conv_case(shape, torch.bfloat16, layout)
    got = emulated(library, weight, x, da, conv_shape(tuple(weight.shape), tuple(x.shape),
                                                      geometry))
    exact = gradient(weight.double(), x.double(), da.double(), geometry, "reference")
    same = gradient(weight, x, da, geometry, "reference")
    assert_close(got, exact, same, reduction=max(1, da.numel() // da.shape[1]), what="dW")


def test_gradient_of_any_convolution(library: ctypes.CDLL) -> None:
    for shape in random_shapes(2, 40):
        test_gradient_of_a_convolution(shape, "lll", library)


@pytest.mark.parametrize("shape", [(1, 7, 3), (33, 100, 50), (130, 600, 10)], ids=str)
def test_gradient_of_a_linear_layer(shape: tuple[int, int, int], library: ctypes.CDLL) -> None:
    n, features, out = shape
    rng = torch.Generator().manual_seed(1)
    x = (torch.randn(n, features, generator=rng) + 0.5).bfloat16()
    da, weight = torch.randn(n, out, generator=rng).bfloat16(), torch.zeros(out, features)
    got = emulated(library, weight, x, da, (n, features, 1, 1, out, 1, 1, 1, 1, 1, 0))
    exact = gradient(weight.double(), x.double(), da.double(), None, "reference")
    same = gradient(weight, x, da, None, "reference")
    assert_close(got, exact, same, reduction=n, what="dW")
