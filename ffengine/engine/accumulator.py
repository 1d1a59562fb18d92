"""Where gradients of a batch's micro-batches add up: a sum a parameter, and what a piece adds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ffengine.ops.memory_accounting import allocating
from ffengine.ops.optimizer_step import step_dtype


class Accumulation(NamedTuple):
    """Where a gradient goes: its sum so far, whether this completes it, its share of the batch."""

    total: torch.Tensor | None = None
    last: bool = True
    share: float = 1.0


class GradientAccumulator:
    """Gradients of a batch's pieces, per parameter and owner of its optimizer states."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], torch.Tensor] = {}
        #: Of the batch's rows, those of the present piece.
        self.share = 1.0
        #: The present piece is the last: its gradient completes the sum and the optimizer steps.
        self.last = False

    def of(self, parameter: torch.Tensor, owner: str = "") -> torch.Tensor:
        """The sum so far, fp32 (fp64) in the parameter's layout."""
        key = (id(parameter), owner)
        if key not in self._sums:
            with allocating("gradient"):
                self._sums[key] = torch.zeros_like(parameter, dtype=step_dtype(parameter.dtype),
                                                   requires_grad=False)
        return self._sums[key]

    def tensors(self) -> list[torch.Tensor]:
        """Every sum, for the meter."""
        return list(self._sums.values())
