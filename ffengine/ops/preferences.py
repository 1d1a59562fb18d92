"""Which back-end a GPU's own measurements favour, and what they are.

ffengine/devices/preferred.json is written by `python -m bench.prefer` from committed result files:

    GPU's name -> precision -> {"seconds": {back-end: of a step}, "of": "model, batch, commit"}
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).parents[1] / "devices" / "preferred.json"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Preference(NamedTuple):
    """Back-ends from the fastest on, and the measurement that says so."""

    order: tuple[str, ...]
    why: str


def preference(gpu: str, dtype: torch.dtype) -> Preference | None:
    """Of a GPU by the name it reports; None where no step was measured on it in this dtype."""
    row = _rows().get(gpu, {}).get(PRECISIONS.get(dtype, ""))
    if row is None:
        return None
    seconds: dict[str, float] = row["seconds"]
    order = tuple(sorted(seconds, key=lambda name: seconds[name]))
    times = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in order)
    return Preference(order, f"{times} a step ({row['of']})")


@functools.cache
def _rows() -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text())
    return found
