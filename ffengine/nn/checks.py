"""One-line errors for names that are not known, and for lists of another length."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ffengine.words import meant


def one_of(where: str, name: str, value: object, known: Collection[str]) -> None:
    """ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"[{where}] {name} must be one of {', '.join(known)}, got {value!r}"
                         f"{meant(value, known)}")


def positive(where: str, **numbers: int) -> None:
    """ValueError for a number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"[{where}] {name} expected 1 or more, got {value}")


def as_many(where: str, name: str, values: Sequence[object], count: int) -> None:
    """ValueError unless there are `count` values."""
    if len(values) != count:
        raise ValueError(f"[{where}] expected {count} {name}, got {len(values)}: {tuple(values)}")
