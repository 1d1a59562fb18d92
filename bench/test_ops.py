"""pytest-benchmark suite of the ops and whole steps: `make bench`, or pytest bench
--benchmark-json FILE.

No shape is timed before its check is green; bytes, GB/s and the machine go into extra_info.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench import machine
from bench.cases import Case, cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.replace(" ", "-"))
def test_case(benchmark: Any, case: Case) -> None:
    call = case.make()
    benchmark.group = case.name.split()[0]
    benchmark.extra_info.update(call.info, machine=machine.facts())
    benchmark.pedantic(call.run, rounds=15, iterations=3, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    for name, rate in (("bytes", "gb_per_s"), ("flops", "gflop_per_s")):
        if name in call.info:
            benchmark.extra_info[rate] = call.info[name] / seconds / 1e9
