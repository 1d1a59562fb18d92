"""local_pass on a GPU, L2-cold, against a copy of the same bytes timed the same way.

    python bench/gpu_local_pass.py OUT.json [--rounds 30]      (called by bench/gpu.sh)

Every row is checked against the fp64 reference on the very shape before it is timed; a row that
fails the check or does not run says so and carries no speed. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tolerances import assert_close  # noqa: E402

from bench import results  # noqa: E402
from ffengine.ops.config import Dropout, LocalPassConfig  # noqa: E402
from ffengine.ops.local_pass import bytes_moved, local_pass  # noqa: E402
from ffengine.reference.local_pass import local_pass as reference  # noqa: E402

SHAPES = {
    "stage1": (128, 100, 32, 32),
    "stage2": (128, 200, 16, 16),
    "stage3": (128, 400, 8, 8),
    "stage4": (128, 800, 4, 4),
}
CHECKED_ROWS = 8  # of the timed shape: the reference in fp64 needs ten times the memory


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Any:
    gen = torch.Generator(device="cuda").manual_seed(seed)
    a = torch.randn(shape, generator=gen, device="cuda").to(dtype)
    a = a.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else a
    return a, torch.randint(10, shape[:1], generator=gen, device="cuda")


def verify(config: LocalPassConfig, backend: str, a: torch.Tensor, y: torch.Tensor) -> None:
    """The first rows of the timed call against the reference; dropout counts from row 0."""
    out = local_pass(a, y, config=config, want_da=True, backend=backend)
    wide, same = (
        reference(a[:CHECKED_ROWS].to(d), y[:CHECKED_ROWS], config=config, want_da=True,
                  tile=None, da_scale=1.0)
        for d in (torch.float64, a.dtype))
    share = CHECKED_ROWS / a.shape[0]  # the loss is a mean over the rows of the call
    for name, kernel, exact, low in zip(("z", "g", "loss", "coef", "da"), out[:5], wide, same,
                                        strict=True):
        factor = share if name in ("coef", "da") else 1.0
        assert_close(kernel[:CHECKED_ROWS], exact * factor, low * factor,
                     reduction=a[0].numel(), what=name)


def graph_milliseconds(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds a call: one CUDA graph holds all calls, each on another input set."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    times = []
    for turn in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) / len(calls))
    return times


def sets_to_pass_l2(total_bytes: int) -> int:
    """Input sets whose traffic is four times L2, so that each finds it cold."""
    return max(3, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // total_bytes))


def copy_rate(total_bytes: int, rounds: int) -> float:
    """GB/s of device-to-device copies that read and write `total_bytes` in all."""
    count, size = sets_to_pass_l2(total_bytes), total_bytes // 2
    pairs = [[torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(2)]
             for _ in range(count)]
    calls = [lambda p=p: p[0].copy_(p[1]) for p in pairs]
    return 2 * size / statistics.median(graph_milliseconds(calls, rounds)) / 1e6


def measure(name: str, dtype: torch.dtype, layout: str, backend: str, p: float,
            rounds: int) -> dict[str, Any]:
    """One row: rates where the check is green, else the reason there are none."""
    shape = SHAPES[name]
    config = LocalPassConfig(groups=10, dropout=Dropout(p, seed=1, layer=2, step=3))
    row: dict[str, Any] = {"shape": shape, "stage": name, "dtype": str(dtype), "layout": layout,
                           "backend": backend, "dropout": p}
    try:
        total = bytes_moved(shape, dtype, config, want_z=True, want_da=True)
        sets = [inputs(shape, dtype, layout, s) for s in range(sets_to_pass_l2(total))]
        verify(config, backend, *sets[0])
        outs = [torch.empty_like(a) for a, _ in sets]
        calls = [lambda s=s, o=o: local_pass(s[0], s[1], config=config, out=o, want_da=True,
                                             backend=backend)
                 for s, o in zip(sets, outs, strict=True)]
        times = graph_milliseconds(calls, rounds)
    except Exception as reason:  # a shape that fails is a failing row, never a missing one
        return {**row, "ok": False, "error": f"{type(reason).__name__}: {reason}"[:500]}
    rate, copy = total / statistics.median(times) / 1e6, copy_rate(total, rounds)
    quantiles = statistics.quantiles(times, n=5)
    return {**row, "ok": True, "bytes": total, "ms": statistics.median(times),
            "ms_p20": quantiles[0], "ms_p80": quantiles[3], "gb_per_s": rate,
            "copy_gb_per_s": copy, "percent_of_copy": 100 * rate / copy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rows = []
    for name in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("nchw", "nhwc"):
                for backend in ("cuda", "triton"):
                    for p in (0.0, 0.2):
                        row = measure(name, dtype, layout, backend, p, options.rounds)
                        rows.append(row)
                        torch.cuda.empty_cache()
                        say(row)
    import triton

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    results.write(options.out, "gpu_local_pass", {
        "capability": capability, "triton": triton.__version__, "rows": rows})
    return 0 if all(r["ok"] for r in rows) else 1


def say(row: dict[str, Any]) -> None:
    head = (f"{row['stage']} {row['dtype'].removeprefix('torch.'):8} {row['layout']} "
            f"{row['backend']:6} dropout {row['dropout']}")
    tail = (f"{row['ms'] * 1e3:7.1f} us {row['gb_per_s']:6.0f} GB/s "
            f"{row['percent_of_copy']:5.1f} % of copy" if row["ok"] else row["error"])
    print(f"{head} {tail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
