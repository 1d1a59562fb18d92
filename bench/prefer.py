"""What `backend="auto"` prefers on a GPU, from the steps that were measured on it.

    python -m bench.prefer

Reads bench/results/*/step.jsonl (bench/gpu.sh writes them), takes the fastest plan of each
back-end whose check is green, and writes ffengine/devices/preferred.json: an installed package has
no bench/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.gpu import records
from ffengine.ops import preferences

RESULTS = Path(__file__).parent / "results"
#: Back-ends that `auto` may choose on a GPU.
CHOSEN = ("triton", "cuda")


def preferred(facts: records.Row, rows: list[records.Row]) -> dict[str, Any]:
    """Precision -> seconds by back-end, and what they are of; only where all were measured."""
    found: dict[str, Any] = {}
    for row in records.latest(rows):
        median = (row.get("seconds") or {}).get("median") if isinstance(
            row.get("seconds"), dict) else None
        if row.get("check") != "ok" or row.get("backend") not in CHOSEN or not median:
            continue
        at = found.setdefault(row["precision"], {
            "seconds": {}, "of": f"{row['model']}, batch {row['batch']}, {facts['commit'][:12]}"})
        best = at["seconds"].get(row["backend"], median)
        at["seconds"][row["backend"]] = min(best, median)
    return {p: at for p, at in sorted(found.items()) if set(at["seconds"]) == set(CHOSEN)}


def collect(folder: Path = RESULTS) -> dict[str, Any]:
    """Every GPU's preferences, by the name it reports."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*/step.jsonl")):
        facts, rows = records.read(path)
        if facts["kind"] == "gpu":
            found.setdefault(facts["gpu"], {}).update(preferred(facts, rows))
    return found


def main() -> int:
    found = collect()
    preferences.FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{preferences.FILE.name}: {len(found)} GPUs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
