"""Curves of measured seconds: read off at any tile, kept in memory and in a file.

The file, costs.json, says which machine and which versions its curves are of; FFENGINE_CACHE names
its folder. One that is damaged, or of other versions, is ignored and written anew.
"""

from __future__ import annotations

import bisect
import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

import torch

from ffengine import env
from ffengine.data.files import user_cache
from ffengine.engine.run.checkpoint import write_atomically
from ffengine.version import __version__

#: Raised when the meaning of a curve changes.
FORMAT = 1
#: Seconds by tile, per kind of turn (ffengine.engine.memory.costs).
Curve = dict[str, dict[int, float]]

log = logging.getLogger("ffengine")


def over_tiles(points: dict[int, float], n: int, tile: int) -> float:
    """Seconds of n samples in tiles; the last may be smaller."""
    full, rest = divmod(n, min(tile, n))
    return full * at(points, min(tile, n)) + (at(points, rest) if rest else 0.0)


def at(points: dict[int, float], n: int) -> float:
    """Seconds at a tile of n: between two points on their line, beyond the last on its slope."""
    points = plausible(points)
    tiles = sorted(points)
    if n in points:
        return points[n]
    last = tiles[-1]
    if n > last:
        first = next((t for t in tiles if 4 * t >= last), last)
        rise = (points[last] - points[first]) / (last - first) if first < last else 0.0
        return points[last] + (n - last) * max(rise, points[last] / last / 2)
    if n < tiles[0]:
        return points[tiles[0]] * n / tiles[0]
    high = bisect.bisect_left(tiles, n)
    a, b = tiles[high - 1], tiles[high]
    return points[a] + (points[b] - points[a]) * (n - a) / (b - a)


def plausible(points: dict[int, float]) -> dict[int, float]:
    """Points without what must be noise, which only ever adds.

    A tile costs no more than a larger one, and no more than smaller ones that make it up.
    """
    found, least = {}, math.inf
    for n in sorted(points, reverse=True):
        least = found[n] = min(least, points[n])
    below: list[int] = []
    for n in sorted(found):
        found[n] = min([found[n], *(found[m] * math.ceil(n / m) for m in below)])
        below.append(n)
    return found


class Curves:
    """Every curve known on this machine: this process's, and the file's."""

    def __init__(self, path: Path, machine: str) -> None:
        self.path, self.machine, self.changed = path, machine, False
        self.lock = threading.RLock()
        self._all: dict[str, Curve] = read(path, machine)

    def of(self, name: str) -> Curve:
        return self._all.setdefault(name, {})

    def save(self) -> None:
        """Into the file what was measured since; another process's curves stay."""
        with self.lock:
            if not self.changed:
                return
            self.changed = False
            machines = read_machines(self.path)
            mine = machines.setdefault(self.machine, {})
            mine.update({n: {kind: {str(t): s for t, s in points.items()}
                             for kind, points in list(curve.items())}
                         for n, curve in list(self._all.items())})
            try:
                write_atomically(self.path, json.dumps({
                    "format": FORMAT, "versions": versions(), "machines": machines},
                    indent=1).encode())
            except OSError as error:
                log.warning("[costs] measured costs are not kept: %s", error)


_curves: dict[tuple[Path, str], Curves] = {}


def curves() -> Curves:
    """The curves of this machine, as it is set now, in the cache folder in force."""
    key = (cache_folder() / "costs.json", machine())
    return _curves.get(key) or _curves.setdefault(key, Curves(*key))


def cache_folder() -> Path:
    """$FFENGINE_CACHE, else the user's cache folder."""
    named = os.environ.get("FFENGINE_CACHE")
    return Path(named) if named else user_cache()


def machine() -> str:
    """Whose seconds they are: machine class (instruction sets), processor, threads in use."""
    return f"{env.machine_class()}; {env.cpu_name()}; torch threads: {torch.get_num_threads()}"


def versions() -> list[str]:
    return [__version__, torch.__version__]


def read_machines(path: Path) -> dict[str, Any]:
    """Curves by machine; nothing of a file that is absent, damaged or of other versions."""
    try:
        content = json.loads(path.read_text())
        if content["format"] == FORMAT and content["versions"] == versions():
            return {str(k): dict(v) for k, v in content["machines"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def read(path: Path, machine: str) -> dict[str, Curve]:
    """One machine's curves; a damaged one is left out."""
    found: dict[str, Curve] = {}
    for name, curve in read_machines(path).get(machine, {}).items():
        try:
            made = {str(kind): {int(t): float(s) for t, s in points.items()}
                    for kind, points in curve.items()}
        except (ValueError, TypeError, AttributeError):
            continue
        if all(t >= 1 and math.isfinite(s) for p in made.values() for t, s in p.items()):
            found[name] = made
    return found
