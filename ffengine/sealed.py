"""JSON files that tell when they were cut short or edited: each holds `checksum`, the SHA-256 of
everything else in it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ffengine.engine.run.checkpoint import write_atomically


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file whole; the folder is made."""
    content = json.loads(json.dumps(content))  # what a reader will hash: tuples are lists
    content["checksum"] = checksum(content)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """The content, with its checksum.

    Raises:
        ValueError: one line: unreadable, cut short, no such file of ours, edited by hand.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as bad:
        raise ValueError(f"[results] expected a result file, got {path}: {bad}") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError(f"[results] expected a result file with a checksum, got {path}")
    if content["checksum"] != checksum(content):
        raise ValueError(f"[results] {path} was edited by hand: its checksum is "
                         f"{checksum(content)[:12]}, it says {str(content['checksum'])[:12]}; "
                         "measure it again")
    return content


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 of the content without its own checksum, in one canonical spelling."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
