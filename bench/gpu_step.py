"""A whole ResNet-17 step on a GPU, batch 128: the engine's back-ends, eager, backpropagation.

    python bench/gpu_step.py OUT_FOLDER      (called by bench/gpu.sh)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import fair


def main(folder: Path) -> int:
    worst = 0
    for backend in ("triton", "cuda"):
        print(f"== {backend}", flush=True)
        worst = max(worst, fair.main([
            "deeperforward/resnet17", "--batch-size", "128", "--device", "cuda",
            "--precision", "fp32,bf16", "--backend", backend, "--rounds", "10", "--limit", "20",
            "--only", "plain" if backend == "cuda" else "all", "--no-plot",
            "--out", str(folder / f"step_{backend}")]))
    return worst


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/gpu")))
