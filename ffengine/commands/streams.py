"""Standard output and standard error of the command line, whoever reads them, or nobody."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Forgiving:
    """A text stream that drops what nobody will read: after its reader has gone (`| head`)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            void = os.open(os.devnull, os.O_WRONLY)
            os.dup2(void, self._stream.fileno())  # what its buffer holds goes there, too
            os.close(void)
            if not isinstance(error, BrokenPipeError):  # a full disk, say
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Inside, a reader that goes away, a closed stream (`2>&-`) and a terminal without the letters
    of a text are no errors."""
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    sys.stdout, sys.stderr = (
        Forgiving(stream or _nowhere(fd)) for fd, stream in enumerate(before, 1))
    try:
        for stream in before:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
        for stream, rule in zip(before, errors, strict=True):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=rule)


def _nowhere(fd: int) -> TextIO:
    """A closed stream's number, taken, or the next file that is opened would have it."""
    void = os.open(os.devnull, os.O_WRONLY)
    if void != fd:
        os.dup2(void, fd)
        os.close(void)
    return os.fdopen(fd, "w", closefd=False)
