"""Denormal numbers as zeros while a CPU computes a step.

Goodness is a sum of squares: once positive and negative samples are far apart, the loss's
derivative, e to the minus their distance, ends below 1e-38, and so do the gradients it scales. A
core takes ten times as long for a product of such numbers (bench/TRAPS.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ffengine.ops import backends


@contextlib.contextmanager
def flushed(device: torch.device) -> Iterator[None]:
    """Inside, all threads that compute on this CPU take numbers below 1.2e-38 (fp32) as zeros; GPUs
    compute with them at full speed. The setting that was in force comes back at the end."""
    ext = backends.extension()
    if device.type != "cpu" or ext is None:
        yield
        return
    torch.get_num_threads()  # a new thread of the host takes torch's number when it first asks
    before = ext.flush_denormals(True)
    try:
        yield
    finally:
        ext.flush_denormals(before)
