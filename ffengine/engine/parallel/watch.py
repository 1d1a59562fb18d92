"""One rank's end is everybody's: who dies, hangs or fails is named on all of them.

Every rank has a thread that shows signs of life in the store, judges whether its own rank makes
progress, and reads what others found. The first finding is the run's: a rank that raised says so
itself, one whose connection closed or whose signs stopped has died, one that neither works nor
waits hangs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from ffengine.engine.parallel.ranks import Ranks
from ffengine.engine.run.stopping import TrainingStopped

T = TypeVar("T")
#: Seconds between two looks at the store, and without a sign of life until a rank counts as dead
#: where some connection has closed.
EVERY, DEAD = 0.25, 3.0
#: Seconds that a rank has to raise, and others to read why, before its process is ended.
GRACE = 2.0


class StageFailed(TrainingStopped):
    """A rank of the run died, hung or failed; one line names rank, stage and cause."""


class Watch:
    """`with Watch(...) as watch:` around what all ranks do together.

    Args:
        name: of the stage of a rank.
        timeout: seconds without progress after which a rank hangs.
    """

    def __init__(self, ranks: Ranks, name: Callable[[int], str], timeout: float) -> None:
        self.ranks, self.name, self.timeout = ranks, name, timeout
        self.store = ranks.connect()  # a client's calls wait for each other
        self.found: str | None = None
        self._closed = False
        self._beat, self._waits = time.monotonic(), ""
        self._over, self._raised = threading.Event(), threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        self.store.set_timeout(timedelta(seconds=GRACE))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StageFailed):
            self.report(self.ranks.rank, " ".join(str(error).split()) or type(error).__name__)
        try:
            if kind is None:  # nobody reads a rank's silence as its death once all are here
                self.call(self.ranks.everyone, "all ranks")
            elif self.found is not None:
                self._told()
        finally:
            self._over.set()
            self._thread.join()
        if self.found is not None and isinstance(error, Exception):
            raise StageFailed(self.found) from error

    def beat(self) -> None:
        """This rank makes progress."""
        self._beat = time.monotonic()
        if self.found is not None:
            self._raised.set()
            raise StageFailed(self.found)

    def until(self, ready: Callable[[float], bool], what: str) -> None:
        """Wait for others: `ready` waits so many seconds and says whether it has come."""
        self.beat()
        self._waits = what
        try:
            while not ready(EVERY):
                if self.found is not None:
                    self.beat()
        finally:
            self._waits = ""
        self.beat()

    def call(self, collective: Callable[[], T], what: str) -> T:
        """Do what all ranks do together, which waits for the last of them: in a thread, so that
        this one hears why it may wait in vain."""
        made: list[T] = []
        lost: list[Exception] = []

        def run() -> None:
            try:
                made.append(collective())
            except Exception as error:
                lost.append(error)

        thread = threading.Thread(target=run, daemon=True, name="together")
        thread.start()

        def ready(seconds: float) -> bool:
            thread.join(seconds)
            return not thread.is_alive()

        self.until(ready, what)
        if lost:
            self._closed, end = True, time.monotonic() + DEAD + GRACE
            # the watch soon knows whose connection has closed
            self.until(lambda seconds: self._over.wait(seconds) or time.monotonic() > end, what)
            raise lost[0]
        return made[0]

    def lost(self, rank: int) -> None:
        """A rank's connection closed; one that ends for a reason has given it by then."""
        time.sleep(2 * EVERY)
        if not self._over.is_set():
            self.report(rank, "died: its connection closed")

    def report(self, rank: int, cause: str) -> None:
        """Tell all ranks what is wrong, unless they know something already."""
        said = f"[pipeline] rank {rank}, {self.name(rank)}: {cause}"
        with contextlib.suppress(RuntimeError):  # the store may have gone
            said = self.store.compare_set("fault", "", said).decode()
        self.found = self.found or said

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            try:
                self._look()
            except RuntimeError:  # who kept the store keeps it no more
                self.found = self.found or (f"[pipeline] rank 0, {self.name(0)}: died: its store "
                                            "does not answer")
            if self.found is not None:
                self._ending()
                return

    def _look(self) -> None:
        me, now = self.ranks.rank, time.monotonic()
        self.store.set(f"alive/{me}", f"{now} {'waits' if self._waits else 'works'}")
        if self.store.check(["fault"]):
            self.found = self.store.get("fault").decode()
            return
        idle = now - self._beat
        if not self._waits and idle > self.timeout:
            self.report(me, f"hangs: no progress in {self.timeout:g} s")
        elif idle > 2 * self.timeout and len(self._seen) == self.ranks.size and all(
                sign.endswith(b"waits") for sign, _ in self._seen.values()):
            self.report(me, f"hangs: waits for {self._waits}, as all others do")
        for rank in range(self.ranks.size):
            self._look_at(rank, now)

    def _look_at(self, rank: int, now: float) -> None:
        key = f"alive/{rank}"
        sign = self.store.get(key) if self.store.check([key]) else b""
        before, since = self._seen.get(rank, (None, now))
        if sign != before:
            self._seen[rank] = sign, now
        elif rank != self.ranks.rank and now - since > (DEAD if self._closed else self.timeout):
            self.report(rank, f"died: no sign of life in {now - since:.0f} s")

    def _ending(self) -> None:
        """The main thread raises at its next beat; one that has none is ended with its process."""
        if not self._raised.wait(GRACE) and not self._over.is_set():
            print(f"ffengine: {self.found}", file=sys.stderr, flush=True)
            os._exit(2)

    def _told(self) -> None:
        """Who keeps the store keeps it until the others, if they live, have read why."""
        self._raised.set()
        end, keys = time.monotonic() + GRACE, [f"told/{r}" for r in range(self.ranks.size)]
        with contextlib.suppress(RuntimeError):
            self.store.set(keys[self.ranks.rank], "")
            while time.monotonic() < end and not self.store.check(keys):
                time.sleep(EVERY / 2)
