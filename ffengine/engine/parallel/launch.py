"""A pipeline on one machine without torchrun: this process is rank 0 and starts the others."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

#: Set in ranks that another process of this machine has started.
STARTED = "FFENGINE_STARTED"
#: Seconds that ranks have to end by themselves, once rank 0 has.
GRACE = 10.0


def is_started() -> bool:
    """Somebody has started this process as one of several."""
    return "RANK" in os.environ


@contextlib.contextmanager
def local(words: Sequence[str], stages: int) -> Iterator[None]:
    """Inside, this is rank 0 of as many processes, the others running `ffengine WORDS`.

    Cores are dealt out evenly, unless OMP_NUM_THREADS says how many threads a process has.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // stages))
    meeting = {"WORLD_SIZE": str(stages), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port())}
    before, used = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(int(threads))
    os.environ.update(meeting, RANK="0", LOCAL_RANK="0")
    started: list[subprocess.Popen[bytes]] = []
    try:
        started += [subprocess.Popen(
            [sys.executable, "-m", "ffengine", *words], stdout=subprocess.DEVNULL,
            env={**before, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "OMP_NUM_THREADS": threads, STARTED: "1"}) for rank in range(1, stages)]
        yield
    finally:
        end(started)
        os.environ.clear()
        os.environ.update(before)
        torch.set_num_threads(used)


def end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for the ranks to end; those that do not are ended."""
    for process in started:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
