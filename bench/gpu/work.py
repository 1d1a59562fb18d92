"""The worker's side of a stage: its jobs in order, each row written as it is measured."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.gpu.jobs import LOST, Progress
from bench.gpu.records import Records, Row
from bench.gpu.run import DONE, INCOMPLETE
from bench.gpu.session import Session, options

#: A job is not begun with less.
LEAST_SECONDS = 1.0
#: Characters of an error that a row keeps.
ERROR_LENGTH = 600


#: A job's name, and what yields its rows: `name` and `check` are filled in where they are not.
Job = tuple[str, Callable[[], Iterable[Row]]]
Jobs = Callable[[Session, argparse.Namespace], Iterator[Job]]


def worker(doc: str | None, jobs: Jobs, **own: dict[str, Any]) -> int:
    """`main` of a stage's module; `own`: options of its own, as add_argument takes them."""
    parser = options(doc)
    for name in ("file", "record", "progress", "skip"):
        parser.add_argument(f"--{name}", required=True)
    for name, how in own.items():
        parser.add_argument(f"--{name}", **how)
    args = parser.parse_args()
    session, progress = Session(args), Progress(Path(args.progress))
    records = Records(session.out / args.file, session.facts())
    skip = set(json.loads(args.skip))
    left: list[str] = []
    for name, rows in jobs(session, args):
        if name in skip:
            continue
        if session.left() < LEAST_SECONDS:
            left.append(name)
            continue
        progress.add("begin", name)
        clean = run(records, args.record, name, rows)
        progress.add("end", name)
        gc.collect()
        if not clean and not session.lives():
            return LOST
    if left:
        progress.add("left", left)
    return INCOMPLETE if left else DONE


def run(records: Records, record: str, name: str, rows: Callable[[], Iterable[Row]]) -> bool:
    """A job's rows into the file and, in short, to standard output; an exception is a row too.

    Returns whether every row was right.
    """
    clean, begun = True, time.perf_counter()
    try:
        for row in rows():
            made = {"name": name, "check": "ok", "took": time.perf_counter() - begun, **row}
            say(records.add(record, **made))
            clean, begun = clean and made["check"] != "failed", time.perf_counter()
    except Exception as reason:  # whatever it is, it is a row, and no reason to lose the others
        traceback.print_exc(limit=-6, file=sys.stderr)
        say(records.add(record, name=name, check="failed", took=time.perf_counter() - begun,
                        error=error_text(reason)))
        return False
    return clean


def error_text(reason: BaseException) -> str:
    """An exception on one line."""
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"[:ERROR_LENGTH]


def failed(reason: BaseException) -> Row:
    """The fields of a row that an exception made."""
    return {"check": "failed", "error": error_text(reason)}


def say(row: Row) -> None:
    """A row on one line, for the summary."""
    text = row.get("text") or row.get("error") or ""
    print(f"{row['name']}: {row['check']}{': ' if text else ''}{text[:160]}", flush=True)
