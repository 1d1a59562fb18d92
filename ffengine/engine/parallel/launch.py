"""A pipeline on one machine without torchrun: this process is rank 0 and starts the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import torch

from ffengine.engine.parallel.ranks import VARIABLES

#: Set in ranks that another process of this machine has started.
STARTED = "FFENGINE_STARTED"
#: Seconds that ranks have to end by themselves, once rank 0 has.
GRACE = 10.0


def is_started() -> bool:
    """Somebody has started this process as one of several."""
    return "RANK" in os.environ


class Local:
    """`with Local() as processes:` this process is rank 0 from `start` on, until the block ends."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._threads: int | None = None

    def start(self, words: Sequence[str], stages: int) -> None:
        """Run `ffengine WORDS` as the other ranks.

        Cores are dealt out evenly, unless OMP_NUM_THREADS says how many threads a process has.
        """
        before, self._threads = dict(os.environ), torch.get_num_threads()
        threads = before.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // stages))
        meeting = {"WORLD_SIZE": str(stages), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port())}
        for rank in range(1, stages):
            self._started.append(subprocess.Popen(
                [sys.executable, "-m", "ffengine", *words], stdout=subprocess.DEVNULL,
                env={**before, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank),
                     "OMP_NUM_THREADS": threads, STARTED: "1"}))
        os.environ.update(meeting, RANK="0", LOCAL_RANK="0")
        torch.set_num_threads(int(threads))

    def __enter__(self) -> Local:
        return self

    def end(self) -> None:
        """Wait for the ranks to end; those that do not are ended."""
        for process in self._started:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __exit__(self, *error: object) -> None:
        self.end()
        if self._threads is not None:
            for name in (*VARIABLES, "LOCAL_RANK"):
                os.environ.pop(name, None)
            torch.set_num_threads(self._threads)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
