"""Finding the files of a data set below a folder, and downloading those that are not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ffengine.data.catalog import SOURCES, Source
from ffengine.needs import need

_TIMEOUT_S = (10, 60)  # connect, then between two pieces of the answer
_BLOCK = 1 << 20


class _Mismatch(ValueError):
    """A download whose checksum is not the known one."""


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """`root`, else $FFENGINE_DATA, else the user's cache folder; NotADirectoryError for a file."""
    chosen = root if root is not None else os.environ.get("FFENGINE_DATA") or None
    path = Path(chosen).expanduser() if chosen is not None else user_cache()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"[data] root must be a folder, got the file {path}")
    return path


def user_cache() -> Path:
    """$XDG_CACHE_HOME/ffengine, else ~/.cache/ffengine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffengine"


def find(source: Source, root: Path) -> dict[str, Path] | None:
    """File name -> path for the first folder that holds the whole data set; None if none does.

    Keys are the uncompressed part names, or the archive's name alone.
    """
    for folder in (root / f for f in source.folders):
        parts = {part: _existing(source, folder, part) for part in source.parts}
        found = {part: path for part, path in parts.items() if path is not None}
        if len(found) == len(parts):
            _refuse_other_set(source, found)
            return found
        if source.archive is not None and (folder / source.archive).is_file():
            return {source.archive: folder / source.archive}
    return None


def _existing(source: Source, folder: Path, part: str) -> Path | None:
    names = [part, f"{part}.gz"] if f"{part}.gz" in source.remotes else [part]
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _refuse_other_set(source: Source, found: Mapping[str, Path]) -> None:
    """MNIST and Fashion-MNIST use the same file names: a mix-up would train without a word."""
    for path in found.values():
        rivals = [s for s in SOURCES.values() if s is not source and path.name in s.remotes]
        for rival in rivals:
            if _digest(path, rival.remotes[path.name]) == rival.remotes[path.name]:
                raise ValueError(
                    f"[data] {path}: expected a file of {source.name}, found that of {rival.name}"
                )


def _digest(path: str | Path, like: str) -> str:
    """``"algorithm:hexdigest"`` of the file, by the algorithm that `like` names."""
    algorithm = like.partition(":")[0]
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def obtain(
    source: Source,
    root: Path,
    *,
    download: bool,
    urls: str | Sequence[str] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Like `find`, downloading first where `find` gives None and `download` is true.

    urls: base address(es) instead of the published ones; $FFENGINE_DATA_URL_<NAME> (separated by
        blanks) does the same.
    checksums: file -> ``"algorithm:hexdigest"`` in place of the published ones; files that are on
        this machine are held to them too.

    Raises FileNotFoundError without `download`, ImportError if there is no pooch to download with,
    ConnectionError if no address answers, ValueError for a checksum that differs; nothing is left
    behind by a download that failed.
    """
    known = _known(source, checksums)
    found = find(source, root)
    if found is not None:
        _hold(source, found, known, {} if checksums is None else checksums)
        return found
    if not download:
        raise FileNotFoundError(
            f"[data] {source.name} is not on this machine: {_advice(source, root)}"
        )
    folder = root / source.folders[0]
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        for file, checksum in known.items():
            if _existing(source, folder, file.removesuffix(".gz")) is None:
                _download(source, root, folder / file, checksum, _homes(source, urls))
    except BaseException:
        _remove_empty(created)
        raise
    found = find(source, root)
    assert found is not None  # all of them have just been put there
    return found


def _known(source: Source, checksums: Mapping[str, str] | None) -> dict[str, str]:
    """The published checksums, and the caller's in their place."""
    known = dict(source.remotes)
    for file, checksum in (checksums or {}).items():
        algorithm, colon, _ = checksum.partition(":")
        if file not in known or not colon or algorithm not in hashlib.algorithms_available:
            raise ValueError(
                f"[data] checksums must map {', '.join(known)} to 'algorithm:hexdigest', "
                f"got {file!r}: {checksum!r}"
            )
        known[file] = checksum
    return known


def _hold(source: Source, found: Mapping[str, Path], known: Mapping[str, str],
          own: Mapping[str, str]) -> None:
    """ValueError for a file on disk that is not what it says it is: the one that the caller has a
    checksum of, or that has a published one's name and size."""
    for path in found.values():
        named = path.name in own or source.sizes.get(path.name) == path.stat().st_size
        if named and (got := _digest(path, known[path.name])) != known[path.name]:
            raise ValueError(f"[data] {path}: expected checksum {known[path.name]}, found {got}")


def _homes(source: Source, urls: str | Sequence[str] | None) -> list[str]:
    override = urls if urls is not None else os.environ.get(_variable(source), "")
    given = override.split() if isinstance(override, str) else list(override)
    return given or list(source.homes)


def _variable(source: Source) -> str:
    return f"FFENGINE_DATA_URL_{source.name.upper()}"


def _advice(source: Source, root: Path) -> str:
    looked = ", ".join(str(root / f) for f in source.folders)
    wanted = ", ".join(source.remotes)
    return (
        f"looked in {looked}; put {wanted} there, name another folder by root= or $FFENGINE_DATA, "
        f"or an address that has them by urls= or ${_variable(source)}"
    )


def _download(source: Source, root: Path, target: Path, checksum: str, homes: list[str]) -> None:
    """Puts one verified file at `target`: the first home that has it wins."""
    pooch = need("pooch", f"[data] downloading {source.name}")
    unreachable = need("requests", f"[data] downloading {source.name}").RequestException
    failures: list[str] = []
    mismatch: _Mismatch | None = None
    for home in homes:
        url = f"{home.rstrip('/')}/{target.name}"
        try:
            # pooch writes beside the target under a temporary name and moves it when verified.
            pooch.retrieve(
                url,
                known_hash=checksum,
                fname=target.name,
                path=str(target.parent),
                downloader=_Checked(pooch, checksum),
            )
            return
        except _Mismatch as error:
            mismatch = error
        except unreachable as error:
            answer = error.response.status_code if error.response is not None else ""
            failures.append(f"{url} ({type(error).__name__}{answer and f' {answer}'})")
    if mismatch is not None:
        raise mismatch
    raise ConnectionError(
        f"[data] {source.name} could not be downloaded from {', '.join(failures)}: "
        f"{_advice(source, root)}"
    )


class _Checked:
    """A pooch downloader whose checksum error says in one line what came."""

    def __init__(self, pooch: ModuleType, checksum: str) -> None:
        self.pooch, self.checksum = pooch, checksum

    def __call__(self, url: str, output_file: str | IO[bytes], manager: Any) -> None:
        self.pooch.HTTPDownloader(timeout=_TIMEOUT_S)(url, output_file, manager)
        got = _digest(str(output_file), self.checksum)
        if got != self.checksum:
            raise _Mismatch(f"[data] {url}: expected checksum {self.checksum}, found {got}")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes those of `folders` (deepest first) that are there and empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
