"""Launch every variant of bench/aot_variants.py through Triton's own launcher into a driver that
does nothing, and time it.

    python -m tests.stub_driver tests.kernels.stub_worker [VARIANT...]

Prints one JSON object: variant -> {launches: [[kernel, grid]...], microseconds: host time a call}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.aot_variants import VARIANTS
from tests import stub_driver

#: Calls a timing takes the least of, each this often in a row.
ROUNDS, REPEATS = 5, 20


def microseconds(call: Callable[[], None]) -> float:
    """Process time of a call, the least of some rounds."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        found.append(time.process_time() - start)
    return min(found) / REPEATS * 1e6


def measure(driver: stub_driver.Stub, call: Callable[[], None]) -> dict[str, Any]:
    """What one call launches; then its host time, inputs and all."""
    with driver.recorded() as launches:
        call()
    return {"launches": [[launch.kernel, list(launch.grid)] for launch in launches],
            "microseconds": round(microseconds(call), 1)}


def main() -> None:
    driver = stub_driver.DRIVER
    assert driver is not None
    print(json.dumps({name: measure(driver, VARIANTS[name]) for name in sys.argv[1:] or VARIANTS}))


if __name__ == "__main__":
    main()
