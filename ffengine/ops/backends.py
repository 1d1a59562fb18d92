"""Which back-end runs an op, and why.

`reference` is plain PyTorch and always there; `cpu` and `cuda` live in the C++ module
`ffengine._C`; `triton` needs a CUDA GPU, or TRITON_INTERPRET=1 to run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
#: What `auto` tries, in order, for a device; no GPU row of bench/results ranks cuda first yet.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

log = logging.getLogger("ffengine")


def exact(device: str) -> contextlib.AbstractContextManager[object]:
    """Around products of the library on a GPU: full fp32 ones, and the same result every time,
    unless `allowing` says otherwise. Inside another one it costs nothing: a step has one around
    all of it. What was set before comes back at the end."""
    if device != "cuda" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _flags


class _Flags:
    """torch's switches for what the library may do, which hold for the whole process."""

    def __init__(self) -> None:
        self.tf32, self.deterministic = False, True
        self._depth = 0
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            cudnn = torch.backends.cudnn
            self._set(cudnn, "enabled", True)
            self._set(cudnn, "benchmark", False)
            self._set(cudnn, "deterministic", self.deterministic)
            for owner, name, value in _products(self.tf32):
                self._set(owner, name, value)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        if before != value:
            self._before.append((owner, name, before))
            setattr(owner, name, value)

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        while not self._depth and self._before:
            setattr(*self._before.pop())


def _products(tf32: bool) -> list[tuple[Any, str, Any]]:
    """(owner, name, value) of the switches for convolutions and matrix products, in order.

    The older ones, allow_tf32, may not even be read once a caller has set these. A part follows the
    whole until somebody sets it: the whole goes first, a part only where it still differs, so that
    afterwards it follows again.
    """
    cudnn: Any = torch.backends.cudnn  # torch leaves its parts without annotations
    matmul = torch.backends.cuda.matmul
    return [(owner, "fp32_precision", "tf32" if tf32 else "ieee")
            for owner in (torch.backends, cudnn, cudnn.conv, matmul)]


_flags = _Flags()


@contextlib.contextmanager
def allowing(*, tf32: bool = False, nondeterministic: bool = False) -> Iterator[None]:
    """Inside, GPU products may round fp32 operands to TF32, or differ from run to run.

    For comparisons in which every side may: the default, and what every test holds for, is neither.

    Raises:
        RuntimeError: a step is under way.
    """
    if _flags._depth:
        raise RuntimeError("[backends] allowing(...) expected to be entered outside of a step, got "
                           "one inside")
    before = _flags.tf32, _flags.deterministic
    _flags.tf32, _flags.deterministic = tf32, not nondeterministic
    try:
        yield
    finally:
        _flags.tf32, _flags.deterministic = before


@functools.cache
def extension() -> ModuleType | None:
    """The compiled module ffengine._C, or None where it was not built."""
    try:
        return importlib.import_module("ffengine._C")
    except ImportError:
        return None


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
        if device == "cuda" or (device == "cpu" and interpreting()):
            return None
        return f"tensors are on {device} and TRITON_INTERPRET is not 1"
    if device != "cuda":
        return f"tensors are on {device}"
    ext = extension()
    if ext is None or not ext.has_cuda:
        return "the CUDA kernels are not built (no nvcc?)"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
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


@functools.cache
def _auto(op: str, device: str, dtype: torch.dtype) -> str:
    reasons: list[str] = []
    for backend in AUTO_ORDER.get(device, ("reference",)):
        reason = why_not(backend, device, dtype)
        if reason is None:
            if reasons and backend == "reference" and dtype is not torch.float64:
                log.warning("[%s] runs on the reference: %s", op, "; ".join(reasons))
            return backend
        reasons.append(f"{backend}: {reason}")
    return "reference"
