"""Is head slower than base? Two resident workers, each with its own build, driven by turns.

Both processes live as long as the comparison; one sleeps on its pipe while the other is timed (they
build and check a case's inputs side by side, which is no part of its time). A round is one turn of
each, in the order base, head, head, base, ...; what counts of a round is the ratio of processor
seconds, head / base, of two turns a few hundredths of a second apart. A case is slower if in three
looks one after the other
  - the median ratio exceeds 1 + the case's threshold (it matters), and
  - so does, with half the threshold, the lower end of a one-sided 99.5 % confidence interval of the
    median, from the ratios' order statistics (it is not chance).
Later looks are part of the procedure, are half as long again, and run in new processes with new
inputs: where a pair's memory happened to lie is not a regression. Two looks were not enough: one
run in 21 saw the same build 1.4 times as slow in both, on a sweep over 6 MB (why is not known).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import statistics
import subprocess
import sys
import time
from math import comb
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).resolve().parent.parent
ROUNDS = 21
CONFIDENCE = 0.995
#: Seconds of the first look over all cases, the start of the workers included; a case gets an equal
#: share of what is left.
SECONDS = 34.0
#: Fewer rounds decide nothing: a case that has not had them when OVERTIME times those seconds are
#: over is a row that says so.
LEAST_ROUNDS, OVERTIME = 9, 1.25
#: Seconds that a worker may take to answer.
PATIENCE = 120.0

Row = dict[str, Any]


class WorkerLost(Exception):
    """A worker could not start, died, or did not answer: which side's, and why."""

    def __init__(self, side: str, reason: str) -> None:
        super().__init__(f"{side}: {reason}")
        self.side = side


class Side:
    """A worker process and the pipe to it."""

    def __init__(self, name: str, tree: Path) -> None:
        self.name, self.tree = name, tree
        quiet = {k: v for k, v in os.environ.items()
                 if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
        self.process = subprocess.Popen(
            [sys.executable, str(HARNESS / "bench" / "worker.py"), str(tree), str(HARNESS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            env={**quiet, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"})
        self.hello: Row = {}

    def ask(self, **request: Any) -> Row:
        self.send(**request)
        return self.receive()

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerLost(self.name, self.end()) from None

    def receive(self) -> Row:
        out = self.process.stdout
        assert out is not None
        with selectors.DefaultSelector() as ready:
            ready.register(out, selectors.EVENT_READ)
            if not ready.select(PATIENCE):
                self.end()
                raise WorkerLost(self.name, f"no answer in {PATIENCE:.0f} s")
        line = out.readline()
        if not line:
            raise WorkerLost(self.name, self.end())
        return dict(json.loads(line))

    def end(self) -> str:
        """Stop the process; how it ended."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # of a worker that is gone already
                pipe.close() if pipe is not None else None
        try:  # the end of its input ends it, unless it is inside a call
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        return f"the worker ended with status {status}"


class Pair:
    """Both workers, of which one at a time has a turn."""

    def __init__(self, base: Path, head: Path) -> None:
        self.trees = {"base": base, "head": head}
        self.sides: dict[str, Side] = {}
        self.start()

    def start(self) -> None:
        self.stop()
        self.sides = {name: Side(name, tree) for name, tree in self.trees.items()}
        for side in self.sides.values():  # both are importing meanwhile
            side.hello = side.receive()
            if "failed" in side.hello:
                raise WorkerLost(side.name, side.hello["failed"])

    def stop(self) -> None:
        for side in self.sides.values():
            side.end()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def names(self, side: str) -> dict[str, float]:
        return dict(self.sides[side].hello["names"])

    def look(self, name: str, threshold: float, rounds: int, until: float, last: float) -> Row:
        """One row: the case's ratios and what they say; a lost worker is a failing row.

        Args:
            until, last: times on the monotonic clock; after `until` the least number of rounds is
                enough, and after `last` there are no more.
        """
        try:
            return self._look(name, threshold, rounds, until, last)
        except WorkerLost as lost:
            self.start()
            return {"name": name, "status": "failed" if lost.side == "head" else "new",
                    "reason": str(lost)}

    def _look(self, name: str, threshold: float, rounds: int, until: float, last: float) -> Row:
        if time.monotonic() > last:
            return {"name": name, "status": "untimed", "reason": "no time was left"}
        for worker in self.sides.values():
            worker.send(do="prepare", name=name)
        made = {side: worker.receive() for side, worker in self.sides.items()}
        row: Row = {"name": name, "threshold": threshold}
        if "count" not in made["head"]:
            gone = "missing" in made["head"]
            return {**row, "status": "gone" if gone else "failed",
                    "reason": made["head"].get("failed", "head has no such case")}
        if "count" not in made["base"]:
            return {**row, "status": "new",
                    "reason": made["base"].get("failed", "base has no such case")}
        count, turns = made["base"]["count"], {side: [] for side in self.sides}
        for i in range(rounds):
            if time.monotonic() > (until if i >= LEAST_ROUNDS else last):
                break
            for side in ("base", "head") if i % 2 == 0 else ("head", "base"):
                answer = self.sides[side].ask(do="turn", count=count)
                if "failed" in answer:
                    status = "failed" if side == "head" else "new"
                    return {**row, "status": status, "reason": f"{side}: {answer['failed']}"}
                turns[side].append(answer)
        if len(turns["head"]) < LEAST_ROUNDS:
            return {**row, "status": "untimed",
                    "reason": f"{len(turns['head'])} rounds in its time: the machine is too busy"}
        return {**row, **verdict(turns["base"], turns["head"], threshold)}


def verdict(base: list[Row], head: list[Row], threshold: float) -> Row:
    """Median ratio of processor time, the confidence limits around it, and what they mean."""
    ratios = sorted(h["cpu"] / b["cpu"] for b, h in zip(base, head, strict=True))
    k = rank(len(ratios))
    ratio, low, high = statistics.median(ratios), ratios[k], ratios[-1 - k]
    slower = ratio > 1 + threshold and low > 1 + threshold / 2
    status = "slower" if slower else "ok" if high <= 1 + threshold or ratio <= 1 + threshold / 2 \
        else "inconclusive"
    walls = [h["wall"] / b["wall"] for b, h in zip(base, head, strict=True)]
    return {"status": status, "ratio": ratio, "low": low, "high": high,
            "wall_ratio": statistics.median(walls), "rounds": len(ratios),
            "base_seconds": statistics.median(b["cpu"] for b in base),
            "head_seconds": statistics.median(h["cpu"] for h in head)}


def rank(n: int) -> int:
    """Index of the order statistic that the median of n ratios exceeds with CONFIDENCE."""
    below, k = 0.0, 0
    while k < n // 2:
        below += comb(n, k) / 2**n  # chance that only k ratios fall below the true median
        if below > 1 - CONFIDENCE:
            break
        k += 1
    return max(k - 1, 0)


def compare(base: Path, head: Path, only: list[str] | None = None,
            seconds: float = SECONDS) -> list[Row]:
    """A row a case that either tree has; status ok, slower, inconclusive (slower may be true as
    well as not), failed, new, gone or untimed.

    Args:
        base, head: trees with a built extension each.
        only: names of cases; default all that the gate times.
        seconds: of the first look over all of them; later ones add their own.

    Raises:
        WorkerLost: a tree that cannot be imported.
    """
    begun = time.monotonic()
    with Pair(base, head) as pair:
        wanted = {**pair.names("base"), **pair.names("head")}
        wanted = {n: t for n, t in wanted.items() if only is None or n in only}
        rows = looks(pair, wanted, ROUNDS, begun, seconds)
    for look in ("second_look", "third_look"):
        suspects = [row for row in rows if row["status"] in ("slower", "inconclusive")]
        if not suspects:
            break
        with Pair(base, head) as pair:
            asked = {row["name"]: row["threshold"] for row in suspects}
            share = seconds / 9 * min(len(suspects), 3)
            again = looks(pair, asked, ROUNDS * 3 // 2, time.monotonic(), share)
            for row, seen in zip(suspects, again, strict=True):
                row |= {look: seen, "status": seen["status"]}
    return rows


def looks(pair: Pair, wanted: dict[str, float], rounds: int, begun: float,
          seconds: float) -> list[Row]:
    """A look at each case, in an order drawn anew: on a busy machine it is not always the same ones
    that time runs out for. A case gets an equal share of the time that those before it left."""
    until, last = begun + seconds, begun + OVERTIME * seconds
    found: dict[str, Row] = {}
    for name in random.sample(list(wanted), len(wanted)):
        now = time.monotonic()
        share = max(until - now, 0.0) / (len(wanted) - len(found))
        found[name] = pair.look(name, wanted[name], rounds, now + share, last)
    return [found[name] for name in wanted]


def line(row: Row) -> str:
    """A row for people."""
    if "ratio" not in row:
        return f"{row['status']:7s} {row['name']}: {row['reason']}"
    text = (f"{row['status']:7s} {row['name']}: head / base {row['ratio']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}], {row['rounds']} rounds, base "
            f"{row['base_seconds'] * 1e3:.2f} ms, allowed {1 + row['threshold']:.2f}")
    for look in ("second", "third"):
        again = row.get(f"{look}_look", {})
        if "ratio" in again:
            text += f"; {look} look {again['ratio']:.3f} [{again['low']:.3f}, {again['high']:.3f}]"
    return text
