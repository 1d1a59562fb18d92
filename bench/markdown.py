"""Pieces of Markdown that results pages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(head: list[str], rows: Iterable[list[str]], words: int = 1) -> list[str]:
    """Markdown; numbers to the right of the first columns, which are words."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * words + "--:|" * (len(head) - words),
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]


def where(m: dict[str, Any], version: str) -> str:
    """Date, hardware, versions and commit of a result, one line; m: bench.machine.facts."""
    hardware = m["gpu"] or f"{m['cpu']} ({m['isa']}), threads: {m['threads']}"
    changed = ", with changes of its own" if m["dirty"] else ""
    below = "".join(f", {title} {m[key]}" for key, title in (
        ("cuda", "CUDA"), ("driver", "driver"), ("triton", "Triton")) if m.get(key) and m["gpu"])
    return (f"{m['date']}; {hardware}; torch {m['torch']}{below}, Python {m['python']}; ffengine "
            f"{version}, commit {m['commit']}{changed}.")


def mega(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.1f}"


def quantity(spread: dict[str, Any] | None, scale: float = 1.0, digits: int = 4) -> str:
    """Median, and smallest to largest."""
    if not spread:
        return ""
    median, low, high = (scale * spread[k] for k in ("median", "min", "max"))
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def brief(value: Any) -> str:
    """A value in a cell: spreads by their median, four digits."""
    if isinstance(value, dict):
        if {"median", "min", "max"} <= set(value):
            return "{median:.4g} ({min:.4g}–{max:.4g})".format(**value)
        return ", ".join(f"{k} {brief(v)}" for k, v in value.items())
    if isinstance(value, list):
        return (f"{len(value)} values" if len(value) > 8 else ", ".join(map(brief, value)))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
