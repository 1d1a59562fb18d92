"""Locks between processes; the system lets go of a dead one's, however it died."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ffengine.needs import need


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `path` against other processes, through a file .NAME.lock beside it, which stays.

    Yields whether it is held: without `wait`, False at once where another process holds it.

    Raises:
        ImportError: no fcntl, which Windows lacks.
    """
    fcntl = need("fcntl", "[locks] sharing files between processes")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True  # closing the file lets go
