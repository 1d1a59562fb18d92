"""Lines of a long queue on standard error: how far each training is, and the time left."""

from __future__ import annotations

import sys
import time

from ffengine.engine.run.history import Row

#: Seconds between two lines of a training.
EVERY = 10.0


class Progress:
    """The lines of one training."""

    def __init__(self, name: str, *, enabled: bool) -> None:
        self.name, self.enabled = name, enabled
        self.began = self.said = time.monotonic()
        self.done = 0

    def resumed(self, epoch: int, epochs: int) -> None:
        self._say(f"goes on after epoch {epoch}/{epochs}")

    def epoch(self, row: Row, epochs: int) -> None:
        """An epoch is done; its line, if the last one is a while ago, or it is the last."""
        self.done += 1
        now, left = time.monotonic(), epochs - row.epoch - 1
        if now - self.said < EVERY and left:
            return
        self.said, each = now, (now - self.began) / self.done
        accuracy = row.train_accuracy if row.valid_accuracy is None else row.valid_accuracy
        told = "" if accuracy is None else f", {100 * accuracy:.2f} % " + (
            "train" if row.valid_accuracy is None else "valid")
        self._say(f"epoch {row.epoch + 1}/{epochs}, loss {row.loss:.4f}{told}, "
                  f"{each:.3g} s an epoch, {duration(left * each)} left")

    def _say(self, text: str) -> None:
        if self.enabled:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """12 s, 3 min, 2 h 5 min, 3 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
