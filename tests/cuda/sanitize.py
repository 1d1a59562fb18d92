"""A few small calls of the CUDA kernels for compute-sanitizer, which slows them a hundredfold.

    compute-sanitizer --tool memcheck python tests/cuda/sanitize.py [racecheck]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from local_pass_cuda_cases import CASES, CLUSTER_CASES, check  # noqa: E402
from test_optimizer_cuda import compressed  # noqa: E402

from ffengine.ops.local_pass import local_pass  # noqa: E402
from tests import batch_pass_cases, compressed_step_cases, linear_step_cases  # noqa: E402


def run(*args, **kwargs):  # type: ignore[no-untyped-def]
    out = local_pass(*args, **kwargs, backend="cuda")
    torch.cuda.synchronize()
    return out


def main(few: bool) -> int:
    cases = CASES[:6:5] + CLUSTER_CASES[:2] if few else CASES + CLUSTER_CASES
    for case in cases:
        for layout in case.layouts:
            check(case, torch.float32 if few else case.dtypes[-1], layout, "cuda", run)
    for case in list(batch_pass_cases.cases().values())[::8 if few else 2]:
        case.check("cuda", "cuda")
    for step in linear_step_cases.CASES[::4 if few else 1]:
        linear_step_cases.check(step, torch.float32, None, "cuda", "cuda")
    for name, rounded in list(compressed_step_cases.CASES.items())[::4 if few else 1]:
        compressed_step_cases.check(name, rounded, compressed, "cuda")
    print(f"{len(cases)} cases of local_pass, and those of batch_pass, linear_step and "
          "compressed_step, right")
    return 0


if __name__ == "__main__":
    sys.exit(main("racecheck" in sys.argv[1:]))
