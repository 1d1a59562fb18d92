"""Kernels as they are called again and again: a form is bound once, then launched.

Triton's own call binds, specialises and hashes every argument each time, some 12 µs a launch; a
form remembers the compiled kernel of a device and hands its arguments straight to Triton's launcher
(three launches of local_pass: 54 → 18 µs on the stub driver, tests/stub_driver).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from triton.runtime import JITFunction, driver


class Form:
    """A kernel with its compile-time arguments and options.

    Its owner makes one for whatever else decides the machine code: the tensors' dtypes, which of
    them are absent, whole numbers that Triton specialises on. What is left, the tensors' alignment,
    is looked at here. A kernel's parameters are tensors, numbers, compile-time arguments, in this
    order.
    """

    def __init__(self, kernel: Any, *, warps: int, **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self.options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        self.compiled: dict[tuple[int, int], Any] = {}  # by device and alignment

    def launch(self, grid: tuple[int], tensors: tuple[torch.Tensor | None, ...],
               numbers: tuple[Any, ...], usual: bool = True) -> None:
        """Run on a grid's x; `usual`: whole numbers that change from call to call fit 32 bits."""
        if not usual or not isinstance(self.kernel, JITFunction):  # interpreted
            self.kernel[grid](*tensors, *numbers, **self.constants, **self.options)
            return
        vectors = 0  # a bit a tensor: does it begin at a multiple of 16 bytes
        for t in tensors:
            vectors = 2 * vectors + (t is not None and not t.data_ptr() & 15)
        key = driver.active.get_current_device(), vectors
        known = self.compiled.get(key)
        if known is not None:
            known[(grid[0], 1, 1)](*tensors, *numbers, *self.constants.values())
            return
        made = self.kernel[grid](*tensors, *numbers, **self.constants, **self.options)
        if made is not None:  # bench/aot.py launches nothing
            self.compiled[key] = made


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def on_device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes a tensor's device the current one, where there is another."""
    return torch.cuda.device_of(t) if t.is_cuda and _several_devices() else NOWHERE_ELSE


NOWHERE_ELSE: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
