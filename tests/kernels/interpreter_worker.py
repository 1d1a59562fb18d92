"""Run the Triton cases in Triton's interpreter, in a process of their own.

TRITON_INTERPRET must be set before the kernels are decorated, and interpreted and compiled kernels
cannot share a process. Prints one JSON object: case id -> "" or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy: inf and NaN are cases here

import torch  # noqa: E402

from tests import compressed_step_cases  # noqa: E402
from tests.batch_pass_cases import cases as batch_cases  # noqa: E402
from tests.conftest import _poisoned  # noqa: E402
from tests.kernels import cases, check, optimizer_cases  # noqa: E402
from tests.linear_step_cases import INTERPRETED as LINEAR_STEPS  # noqa: E402
from tests.linear_step_cases import check as check_linear  # noqa: E402


def outcome(run: Callable[[], None]) -> str:
    try:
        run()
    except Exception:
        return traceback.format_exc(limit=-4)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    torch.empty = _poisoned(torch.empty)
    part, parts = int(sys.argv[1]), int(sys.argv[2])
    jobs: dict[str, Callable[[], None]] = {}
    for case in cases.all_cases().values():
        jobs[case.id] = lambda case=case: check.check(case, "cpu")
    for layout in ("nchw", "nhwc"):
        jobs[f"rows-alone-{layout}"] = lambda layout=layout: check.check_rows_alone(
            layout == "nhwc", "cpu")
    for name in optimizer_cases.CASES:
        jobs[name] = lambda name=name: optimizer_cases.check(name, "cpu")
    for name in optimizer_cases.FROM_MEMORY:
        jobs[name] = lambda name=name: optimizer_cases.check_row(name, "cpu")
    for name, state_case in optimizer_cases.COMPRESSED.items():
        jobs[name] = lambda name=name, case=state_case: compressed_step_cases.check(
            name, case, optimizer_cases.step)
    for name, batch_case in batch_cases().items():
        jobs[name] = lambda case=batch_case: case.check("triton", "cpu")
    for name, (case, dtype, rows) in LINEAR_STEPS.items():
        jobs[name] = lambda case=case, dtype=dtype, rows=rows: check_linear(
            case, dtype, rows, "triton")
    results = {}
    for name in list(jobs)[part::parts]:
        start = time.perf_counter()
        results[name] = outcome(jobs[name])
        print(f"{time.perf_counter() - start:6.2f} s  {name}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
