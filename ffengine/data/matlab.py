"""Numeric arrays of a MATLAB 5 file (MathWorks, MAT-File Format, R2019b, chapter 1), and no more.

Every size is checked before anything is read for it, and memory grows with the bytes that are
there: damaged or hostile files end in a ValueError.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1 << 20
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
#: Type of stored numbers -> numpy's.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
           13: "u8"}
#: Class of an array -> the type that its numbers have for MATLAB, which may store shorter ones.
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8",
            15: "u8"}
_COMPLEX = 0x0800
#: MATLAB's names have at most 63 letters, and nobody has arrays of more than 32 dimensions.
_NAME_BYTES, _DIMENSIONS = 64, 32


class Damaged(ValueError):
    """Not an intact MATLAB 5 file, and why."""


class _Bytes(Protocol):
    def take(self, count: int) -> bytearray:
        """The next `count` bytes; Damaged if there are fewer."""

    def end(self) -> None:
        """Damaged unless all of it has been taken."""


class _Plain:
    """The next `left` bytes of a file."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self.file, self.left = file, left

    def take(self, count: int) -> bytearray:
        if count > self.left:
            raise Damaged(f"{count} bytes in an element that has {self.left} left")
        found = bytearray()
        while len(found) < count:
            block = self.file.read(min(_CHUNK, count - len(found)))
            if not block:
                raise Damaged(f"the file ends {count - len(found)} bytes early")
            found += block
        self.left -= count
        return found

    def end(self) -> None:
        if self.left:
            raise Damaged(f"{self.left} bytes left over in an element")


class _Inflated:
    """The same of a zlib stream, which ends with a checksum."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self.plain, self.stream = _Plain(file, left), zlib.decompressobj()

    def take(self, count: int) -> bytearray:
        found = bytearray()
        while len(found) < count:
            piece = self._more(count - len(found))
            if not piece:
                raise Damaged(f"a compressed element ends {count - len(found)} bytes early")
            found += piece
        return found

    def _more(self, most: int) -> bytes:
        """At most so many bytes; none at the end alone."""
        given = self.stream.unconsumed_tail
        while not self.stream.eof:
            given = given or bytes(self.plain.take(min(_CHUNK, self.plain.left)))
            piece = self.stream.decompress(given, most)
            if piece or not (self.plain.left or self.stream.unconsumed_tail):
                return piece
            given = self.stream.unconsumed_tail
        return b""

    def end(self) -> None:
        if self._more(1) or not self.stream.eof or self.stream.unused_data:
            raise Damaged("a compressed element of another size than its array")
        self.plain.end()


def read(path: Path, names: Collection[str]) -> dict[str, Array]:
    """The named arrays that are in the file and hold real numbers, with MATLAB's shapes.

    Raises:
        ValueError: `Damaged`, one line without the path.
    """
    found: dict[str, Array] = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        order = _byte_order(file.read(_HEADER))
        while file.tell() < size:
            kind, count = struct.unpack(f"{order}II", _Plain(file, 8).take(8))
            start = file.tell()
            if kind not in (_MATRIX, _COMPRESSED):
                raise Damaged(f"an element of type {kind} where a variable stands")
            if start + count > size:
                raise Damaged(f"a variable of {count} bytes where {size - start} are left")
            try:
                name, array = _variable(file, kind, count, order, names)
            except zlib.error as error:
                raise Damaged(str(error)) from None
            if name in found:
                raise Damaged(f"two variables called {name}")
            if array is not None:
                found[name] = array
            file.seek(start + count)
    return found


def _byte_order(header: bytes) -> str:
    """struct's letter for it, from the file's header."""
    order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
    if order is None or struct.unpack(f"{order}H", header[124:126]) != (0x0100,):
        raise Damaged("no header of one")
    return order


def _variable(file: IO[bytes], kind: int, count: int, order: str,
              names: Collection[str]) -> tuple[str, Array | None]:
    """(name, the numbers if it is one of `names` and has such)."""
    data: _Bytes = _Plain(file, count)
    if kind == _COMPRESSED:
        data = _Inflated(file, count)
        if struct.unpack(f"{order}I", data.take(8)[:4]) != (_MATRIX,):
            raise Damaged("a compressed element that is no array")
    kinds, flags = _part(data, order, 8)
    if kinds != 6 or len(flags) != 8:
        raise Damaged("an array without flags")
    (word,) = struct.unpack(f"{order}I", flags[:4])
    kinds, sizes = _part(data, order, 4 * _DIMENSIONS)
    if kinds != 5 or len(sizes) % 4 or len(sizes) < 8:
        raise Damaged("an array without dimensions")
    shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    if min(shape) < 0:
        raise Damaged(f"an array of shape {shape}")
    kinds, letters = _part(data, order, _NAME_BYTES)
    if kinds != 1:
        raise Damaged("an array without a name")
    name = letters.decode("latin-1")
    number = _CLASSES.get(word & 0xFF)
    if name not in names or number is None or word & _COMPLEX:
        return name, None
    return name, _numbers(data, order, shape).astype(number, copy=False)


def _numbers(data: _Bytes, order: str, shape: tuple[int, ...]) -> Array:
    """The real part, which is the last of its element."""
    kind, count, small = _tag(data, order)
    stored = _STORED.get(kind)
    if stored is None or count != math.prod(shape) * np.dtype(stored).itemsize:
        raise Damaged(f"{count} bytes of type {kind} in an array of shape {shape}")
    raw = small if small is not None else data.take(count)
    if small is None and count % 8:
        data.take(-count % 8)
    data.end()
    return np.frombuffer(raw, f"{order}{stored}", math.prod(shape)).reshape(shape, order="F")


def _part(data: _Bytes, order: str, most: int) -> tuple[int, bytearray]:
    """(type, content) of a part of at most so many bytes."""
    kind, count, small = _tag(data, order)
    if small is not None:
        return kind, small[:count]
    if count > most:
        raise Damaged(f"{count} bytes where at most {most} stand")
    content = data.take(count)
    data.take(-count % 8)
    return kind, content


def _tag(data: _Bytes, order: str) -> tuple[int, int, bytearray | None]:
    """(type, bytes, content) of the next part; the content where it stands in the tag itself."""
    (word,) = struct.unpack(f"{order}I", data.take(4))
    if word >> 16:
        if word >> 16 > 4:
            raise Damaged(f"{word >> 16} bytes in a tag of 4")
        return word & 0xFFFF, word >> 16, data.take(4)
    (count,) = struct.unpack(f"{order}I", data.take(4))
    return word, count, None
