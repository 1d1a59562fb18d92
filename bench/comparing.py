"""What two counters files, or two parts of them, differ in, and when they cannot be compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

RENEW = "renew it with `make bench-baseline`"


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """A line for each row or counter of a part that moved, came or went."""
    for name in {**old["rows"], **new["rows"]}:
        before, after = old["rows"].get(name), new["rows"].get(name)
        if before is None or after is None:
            yield f"{name}: {'new, not in the baseline' if before is None else 'gone'}"
            continue
        for counter in {**before, **after}:
            if before.get(counter) != after.get(counter):
                yield (f"{name}: {counter} {before.get(counter, 'none')} -> "
                       f"{after.get(counter, 'none')}")


def incomparable(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str | None:
    """Why two parts cannot be compared; None if they can."""
    for part, whose in ((old, "the baseline"), (new, "this run")):
        if part is None:
            return f"{whose} has no such part"
        if "absent" in part:
            return f"{whose}: {part['absent']}"
    assert old is not None and new is not None
    for need in {**old["needs"], **new["needs"]}:
        if old["needs"].get(need) != new["needs"].get(need):
            return (f"the baseline is of {need} {old['needs'].get(need)}, this is "
                    f"{new['needs'].get(need)}")
    return None


def same_version(path: Path, content: dict[str, Any], version: str) -> None:
    if content["version"] != version:
        raise ValueError(f"[compare] {path} is of ffengine {content['version']}, expected "
                         f"{version}: not compared; {RENEW}")
