"""Which back-end runs an op, and why.

`reference` is plain PyTorch and always there; `cpu` and `cuda` live in the C++ module
`ffengine._C`; `triton` needs a CUDA GPU, or TRITON_INTERPRET=1 to run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import re
from types import ModuleType
from typing import NamedTuple

import torch

from ffengine.ops import preferences

BACKENDS = ("reference", "cpu", "triton", "cuda")
#: What `auto` tries, in order, for a device, where no measurement of its own says better.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

#: Compute capabilities below which a back-end has no code. Triton's is what its README has listed
#: since 3.3.
LEAST_CAPABILITY = {"triton": (8, 0), "cuda": (7, 5)}
#: GPUs on one chip with a CPU: machine code runs neither from them on others nor the other way.
INTEGRATED = (53, 62, 72, 87, 101, 110)

log = logging.getLogger("ffengine")


@functools.cache
def extension() -> ModuleType | None:
    """The compiled module ffengine._C, or None where it was not built.

    Raises:
        ValueError: the environment variable FFENGINE_ISA names an instruction set that this
            machine lacks.
    """
    try:
        found = importlib.import_module("ffengine._C")
    except ImportError:
        return None
    found.set_isa("auto")
    return found


def interpreting() -> bool:
    """Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """None if `backend` can run tensors of this device and dtype, else the reason it cannot."""
    if backend == "reference":
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {str(dtype).removeprefix('torch.')} kernels (float32, bfloat16, float16)"
    if backend == "cpu":
        if device != "cpu":
            return f"tensors are on {device}"
        return None if extension() is not None else "the C++ kernels are not built (no compiler?)"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device == "cuda":
            found = gpu()
            return None if found is None else _too_old("triton", found.capability)
        if device == "cpu" and interpreting():
            return None
        return f"tensors are on {device} and TRITON_INTERPRET is not 1"
    if device != "cuda":
        return f"tensors are on {device}"
    ext = extension()
    if ext is None or not ext.has_cuda:
        return "the CUDA kernels are not built: install with nvcc on the PATH or CUDA_HOME set"
    return _build_reason(gpu())


class Gpu(NamedTuple):
    """What of a GPU decides which code it runs."""

    capability: tuple[int, int]
    #: Newest CUDA that its driver supports, as CUDA writes it (13020 is 13.2); 0: unknown.
    driver: int


def gpu() -> Gpu | None:
    """The current one; None where torch sees none."""
    return _gpu(torch.cuda.current_device()) if torch.cuda.is_available() else None


@functools.cache
def _gpu(index: int) -> Gpu:
    return Gpu(torch.cuda.get_device_capability(index), driver_version())


def driver_version() -> int:
    """Newest CUDA that the driver supports; 0 where torch cannot tell, or there is no driver."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return int(ask()) if ask is not None else 0


@functools.cache
def _build_reason(found: Gpu | None) -> str | None:
    """Of the built extension."""
    ext = extension()
    if found is None or ext is None:
        return None
    build = ext.build_info()
    major, minor = (int(n) for n in build["cuda_toolkit"].split(".")[:2])
    return device_reason(build["cuda_architectures"], found.capability, found.driver,
                         1000 * major + 10 * minor)


def _too_old(backend: str, capability: tuple[int, int]) -> str | None:
    least = LEAST_CAPABILITY[backend]
    needs = {"triton": "Triton needs", "cuda": "the CUDA kernels need"}[backend]
    return None if capability >= least else (
        "the device is sm_{}{}, {} sm_{}{} or newer".format(*capability, needs, *least))


def device_reason(architectures: str, capability: tuple[int, int], driver: int,
                  runtime: int) -> str | None:
    """Why code built for `architectures` does not run on a GPU; None if it does. Pure.

    Args:
        architectures: as CMake writes them: "80-real 90" is code for sm_80, and code and PTX of 90.
        capability: the GPU's.
        driver: newest CUDA that its driver supports, 0 if unknown.
        runtime: the CUDA that the build links; versions as CUDA writes them, 13020 is 13.2.
    """
    reason = _too_old("cuda", capability)
    if reason is not None:
        return reason
    if 0 < driver < runtime // 1000 * 1000:
        return (f"the driver supports CUDA {_version(driver)}, this build needs "
                f"{_version(runtime // 1000 * 1000)}: update the driver, or build with CUDA "
                f"{driver // 1000}")
    number = 10 * capability[0] + capability[1]
    if any(_runs(word, number, driver == 0 or driver >= runtime)
           for word in architectures.split()):
        return None
    return (f"this build has {architectures or 'no code'}, the device is sm_{number}: build with "
            f"CMAKE_CUDA_ARCHITECTURES={number}")


def _runs(word: str, device: int, compiles: bool) -> bool:
    """Does what one of CMake's architectures means run on sm_`device`, whose driver compiles the
    build's PTX or not? What is no number is taken to."""
    found = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", word)
    if found is None:
        return True
    built, kind, only = int(found[1]), found[2], found[3]
    family = built // 10 == device // 10 and device not in INTEGRATED and built not in INTEGRATED
    code = built == device or (family and built <= device and kind != "a")
    ptx = built == device or (built <= device and not kind) or (family and kind == "f")
    return (only != "-virtual" and code) or (only != "-real" and compiles and ptx)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def no_gpu_reason(torch_cuda: str | None, driver: int) -> str:
    """Why torch sees no GPU, where one was asked for. Pure.

    Args:
        torch_cuda: the CUDA that torch was built with ("13.0"), or None.
        driver: newest CUDA that the machine's driver supports; 0: there is none.
    """
    if torch_cuda is None:
        return "this torch was built without CUDA"
    major, minor = (int(n) for n in torch_cuda.split(".")[:2])
    if 0 < driver < 1000 * major:
        return (f"the driver supports CUDA {_version(driver)}, this torch needs {major}.{minor}: "
                "update the driver")
    return "no CUDA device"


def resolve(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """The back-end that runs `op`; ValueError if an explicit one cannot, never a silent switch."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(
                f"[{op}] backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}"
            )
        reason = why_not(backend, device, dtype)
        if reason is not None:
            usable = [b for b in BACKENDS if why_not(b, device, dtype) is None]
            raise ValueError(
                f"[{op}] backend {backend!r} cannot run here: {reason}; usable: {', '.join(usable)}"
            )
        return backend
    return _auto(op, device, dtype)


# What torch.compiler.assume_constant_result sets; that imports torch's compile stack (160 MB, 2 s)
# for those too who never compile.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def auto_order(device: str, dtype: torch.dtype) -> tuple[tuple[str, ...], str]:
    """What `auto` tries for tensors of this device and dtype, and the reason for that order."""
    order = AUTO_ORDER.get(device, ("reference",))
    found = None
    if device == "cuda" and torch.cuda.is_available():
        found = preferences.preference(torch.cuda.get_device_name(), dtype)
    if found is None:
        return order, "no measured row of this device ranks them otherwise"
    return (*found.order, *(b for b in order if b not in found.order)), found.why


@functools.cache
def _auto(op: str, device: str, dtype: torch.dtype) -> str:
    reasons: list[str] = []
    for backend in auto_order(device, dtype)[0]:
        reason = why_not(backend, device, dtype)
        if reason is None:
            if reasons and backend == "reference" and dtype is not torch.float64:
                log.warning("[%s] runs on the reference: %s", op, "; ".join(reasons))
            return backend
        reasons.append(f"{backend}: {reason}")
    return "reference"
