"""Amounts of memory as people write them: "440MB", "256MiB", 440000000."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(amount: str | int | None) -> int | None:
    """Bytes of an amount; MB = 10^6, MiB = 2^20, a plain number is bytes, None stays None.

    Raises:
        ValueError: not an amount above zero; the accepted forms are named.
    """
    if amount is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(amount))
    if found is not None and not isinstance(amount, bool):
        unit = UNITS.get(found[2].lower())
        if unit is not None and float(found[1]) * unit >= 1:
            return int(float(found[1]) * unit)
    raise ValueError("[memory] expected an amount such as 440MB (10^6), 256MiB (2^20), 2GB or "
                     f"plain bytes, got {amount!r}")


def megabytes(nbytes: int, enough: bool = False) -> str:
    """A size for people: megabytes of 10^6, kilobytes below one; rounded up to be `enough`."""
    unit, name = (1e6, "MB") if nbytes >= 1e6 else (1e3, "kB")
    tenths = nbytes / unit * 10
    return f"{(math.ceil(tenths) if enough else round(tenths)) / 10:.1f} {name}"
