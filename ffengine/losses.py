"""Local losses on the goodness matrix; any function of (g, y) that gives one loss a row fits too.

    config = LocalPassConfig(groups=10, loss=ff.losses.cwc(clamp=50.0))
"""

from ffengine.ops.config import (
    Loss,
    LossFunction,
    bce,
    ce,
    cwc,
    cwg,
    margin,
    pvn,
    sparsemax,
    symba,
    threshold,
)

__all__ = [
    "Loss", "LossFunction", "bce", "ce", "cwc", "cwg", "margin", "pvn", "sparsemax", "symba",
    "threshold",
]
