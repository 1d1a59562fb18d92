"""The queue: trainings in turn, a process for each core, what is finished kept at once.

Where several train at a time each has one thread: small networks gain more by that than by threads
of their own. How many threads a training has follows from the command and the machine alone, not
from what is left to do, so that one that goes on computes as it began.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from ffengine.commands.reproduction.budget import Costs
from ffengine.commands.reproduction.progress import duration
from ffengine.commands.reproduction.training import (
    BUSY,
    DONE,
    FAILED,
    LATE,
    Job,
    attempt,
    set_threads,
)

#: Seconds until a training that another process holds is looked at again.
AGAIN = 1.0


def cores() -> int:
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def width(asked: int | None, trainings: int, device: torch.device) -> int:
    """Trainings at a time: --jobs, else one a core, or one on a GPU."""
    if asked is not None and asked < 1:
        raise ValueError(f"[cli] --jobs expected 1 or more, got {asked}")
    usual = cores() if device.type == "cpu" else 1
    return max(min(asked or usual, trainings), 1)


def work(jobs: Sequence[Job], at_a_time: int, deadline: float | None,
         costs: Costs) -> dict[str, str]:
    """Train what is missing; by recipe, why a training of it came to nothing.

    Raises:
        ValueError, OSError: what the command cannot go on with; trainings under way stop.
        KeyboardInterrupt: after those under way have written their checkpoints.
    """
    wanted = deque(job for job in jobs if job.missing())
    failed: dict[str, str] = {}
    if not wanted:
        return failed
    with workers(at_a_time) as (executor, stop):
        running: dict[Future[tuple[str, str]], Job] = {}
        try:
            while wanted or running:
                while wanted and len(running) < at_a_time:
                    job = wanted.popleft()
                    name = job.cases[-1].file.name
                    if name not in failed and in_time(costs.seconds(job), deadline):
                        running[executor.submit(take, job, deadline)] = job
                    else:
                        failed.setdefault(name, "no time was left for all of it")
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    settle(job, future.result(), wanted, failed, costs, running, at_a_time)
        except KeyboardInterrupt as stopped:
            raise KeyboardInterrupt(str(stopped) or "[reproduce] interrupted; --resume goes on"
                                    ) from None
        except BrokenProcessPool:
            raise RuntimeError(
                "[reproduce] a training's process ended without a word (out of memory?); the same "
                "command goes on, --jobs takes fewer at a time") from None
        finally:
            stop()
    return failed


def settle(job: Job, outcome: tuple[str, str], wanted: deque[Job], failed: dict[str, str],
           costs: Costs, running: dict[Future[tuple[str, str]], Job],
           at_a_time: int) -> None:
    """Note what became of a job; one that another process trains waits at the queue's end."""
    state, why = outcome
    if state == BUSY:
        wanted.append(job)
        if not running and all(other.missing() for other in wanted):
            time.sleep(AGAIN)
    elif state in (FAILED, LATE):
        failed[job.cases[-1].file.name] = why
    elif state == DONE:
        costs.learn(job)
        if not job.args.quiet:
            others = [*wanted, *running.values()]
            print(f"{job.name}: done; {len(others)} to go{left(others, costs, at_a_time)}",
                  file=sys.stderr, flush=True)


def in_time(seconds: float | None, deadline: float | None) -> bool:
    return deadline is None or seconds is None or time.time() + seconds <= deadline


def left(jobs: Sequence[Job], costs: Costs, at_a_time: int) -> str:
    """About how long the rest takes, of which something is known."""
    seconds = [costs.seconds(job) for job in jobs]
    known = [s for s in seconds if s is not None]
    if not known:
        return ""
    more = len(seconds) - len(known)
    told = f" and {more} that nothing is known of" if more else ""
    return f", about {duration(max(sum(known) / at_a_time, max(known)))}{told}"


class Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, call: Callable[..., Any], /, *words: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*words, **more))
        return future


@contextlib.contextmanager
def workers(count: int) -> Iterator[tuple[Executor, Callable[[], None]]]:
    """(an executor of so many processes, or this one; what stops the trainings under way)."""
    if count == 1:
        yield Here(), lambda: None
        return
    context = multiprocessing.get_context("spawn")  # OpenMP hangs in a forked process
    stop = context.Event()
    pool = ProcessPoolExecutor(count, context, begin, (stop, max(cores() // count, 1)))
    try:
        yield pool, stop.set
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


#: In a worker: whether its parent wants it to stop.
stopping: Callable[[], bool] = bool


def take(job: Job, deadline: float | None) -> tuple[str, str]:
    """`attempt`, in a worker or here."""
    return attempt(job, deadline, stopping)


def begin(stop: Any, count: int) -> None:
    """A worker: so many threads, no signals of the terminal, and never without its parent."""
    global stopping
    stopping = stop.is_set
    set_threads(count)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    threading.Thread(target=follow, args=(stop,), daemon=True).start()


def follow(stop: Any) -> None:
    """Pass the parent's wish to stop on as a Ctrl-C; end at once when the parent is dead."""
    parent, told = multiprocessing.parent_process(), False
    while parent is not None and parent.is_alive():
        if not told and stop.wait(0.5):
            signal.raise_signal(signal.SIGINT)
            told = True
        elif told:
            time.sleep(0.5)
    os._exit(1)
