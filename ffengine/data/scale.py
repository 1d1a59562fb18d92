"""How pixels in [0, 1] are scaled before a network sees them: part of every recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Constants = tuple[tuple[float, ...], tuple[float, ...]]
OFF, SET = "off", "set"
EXPECTED = "off, set, or (mean, sd), each a number or one a channel, sd above 0"


def constants(normalize: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Constants:
    """(mean, sd) per channel to scale by.

    normalize: "off" (False), pixels stay in [0, 1]; "set" (True), the set's own `mean` and `std`;
        or the pair itself, each a number for all channels or one a channel.

    Raises ValueError for anything else.
    """
    if isinstance(normalize, bool):
        normalize = SET if normalize else OFF
    if normalize == SET:
        return mean, std
    if normalize == OFF:
        return (0.0,) * len(mean), (1.0,) * len(mean)
    pair = parsed(normalize)
    found = [part * len(mean) if len(part) == 1 else part for part in pair]
    if any(len(part) != len(mean) for part in found):
        raise ValueError(f"[data] normalize expected one number or {len(mean)}, one a channel, "
                         f"got {normalize!r}")
    return found[0], found[1]


def parsed(pair: Any) -> Constants:
    """The two halves of (mean, sd) as tuples; ValueError for what is no such pair."""
    good = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    halves = [_numbers(half) for half in pair] if good else []
    if len(halves) != 2 or not all(halves) or min(halves[1]) <= 0:
        raise ValueError(f"[data] normalize expected {EXPECTED}; got {pair!r}")
    return halves[0], halves[1]


def _numbers(half: Any) -> tuple[float, ...]:
    """Finite numbers, or none at all."""
    values = half if isinstance(half, Sequence) and not isinstance(half, str) else (half,)
    plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
                for v in values)
    return tuple(float(v) for v in values) if plain else ()
