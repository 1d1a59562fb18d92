"""A run's rows as JSON lines, appended as they are measured, and read back unchanged or not at all.

The first line of a file says where, when and with what it was measured (bench.machine.facts, and
whether it was a GPU's run or a rehearsal); each other line is a row. A line's checksum covers it
and the checksum of the line before: a line that was edited, added or taken out is found. Nothing
but the standard library is imported here: whoever ends a dead process writes its row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Raised when the meaning of a field changes.
FORMAT = 1
#: What a file may be of.
KINDS = ("gpu", "rehearsal")
Row = dict[str, Any]


class Records:
    """Appends rows to a file, which begins with the facts.

    Args:
        facts: of the run; `kind` is one of KINDS.
    """

    def __init__(self, path: Path, facts: Row) -> None:
        self.path = path
        lines = _whole_lines(path)
        if path.exists() and path.stat().st_size > sum(len(line) for line in lines):
            os.truncate(path, sum(len(line) for line in lines))  # a line that a kill cut off
        self._last = json.loads(lines[-1])["checksum"] if lines else ""
        if not lines:
            self.add("facts", format=FORMAT, **facts)

    def add(self, record: str, **values: Any) -> Row:
        """One line, there when this returns."""
        row = plain({"record": record, **values})
        row["checksum"] = self._last = checksum(row, self._last)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def read(path: Path) -> tuple[Row, list[Row]]:
    """(facts, rows) of a file.

    Raises:
        ValueError: one line: empty, unreadable, edited, of another format.
    """
    found: list[Row] = []
    last = ""
    try:
        for line in _whole_lines(path):
            row = json.loads(line)
            last = checksum(row, last)
            if row.pop("checksum") != last:
                raise ValueError(f"line {len(found) + 1} or the one before was edited by hand; "
                                 "measure it again")
            found.append(row)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as bad:
        raise ValueError(f"[records] expected a run's JSON lines, got {path}: {bad}") from None
    except ValueError as bad:
        raise ValueError(f"[records] {path}: {bad}") from None
    if not found or found[0].get("record") != "facts":
        came = repr(found[0].get("record")) if found else "nothing"
        raise ValueError(f"[records] {path}: expected facts on the first line, got {came}")
    facts = found[0]
    for name, wanted in (("format", (FORMAT,)), ("kind", KINDS)):
        if facts.get(name) not in wanted:
            raise ValueError(f"[records] {path}: expected {name} {' or '.join(map(str, wanted))}, "
                             f"got {facts.get(name)!r}")
    return facts, found[1:]


def latest(rows: list[Row]) -> list[Row]:
    """The last row of every record and name, where the first stood: later ones know more."""
    return list({(r["record"], r.get("name")): r for r in rows}.values())


def checksum(row: Row, before: str) -> str:
    """SHA-256 of a row without its own checksum, after that of the line before."""
    rest = {k: v for k, v in row.items() if k != "checksum"}
    return hashlib.sha256((before + json.dumps(rest, sort_keys=True)).encode()).hexdigest()


def plain(value: Any) -> Any:
    """What JSON holds: tuples are lists, keys are text, and no number is infinite or NaN."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


def _whole_lines(path: Path) -> list[bytes]:
    """The file's lines but for a last one without its end."""
    return list(_ended(path.read_bytes())) if path.exists() else []


def _ended(content: bytes) -> Iterator[bytes]:
    for line in content.splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield line
