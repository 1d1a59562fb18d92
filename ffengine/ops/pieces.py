"""How much of a tensor is looked at in one piece, where the whole would be looked at several times.

On a CPU a piece and its copies stay in a core's cache: measured, beside each use. A GPU gains
nothing there and pays a launch a piece (5 us, predicted): pieces only bound what is live at once.
"""

from __future__ import annotations

import torch

CPU_BYTES, GPU_BYTES = 1 << 20, 64 << 20


def rows_of(t: torch.Tensor, itemsize: int | None = None) -> int:
    """Rows (first dimension) of a piece of t, its elements taken to be `itemsize` wide."""
    piece = CPU_BYTES if t.device.type == "cpu" else GPU_BYTES
    row = t.numel() // max(t.shape[0], 1) * (itemsize or t.element_size())
    return max(1, piece // max(row, 1))
