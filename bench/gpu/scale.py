"""Sizes of a run on a GPU, and of its rehearsal on a processor: the same code on both.

In a rehearsal the C++ kernels of the processor stand for the CUDA ones, Triton's interpreter for
its compiler; it computes 5e4 elements a second, so everything is tiny.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: A model, its constructor's arguments, the batch, and the precision.
Network = tuple[str, dict[str, Any], int, str]


@dataclass(frozen=True)
class Scale:
    """What is run.

    Args:
        backends: whose kernels are measured, in the order of the rows.
        sweeps: (N, C, H, W) of local_pass by stage of ResNet-17.
        batch_norm: of batch_pass; a weight gradient's (N, C, H, W), C channels out, 3x3.
        groups: of the grouped weight gradient.
        weight: elements that the optimizer steps.
        network: whose training step is measured, in bf16 first.
        memory: networks whose planned, metered and allocated bytes are compared.
        emulated: device profile whose memory a step is run in.
        rounds: turns of every side; step_seconds: of steps in one turn, of steps as many at
            least and at most.
        sweep_replays: of a graph of sweeps in one turn; sweep_dtypes: what they are measured in.
        test_processes: that take the GPU tests; sanitized: calls of ours that compute-sanitizer
            looks at, None: all there is time for; compiler: of torch.compile.
    """

    kind: Literal["gpu", "rehearsal"]
    device: str
    backends: tuple[str, ...]
    sweeps: dict[str, tuple[int, int, int, int]]
    batch_norm: tuple[int, int, int, int]
    gradient: tuple[int, int, int, int]
    groups: int
    weight: int
    network: Network
    memory: tuple[Network, ...]
    emulated: str
    rounds: int
    step_seconds: float
    steps: tuple[int, int]
    sweep_replays: int
    sweep_dtypes: tuple[str, ...]
    test_processes: int
    sanitized: int | None
    compiler: str


#: It costs the eager sides more than ours.
NO_DROPOUT = {"dropout": 0.0}
RESNET17: Network = ("deeperforward/resnet17", NO_DROPOUT, 128, "bf16")
FULL = Scale(
    kind="gpu", device="cuda", backends=("cuda", "triton"),
    sweeps={"stage1": (128, 100, 32, 32), "stage2": (128, 200, 16, 16),
            "stage3": (128, 400, 8, 8), "stage4": (128, 800, 4, 4)},
    batch_norm=(16, 80, 32, 32), gradient=(128, 100, 32, 32), groups=10, weight=1 << 22,
    network=RESNET17,
    memory=(RESNET17, ("deeperforward/tinycnn", NO_DROPOUT, 128, "bf16"),
            ("fflib/ffnn", {}, 128, "bf16")),
    emulated="orin-nano", rounds=5, step_seconds=0.1, steps=(3, 50), sweep_replays=6,
    sweep_dtypes=("bf16", "fp32"), test_processes=12, sanitized=None, compiler="inductor")

SMALL: Network = ("deeperforward/tinycnn", {**NO_DROPOUT, "image_size": 4,
                                            "widths": (10, 20, 20, 20)}, 2, "bf16")
REHEARSAL = Scale(
    kind="rehearsal", device="cpu", backends=("cpu", "triton"),
    sweeps={"stage1": (2, 20, 4, 4), "stage4": (2, 40, 2, 2)},
    batch_norm=(2, 8, 4, 4), gradient=(2, 20, 4, 4), groups=2, weight=1 << 10, network=SMALL,
    memory=(SMALL, ("deeperforward/resnet17", {**NO_DROPOUT, "image_size": 8,
                                               "planes": (10, 20, 40, 80)}, 4, "bf16"),
            ("fflib/ffnn", {"image_size": 8, "layers": (20, 16)}, 8, "bf16")),
    emulated="orin-nano", rounds=3, step_seconds=0.0, steps=(1, 1), sweep_replays=1,
    sweep_dtypes=("bf16",), test_processes=2, sanitized=20, compiler="aot_eager")
