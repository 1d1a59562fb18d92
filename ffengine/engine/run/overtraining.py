"""A word, once, when a run goes on past its recipe and predicts worse for it."""

from __future__ import annotations

import logging

log = logging.getLogger("ffengine")
#: Points of validation accuracy, of 1, that a run may lose before anybody is told.
POINTS = 0.01


class Overtraining:
    """Watches the validation accuracy of the epochs past the recipe's.

    Args:
        usual: epochs that the recipe trains for.
    """

    def __init__(self, usual: float) -> None:
        self.usual, self._told = usual, False

    def look(self, epoch: int, valid: float | None, best: float | None) -> None:
        """Warn if this epoch's accuracy is below the best by more than POINTS."""
        late = not self._told and epoch >= self.usual
        if late and valid is not None and best is not None and best - valid > POINTS:
            self._told = True
            log.warning("[train] epoch %d predicts %.1f %% of the validation samples right, %.1f "
                        "points less than the best epoch did, and the recipe trains %d epochs: the "
                        "best weights are best.safetensors of the run folder", epoch, 100 * valid,
                        100 * (best - valid), self.usual)
