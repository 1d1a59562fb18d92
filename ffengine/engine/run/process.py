"""The process around a training step: the device that it runs on, and what it held at most."""

from __future__ import annotations

import resource
import sys

import torch


def device_for(net: torch.nn.Module, asked: torch.device | str | None) -> torch.device:
    """The device asked for, or where the network is.

    Raises:
        ValueError: no such device, or one that torch does not see.
    """
    try:
        here = next(net.parameters()).device
        device = torch.device(asked) if asked else here
    except RuntimeError:
        raise ValueError(f"[trainer] device expected cpu or cuda, got {str(asked)!r}") from None
    if device.type == "meta":
        raise ValueError("[trainer] device expected one with memory, got meta")
    if device.type == "cuda" != here.type and not torch.cuda.is_available():
        raise ValueError(f"[trainer] device {device} cannot run here: torch sees no GPU; usable: "
                         "cpu")
    return device


def high_water() -> int:
    """The most bytes that the process has held in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
