"""The progress bar of an epoch, and the line that stays when it is done."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

from ffengine.engine.memory.budget import megabytes
from ffengine.engine.run.history import EpochSums, Row, mean
from ffengine.words import span

#: Seconds between two readings of loss and accuracy: each waits for the device.
READ_EVERY = 1.0


class Progress:
    """`with Progress(...) as bar:` one bar an epoch, where standard error is a terminal and tqdm is
    there; the epoch's line needs neither.

    Args:
        epoch, epochs: the one that the bar is of, of how many.
        done: batches of it that were trained on before.
    """

    def __init__(self, loader: Any, epoch: int, epochs: int, done: int, *, enabled: bool) -> None:
        self.enabled, self.done, self.title = enabled, done, f"epoch {epoch + 1}/{epochs}"
        self.total = len(loader) if hasattr(loader, "__len__") else None
        self._bar: Any = None
        self._read = time.monotonic()

    def __enter__(self) -> Progress:
        if self.enabled:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=self.total, initial=self.done, leave=False, disable=None,
                                 unit="batch", desc=self.title)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, sums: EpochSums, speed: float, peak_bytes: int) -> None:
        """One batch done; loss and accuracy are read now and then."""
        if self._bar is None or self._bar.disable:
            return
        if time.monotonic() - self._read > READ_EVERY:
            self._bar.set_postfix_str(
                f"loss {mean(sums.losses()):.3f}, {'pairs' if sums.pairs else 'accuracy'} "
                f"{100 * sums.accuracy():.1f} %, "
                f"{speed:.0f} img/s, peak {megabytes(peak_bytes)}", refresh=False)
            self._read = time.monotonic()
        self._bar.update()

    def finish(self, row: Row) -> None:
        """The epoch's line."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.close()
        found = (("pairs", row.pair_accuracy), ("train", row.train_accuracy),
                 ("valid", row.valid_accuracy))
        said = "".join(f", {name} {100 * part:.2f} %" for name, part in found if part is not None)
        print(f"{self.title}: loss {row.loss:.4f}{said}, "
              f"{row.images_per_second:.0f} img/s, peak "
              f"{megabytes(row.peak_bytes)}, scored by {span(row.sip_start, row.sip_end)}, "
              f"{row.seconds:.1f} s", file=sys.stderr)
