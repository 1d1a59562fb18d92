"""TOML read strictly: every key known, every value of its kind, one line that says what is wrong.

A key that is not known is an error, so that a misspelt one never leaves a default in its place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Checks and converts a value; raises Expected.
Kind = Callable[[Any], Any]


class Expected(Exception):
    """Says what a value should have been."""


def read(path: Path, area: str) -> dict[str, Any]:
    """The content of a TOML file; ValueError `[area] ...` if there is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"[{area}] expected a {area} file, got {path}: no such file") from None
    except OSError as error:
        raise ValueError(f"[{area}] expected a {area} file, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"[{area}] {path.name}: not TOML: {error}") from None


def table(file: str, where: str, values: dict[str, Any], kinds: Mapping[str, Kind],
          required: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a table, each checked and converted by its kind.

    Args:
        file: what errors begin with, e.g. "[recipe] mine.toml".
        where: the table's name, "" for the top.

    Raises:
        ValueError: an unknown or missing key, or a value that its kind refuses.
    """
    place = f"{file}: " + (f"[{where}] " if where else "")
    for key in values:
        if key not in kinds:
            raise ValueError(f"{place}unknown key {key!r}; known: {', '.join(kinds)}")
    for key in required:
        if key not in values:
            raise ValueError(f"{place}missing key {key!r}; required: {', '.join(required)}")
    made = {}
    for key, value in values.items():
        try:
            made[key] = kinds[key](value)
        except Expected as expected:
            raise ValueError(f"{place}{key} expected {expected}, got {value!r}") from None
    return made


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Expected("a text")
    return value


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Expected("a table")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Expected("true or false")
    return value


def whole(low: int) -> Kind:
    """A whole number of at least `low`."""
    def kind(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise Expected(f"a whole number of at least {low}")
        return value
    return kind


def number(high: float = math.inf, above_zero: bool = False) -> Kind:
    """A finite number from 0, or above it, to `high`."""
    def kind(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
                math.isfinite(value) and 0 <= value <= high) or (above_zero and value == 0):
            low = "above 0" if above_zero else "of 0 or more" if high == math.inf else "from 0"
            raise Expected(f"a number {low}" + ("" if high == math.inf else
                                                f" {'up ' if above_zero else ''}to {high:g}"))
        return float(value)
    return kind


def one_of(known: tuple[str, ...]) -> Kind:
    def kind(value: Any) -> str:
        if value not in known:
            raise Expected(f"one of {', '.join(known)}")
        return str(value)
    return kind
