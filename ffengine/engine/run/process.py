"""The process around a training step: what it held at most, and what its heap keeps.

A memory budget is of tensors. The C library's heap keeps what they free for later use: blocks of up
to 32 MB, as its own rule learns from what a program frees. Blocks of at least THRESHOLD bytes are
given back at once where a budget is set.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch

#: Bytes from which a freed block goes back to the system, and of free heap from which its top does.
THRESHOLD = 4 << 20
#: mallopt's names of the two, in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: The environment's own word on them, which stands.
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def device_for(net: torch.nn.Module, asked: torch.device | str | None,
               budget: int | None) -> torch.device:
    """The device asked for, or where the network is; where a budget of bytes is to hold on the CPU,
    the process's heap is told.

    Raises:
        ValueError: no such device, or one that torch does not see.
    """
    try:
        device = torch.device(asked) if asked else next(net.parameters()).device
    except RuntimeError:
        raise ValueError(f"[trainer] device expected cpu or cuda, got {str(asked)!r}") from None
    if device.type == "meta":
        raise ValueError("[trainer] device expected one with memory, got meta")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"[trainer] device {device} cannot run here: torch sees no GPU; usable: "
                         "cpu")
    if device.type == "cpu" and budget is not None:
        give_back()
    return device


def high_water() -> int:
    """The most bytes that the process has held in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back(threshold: int = THRESHOLD) -> bool:
    """Tell glibc to return freed blocks of at least `threshold` bytes to the system, in the whole
    process from now on; False where it is not glibc's heap, or the environment says otherwise.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name in os.environ for name in VARIABLES):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    taken = [library.mallopt(name, threshold) for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)]
    return all(taken)
