"""The folders that commands write into: a given one, or a new one under runs/."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_for(out: str | Path | None, name: str) -> Iterator[Path]:
    """`out`; or runs/NAME-N with the first N that is free, this process's own from now on.

    What was made of it is gone again where nothing was written, so that a refused command leaves
    no folder.
    """
    with _gone_if_empty(Path("runs") if out is None else Path(out)) as folder:
        if out is not None:
            yield folder
            return
        mine = _reserved(folder, name)
        try:
            yield mine
        finally:
            with contextlib.suppress(OSError):
                mine.rmdir()


def _reserved(root: Path, name: str) -> Path:
    """ROOT/NAME-N, made: two processes cannot both make one folder."""
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        with contextlib.suppress(FileExistsError):
            (root / f"{name}-{number}").mkdir()
            return root / f"{name}-{number}"
        number += 1


@contextlib.contextmanager
def _gone_if_empty(folder: Path) -> Iterator[Path]:
    """Folders that are not there yet and are empty in the end are removed; others stay."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            for place in new:
                place.rmdir()
