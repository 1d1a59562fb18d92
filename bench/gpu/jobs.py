"""A stage's rows in a process that may die: `python -m bench.gpu.jobs MODULE ...`.

A kernel that reads past its end takes the whole process's CUDA context with it, one that never ends
takes the process, and nobody has seen these kernels run. So a stage's rows are jobs of a worker
(bench.gpu.work) that says which one it has in hand; when it dies, loses its context or does not
answer, the job becomes a failed row and another worker goes on behind it. Nothing but the standard
library is imported here.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.records import Records, latest, read
from bench.gpu.run import DONE, FAILED, INCOMPLETE, PATIENCE

#: Exit status of a worker whose CUDA context is gone.
LOST = 75
#: Workers after the first: each costs seconds to start.
MOST_RESTARTS = 4
#: Seconds that a worker may take to its first job, between jobs, and to leave.
BETWEEN_SECONDS = 60.0
OVER = "the stage's time was over"


@dataclass
class State:
    """Where a worker stands: jobs that ended, the one in hand, since when, and those left out."""

    ended: list[str] = field(default_factory=list)
    hand: str | None = None
    since: float = 0.0
    left: list[str] = field(default_factory=list)


class Progress:
    """A worker's file: a line when a job begins and when it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str, value: str | list[str]) -> None:
        """what: begin or end of a job; left: the jobs that there was no time for."""
        with self.path.open("a") as file:
            file.write(json.dumps([what, value, time.monotonic()]) + "\n")

    def read(self) -> State:
        state = State()
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            what, value, state.since = json.loads(line)
            if what == "left":
                state.left = value
                continue
            state.hand = value if what == "begin" else None
            if what == "end":
                state.ended.append(value)
        return state


def main(words: list[str]) -> int:
    args, others = parse(words)
    if "--rehearse" in others:
        args.limit *= PATIENCE
    end = time.monotonic() + args.seconds
    ended: list[str] = []
    lost: list[str] = []
    left: list[str] = []
    for turn in range(1 + MOST_RESTARTS):
        progress = Progress(args.scratch / f"{args.record}-{turn}.progress")
        skip = lost if args.together else [*ended, *lost]
        status, why = worker(args, others, progress, skip, end)
        state = progress.read()
        ended, left = [*ended, *state.ended], state.left
        if status in (DONE, INCOMPLETE):
            break
        if state.hand is not None:
            note(args, state.hand, why)
            lost.append(state.hand)
        elif status == LOST and state.ended:  # the job's own row says what happened
            lost.append(ended.pop())
        else:
            note(args, "start", why)
            break
        if why == OVER:
            break
        print(f"after {lost[-1]} another process goes on: {why}", flush=True)
    return verdict(args, left)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that are the worker's alone."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.jobs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("--file", required=True, help="of the results' folder, for the rows")
    parser.add_argument("--record", required=True, help="what the rows are called")
    parser.add_argument("--limit", type=float, required=True, help="seconds a job")
    parser.add_argument("--together", action="store_true",
                        help="another worker repeats jobs that went well: they are compared")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    return parser.parse_known_args(words)


def worker(args: argparse.Namespace, others: list[str], progress: Progress, skip: list[str],
           end: float) -> tuple[int, str]:
    """Run one worker to its end; (exit status, what ended it)."""
    process = subprocess.Popen(
        [sys.executable, "-m", args.module, *others, "--out", str(args.out), "--scratch",
         str(args.scratch), "--seconds", f"{end - time.monotonic():.1f}", "--file", args.file,
         "--record", args.record, "--progress", str(progress.path), "--skip", json.dumps(skip)],
        stdin=subprocess.DEVNULL)
    begun, why = time.monotonic(), ""
    while process.poll() is None:
        time.sleep(0.05)
        state, now = progress.read(), time.monotonic()
        limit = BETWEEN_SECONDS if state.hand is None else args.limit
        if not why and now > end:
            why = OVER
        elif not why and now - (state.since or begun) > limit:
            why = f"no answer in {limit:.0f} s"
        if why:
            process.kill()
    status = process.returncode
    if not why:
        why = (f"the process died: {signal.Signals(-status).name}" if status < 0 else
               "its CUDA context was lost" if status == LOST else f"exit status {status}")
    return status, why


def note(args: argparse.Namespace, name: str, why: str) -> None:
    """The row of a job whose process is no more."""
    facts: dict[str, Any] = json.loads((args.scratch / "facts.json").read_text())
    check = "cut" if why == OVER else "failed"
    Records(args.out / args.file, facts).add(args.record, name=name, check=check, error=why)
    print(f"{name}: {check}: {why}", flush=True)


def verdict(args: argparse.Namespace, left: list[str]) -> int:
    """The stage's exit status, from its rows, and its last line."""
    path = args.out / args.file
    rows = latest([r for r in read(path)[1] if r["record"] == args.record]
                  if path.exists() and path.stat().st_size else [])
    count = {kind: sum(r.get("check") == kind for r in rows)
             for kind in ("ok", "failed", "cut", "absent")}
    said = ", ".join(f"{n} {kind}" for kind, n in count.items() if n) or "no rows"
    print(said + (f"; no time for {', '.join(left)}" if left else ""), flush=True)
    if count["failed"] or not (rows or left):
        return FAILED
    return INCOMPLETE if left or count["cut"] else DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
