"""Result files: JSON that says where and when it was measured, and that nobody edited it since.

A file holds `kind`, `format`, `version` (of ffengine), `machine` (bench.machine.facts), the
measured values, and `checksum`, the SHA-256 of everything else. `read` refuses, with the reason, a
file whose checksum differs, of another format or kind, and, where asked to, of another machine
class: ratios compare across machines, exact counters and seconds do not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bench import machine
from ffengine.engine.checkpoint import write_atomically

#: Raised when the meaning of a field changes.
FORMAT = 1


def write(path: Path, kind: str, values: dict[str, Any]) -> None:
    """Write measured values; the folder is made."""
    import ffengine

    content = {"kind": kind, "format": FORMAT, "version": ffengine.__version__,
               "machine": machine.facts(), **values}
    content = json.loads(json.dumps(content))  # what a reader will hash: tuples are lists
    path.parent.mkdir(parents=True, exist_ok=True)
    content["checksum"] = checksum(content)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read(path: Path, kind: str | None = None, machine_class: str | None = None) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        ValueError: one line: unreadable, edited by hand, of another format, kind or machine class.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as bad:
        raise ValueError(f"[results] expected a result file, got {path}: {bad}") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError(f"[results] expected a result file with a checksum, got {path}")
    if content["checksum"] != checksum(content):
        raise ValueError(f"[results] {path} was edited by hand: its checksum is "
                         f"{checksum(content)[:12]}, it says {str(content['checksum'])[:12]}; "
                         "measure it again")
    for name, wanted in (("format", FORMAT), ("kind", kind)):
        if wanted is not None and content.get(name) != wanted:
            raise ValueError(f"[results] {path} expected {name} {wanted}, got "
                             f"{content.get(name)!r}")
    came = content["machine"].get("class")
    if machine_class is not None and came != machine_class:
        raise ValueError(f"[results] {path} was measured on machine class {came!r}, this one is "
                         f"{machine_class!r}: not compared")
    return content


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 of the content without its own checksum, in one canonical spelling."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
