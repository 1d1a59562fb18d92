"""One-line errors for names that are not known."""

from __future__ import annotations

from collections.abc import Collection


def one_of(where: str, name: str, value: object, known: Collection[str]) -> None:
    """ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"[{where}] {name} must be one of {', '.join(known)}, got {value!r}")
