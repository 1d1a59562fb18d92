"""Joules that a GPU took, by its own counter (NVML), where the driver has one.

The counter covers the whole card, other processes included, and is renewed a few times a second:
`joules` runs a call for longer than that. Through pynvml where that is installed, else from the
driver's library itself.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

LIBRARY = "libnvidia-ml.so.1"
#: A call is repeated for so long: ten renewals of a counter renewed every 0.1 s.
SECONDS = 1.0


class Counter(Protocol):
    """What is read of NVML."""

    def driver(self) -> str:
        """The driver's version."""

    def millijoules(self, uuid: str) -> int:
        """Taken by the card of this name ("GPU-...") since the driver was loaded."""


class _Library:
    """The driver's library, called directly."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(LIBRARY)
        self._call("nvmlInit_v2")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status:
            raise OSError(f"{name} gave {status}")

    def driver(self) -> str:
        text = ctypes.create_string_buffer(96)
        self._call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text)))
        return text.value.decode()

    def millijoules(self, uuid: str) -> int:
        handle, taken = ctypes.c_void_p(), ctypes.c_ulonglong()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(taken))
        return taken.value


class _Package:
    """The same through pynvml (nvidia-ml-py)."""

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()

    def driver(self) -> str:
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def millijoules(self, uuid: str) -> int:
        handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _text(found: str | bytes) -> str:
    return found.decode() if isinstance(found, bytes) else found


@functools.cache
def counter() -> Counter | None:
    """NVML, opened once a process; None where there is none."""
    for made in (_Package, _Library):
        try:
            return made()
        except Exception:  # no package, no library, no driver behind it: pynvml has its own errors
            continue
    return None


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without one."""
    try:
        found = counter()
        return None if found is None else found.driver()
    except Exception:
        return None


def joules(call: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float | None:
    """Joules that the card took a call, over calls for `seconds`; None where nothing counts them.

    Args:
        device: of type "cuda"; others count nothing.
    """
    found = counter() if device.type == "cuda" else None
    if found is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return taken(call, functools.partial(_read, found, uuid), seconds,
                 functools.partial(torch.cuda.synchronize, device))


def _read(found: Counter, uuid: str) -> int | None:
    try:
        return found.millijoules(uuid)
    except Exception:  # a card without the counter, or closed to this user
        return None


def taken(call: Callable[[], Any], read: Callable[[], int | None], seconds: float,
          synchronize: Callable[[], Any]) -> float | None:
    """Joules a call, by a counter of millijoules; None where that cannot be read."""
    synchronize()
    before, begun, count = read(), time.perf_counter(), 0
    if before is None:
        return None
    while count == 0 or time.perf_counter() - begun < seconds:
        call()
        synchronize()
        count += 1
    after = read()
    return None if after is None else (after - before) / 1e3 / count
