"""A few small CUDA local_pass calls for compute-sanitizer, which slows kernels a hundredfold.

    compute-sanitizer --tool memcheck python tests/cuda/sanitize.py [racecheck]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from local_pass_cuda_cases import CASES, CLUSTER_CASES, check  # noqa: E402

from ffengine.ops.local_pass import local_pass  # noqa: E402


def run(*args, **kwargs):  # type: ignore[no-untyped-def]
    out = local_pass(*args, **kwargs, backend="cuda")
    torch.cuda.synchronize()
    return out


def main(few: bool) -> int:
    cases = CASES[:6:5] + CLUSTER_CASES[:2] if few else CASES + CLUSTER_CASES
    for case in cases:
        for layout in case.layouts:
            check(case, torch.float32 if few else case.dtypes[-1], layout, "cuda", run)
    print(f"{len(cases)} cases right")
    return 0


if __name__ == "__main__":
    sys.exit(main("racecheck" in sys.argv[1:]))
