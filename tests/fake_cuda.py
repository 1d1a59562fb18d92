"""CUDA tensors without a GPU: shapes, dtypes and devices, but no memory and no values.

What a step asks of the host is all there: a number read back, a shape that depends on values, a
copy between host and device. `HostTraffic` sees each of them at dispatch level.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ffengine.ops.host import keeping_constants

#: With an index: without one torch asks the (absent) driver which device is meant.
DEVICE = "cuda:0"


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake, on "cuda:0" too; kernels of ours return at once.

    Without a GPU autograd's engine refuses CUDA tensors: its gradients are then told by their
    shapes alone. Real samples on the host are not pinned: torch has no fake of that.
    """
    with _device_guard(), _shapes_of_gradients(), keeping_constants({}), mock.patch.object(
            torch.Tensor, "pin_memory", lambda t: t), FakeTensorMode(
            allow_non_fake_inputs=True) as mode:
        yield mode


@contextmanager
def _shapes_of_gradients() -> Iterator[None]:
    def grad(outputs: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        several = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        return tuple(torch.empty_like(t, requires_grad=False) for t in several)

    real = torch.autograd.grad
    if not torch.cuda.is_available():
        torch.autograd.grad = grad  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.grad = real


@contextmanager
def _device_guard() -> Iterator[None]:
    """A torch without CUDA, or without a GPU, has nothing that makes a CUDA device the current one,
    and refuses every copy to it: the CPU's, which does nothing, stands in."""
    if torch.cuda.is_available():
        yield
        return
    core = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[1] = guards[1], guards[0]
    try:
        yield
    finally:
        guards[1] = before


class HostTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every copy from the host to a device; anything that waits for the device raises.

    Numbers read back (`item`, `bool`) and results whose shape depends on values (`nonzero`) raise
    in the fake tensors below already.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: (dtype, shape) of what was copied to the device.
        self.sent: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if name in ("aten::copy_", "aten::_to_copy"):
            self._copy(name, args, kwargs)
        return func(*args, **kwargs)

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        source = args[0] if name == "aten::_to_copy" else args[1]
        if name == "aten::_to_copy":
            target = torch.device(kwargs.get("device") or source.device)
            waits = not kwargs.get("non_blocking")
        else:
            target, waits = args[0].device, not (args[2] if len(args) > 2
                                                 else kwargs.get("non_blocking"))
        if source.device.type == target.type:
            return
        came = f"{source.dtype} {tuple(source.shape)} from {source.device} to {target}"
        if target.type == "cpu":
            raise AssertionError(f"a copy to the host waits for the device: {came}")
        if waits:
            raise AssertionError(f"a copy that waits for the device: {came}")
        self.sent.append((source.dtype, tuple(source.shape)))
