"""Where a layer-wise schedule keeps the features of the whole data set between two layers.

In RAM, where the memory meter counts them as features; on disk, in a nameless temporary file that
goes when the store does, even if the process is killed; or nowhere ("recompute": no store).

The file is read and written, not mapped: a mapping's pages count as memory of the process (the
whole of a 614 MB file was resident after one pass in random order), and a full disk would be a
fatal signal. Batches of 128 random rows, file in the system's cache: 614 MB in rows of 410 kB took
0.09 s a pass, mapped 0.09 to 0.30 s; 400 MB in rows of 8 kB 0.12 s, mapped 0.06 to 0.10 s.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ffengine.engine.memory.budget import megabytes
from ffengine.ops.memory_accounting import allocating

Kind = Literal["ram", "disk", "recompute"]


class FeatureStore(ABC):
    """`rows` samples of `shape` and `dtype`, written and read by row; see `create`.

    A context manager: leaving it closes the store and frees what it held.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype,
                 channels_last: bool) -> None:
        if rows < 0 or min(shape, default=0) < 0:
            raise ValueError(f"[store] expected rows and a shape >= 0, got {rows} of {shape}")
        if channels_last and len(shape) != 3:
            raise ValueError(f"[store] channels_last expected a shape (C, H, W), got {shape}")
        self.shape, self.dtype, self.channels_last = tuple(shape), dtype, channels_last
        self._rows = rows
        #: A row as it lies in memory: channels_last is a permutation of a dense (H, W, C).
        self._dense = (*shape[1:], shape[0]) if channels_last else tuple(shape)
        self._written = np.zeros(rows, dtype=bool)
        self._closed = False

    @staticmethod
    def create(kind: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype,
               folder: Path | None = None, *, channels_last: bool = False) -> FeatureStore:
        """A store in "ram" or on "disk", all of its room taken at once.

        folder: where the file lies; default is the system's folder for temporary files, which
            may itself be in RAM. channels_last: rows (C, H, W) are kept, and read, in that layout.

        Raises ValueError for another kind or shape, MemoryError or OSError in one line where the
        room cannot be had.
        """
        if kind == "ram":
            return RamStore(rows, shape, dtype, channels_last)
        if kind == "disk":
            return DiskStore(rows, shape, dtype, channels_last, folder)
        raise ValueError(f"[store] expected kind ram or disk, got {kind!r}")

    def __len__(self) -> int:
        return self._rows

    def tensors(self) -> list[Tensor]:
        """What it holds in RAM, for the meter."""
        return []

    @property
    def row_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, in RAM or on disk."""
        return self._rows * self.row_bytes

    def write(self, start: int, rows: Tensor) -> None:
        """Put rows (n, *shape), from any device, at start..start+n-1.

        Raises ValueError or TypeError for another shape or dtype, IndexError past the ends,
        OSError if the disk refuses.
        """
        self._check_open()
        if tuple(rows.shape[1:]) != self.shape or rows.dim() != len(self.shape) + 1:
            expected = ", ".join(("n", *map(str, self.shape)))
            raise ValueError(f"[store] expected rows ({expected}), got {tuple(rows.shape)}")
        if rows.dtype != self.dtype:
            raise TypeError(f"[store] expected rows of {self.dtype}, got {rows.dtype}")
        count = rows.shape[0]
        if start < 0 or start + count > self._rows:
            raise IndexError(f"[store] expected rows within 0..{self._rows - 1}, "
                             f"got {start}..{start + count - 1}")
        rows = rows.detach()
        self._put(start, rows.permute(0, 2, 3, 1) if self.channels_last else rows)
        self._written[start : start + count] = True

    def read(self, index: Tensor | slice) -> Tensor:
        """A copy in RAM of rows: (n, *shape), those of an int64 index (n,) or a slice of step 1.

        Raises IndexError past the ends, ValueError for rows that were never written and for a
        closed store, TypeError for another index, OSError if the disk refuses.
        """
        found = self._found(index)
        with allocating("feature"):
            out = torch.empty((len(found), *self._dense), dtype=self.dtype, device="cpu")
        self._take(found, out)
        return self._as_maps(out)

    def look(self, index: Tensor | slice) -> Tensor:
        """As `read`, but rows that follow one another in RAM are no copy: nobody may write there.
        """
        seen = self._seen(self._found(index))
        return self.read(index) if seen is None else self._as_maps(seen)

    def _as_maps(self, dense: Tensor) -> Tensor:
        return dense.permute(0, 3, 1, 2) if self.channels_last else dense

    def _found(self, index: Tensor | slice) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The rows that an index names, checked."""
        self._check_open()
        if isinstance(index, slice):
            start, stop, step = index.indices(self._rows)
            if step != 1:
                raise ValueError(f"[store] expected a slice of step 1, got {step}")
            found = np.arange(start, max(start, stop))
        else:
            found = self._checked(index)
        fresh = ~self._written[found]
        if fresh.any():
            raise ValueError(f"[store] row {int(found[fresh][0])} was read before it was written")
        return found

    def _checked(self, index: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            came = (f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor)
                    else type(index).__name__)
            raise TypeError(f"[store] expected a slice or an int64 index (n,), got {came}")
        found: np.ndarray[Any, np.dtype[np.int64]] = index.detach().cpu().numpy()
        bad = found[(found < 0) | (found >= self._rows)]
        if len(bad):
            raise IndexError(f"[store] expected rows within 0..{self._rows - 1}, got {bad[0]}")
        return found

    def close(self) -> None:
        """Free the rows; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("[store] expected an open store, got a closed one")

    def _seen(self, found: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor | None:
        """The rows `found` (n, *dense) where they lie, if they can be looked at there."""
        return None

    @abstractmethod
    def _put(self, start: int, rows: Tensor) -> None:
        """Write dense rows, checked."""

    @abstractmethod
    def _take(self, found: np.ndarray[Any, np.dtype[np.int64]], out: Tensor) -> None:
        """Read the rows `found` into out (n, *dense)."""

    @abstractmethod
    def _release(self) -> None:
        """Free the storage."""


class RamStore(FeatureStore):
    """Rows in one tensor."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype,
                 channels_last: bool) -> None:
        super().__init__(rows, shape, dtype, channels_last)
        try:
            with allocating("feature"):
                self._data = torch.empty((rows, *self._dense), dtype=dtype, device="cpu")
        except RuntimeError:
            raise MemoryError(f"[store] expected {megabytes(self.nbytes)} of RAM for features, "
                              "got a refusal") from None

    def _put(self, start: int, rows: Tensor) -> None:
        self._data[start : start + rows.shape[0]].copy_(rows)

    def _seen(self, found: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor | None:
        if not len(found) or (np.diff(found) != 1).any():
            return None
        return self._data[int(found[0]):int(found[-1]) + 1]

    def _take(self, found: np.ndarray[Any, np.dtype[np.int64]], out: Tensor) -> None:
        torch.index_select(self._data, 0, torch.from_numpy(found), out=out)

    def tensors(self) -> list[Tensor]:
        return [self._data]

    def _release(self) -> None:
        del self._data


class DiskStore(FeatureStore):
    """Rows in a file without a name: the system takes it back when it is closed or forgotten."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype,
                 channels_last: bool, folder: Path | None) -> None:
        super().__init__(rows, shape, dtype, channels_last)
        self.folder = Path(folder or tempfile.gettempdir())
        self._lock = threading.Lock()  # a seek and what follows it belong together
        free = free_disk(self.folder)
        if self.nbytes > free:
            raise OSError(f"[store] expected {megabytes(self.nbytes)} free for features in "
                          f"{self.folder}, got {megabytes(free)}")
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            reserve(self._file, self.nbytes)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> OSError:
        return OSError(f"[store] expected {self.folder} to take {megabytes(self.nbytes)} of "
                       f"features, got {error.strerror}")

    def _put(self, start: int, rows: Tensor) -> None:
        left = as_bytes(rows.cpu().contiguous())
        try:
            with self._lock:
                self._file.seek(start * self.row_bytes)
                while len(left):
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise self._refused(error) from None

    def _take(self, found: np.ndarray[Any, np.dtype[np.int64]], out: Tensor) -> None:
        if not self.row_bytes or not len(found):
            return
        space = as_bytes(out)
        # Neighbours on disk are read in one go.
        cuts = np.flatnonzero(np.diff(found) != 1) + 1
        ends = [*cuts.tolist(), len(found)]
        with self._lock:
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                self._file.seek(int(found[begin]) * self.row_bytes)
                part = space[begin * self.row_bytes : end * self.row_bytes]
                while len(part):
                    got = self._file.readinto(part)  # type: ignore[attr-defined]
                    if not got:
                        raise OSError(f"[store] expected features in {self.folder}, got the end "
                                      "of the file")
                    part = part[got:]

    def _release(self) -> None:
        self._file.close()


def as_bytes(dense: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    view: memoryview = dense.view(-1).view(torch.uint8).numpy().data
    return view


def reserve(file: IO[bytes], nbytes: int) -> None:
    """Give the file its size, and the disk's promise to hold it where the system can."""
    file.truncate(nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def free_disk(folder: Path | None = None) -> int:
    """Bytes free in a folder (default: the one for temporary files).

    Raises NotADirectoryError for one that is not there.
    """
    place = Path(folder or tempfile.gettempdir())
    if not place.is_dir():
        raise NotADirectoryError(f"[store] expected a folder for features, got {place}")
    return shutil.disk_usage(place).free


def free_ram(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM that may still be taken: the machine's, or its container's if that is less."""
    try:
        table = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    # Pages of files that nobody uses now are given back on demand.
    return min(free, max(0, limit - used + int(stat.get("inactive_file", 0))))


def choose_store(rows: int, row_bytes: int, room: int | None, disk_free: int) -> Kind:
    """Where features go: RAM if they fit, else disk if they fit there, else recompute them.

    room: bytes that the memory budget leaves; None is no budget: then RAM is for what takes at
    most half of the RAM that is free now. disk_free: bytes free where the file would lie.
    """
    need = rows * row_bytes
    if need <= (free_ram() // 2 if room is None else room):
        return "ram"
    return "disk" if need <= disk_free else "recompute"
