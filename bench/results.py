"""Result files: JSON that says where and when it was measured, and that nobody edited it since.

A file holds `kind`, `format`, `version` (of ffengine), `machine` (bench.machine.facts), the
measured values, and `checksum`, the SHA-256 of everything else. `read` refuses, with the reason, a
file whose checksum differs, of another format or kind, and, where asked to, of another machine
class: ratios compare across machines, exact counters and seconds do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import machine
from ffengine import sealed
from ffengine.sealed import checksum

__all__ = ["FORMAT", "checksum", "read", "write"]

#: Raised when the meaning of a field changes.
FORMAT = 1


def write(path: Path, kind: str, values: dict[str, Any]) -> None:
    """Write measured values; the folder is made."""
    import ffengine

    sealed.write(path, {"kind": kind, "format": FORMAT, "version": ffengine.__version__,
                        "machine": machine.facts(), **values})


def read(path: Path, kind: str | None = None, machine_class: str | None = None) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        ValueError: one line: unreadable, edited by hand, of another format, kind or machine class.
    """
    content = sealed.read(path)
    for name, wanted in (("format", FORMAT), ("kind", kind)):
        if wanted is not None and content.get(name) != wanted:
            raise ValueError(f"[results] {path} expected {name} {wanted}, got "
                             f"{content.get(name)!r}")
    came = content["machine"].get("class")
    if machine_class is not None and came != machine_class:
        raise ValueError(f"[results] {path} was measured on machine class {came!r}, this one is "
                         f"{machine_class!r}: not compared")
    return content
