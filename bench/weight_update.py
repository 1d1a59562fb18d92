"""Times the weight gradient of ResNet-17's layers, ours against the library's; rewrites the rows
beside `choose` in ffengine/ops/weight_update.py:

    python -m bench.weight_update --threads 2 --samples 32 4 [--dtype bfloat16] [--write]
                                  [--json FILE]

Interleaved medians; a shape is timed only after its gradient passed a check against fp64. Times are
the process's CPU time a thread with --cpu-time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import results
from ffengine.ops import backends
from ffengine.ops import weight_update as op
from ffengine.ops.weight_update import ConvGeometry, OptimConfig, OptimState

#: C, O, input size, stride, how many such layers; all 3x3 with padding 1.
LAYERS = [(3, 100, 32, 1, 1), (100, 100, 32, 1, 4), (100, 200, 32, 2, 1), (200, 200, 16, 1, 3),
          (200, 400, 16, 2, 1), (400, 400, 8, 1, 3), (400, 800, 8, 2, 1), (800, 800, 4, 1, 3)]
TABLE = re.compile(r"(?<=\n)#   C    O .*\n(?:# .*\n)+")


def calls(layer: tuple[int, ...], samples: int,
          dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed: gradient and AdamW fused, the gradient alone, the library's gradient."""
    c, o, size, stride, _ = layer
    geometry = ConvGeometry((3, 3), stride, 1)
    last = torch.channels_last
    x = torch.randn(samples, c, size, size).to(dtype).contiguous(memory_format=last)
    da = torch.randn(samples, o, *geometry.output_size(size, size)).to(dtype)
    da = da.contiguous(memory_format=last)
    weight = torch.randn(o, c, 3, 3).contiguous(memory_format=last)
    optim, buffer = OptimConfig(lr=1e-4), torch.zeros_like(weight)
    state = OptimState.create(weight, optim)
    shape = op.conv_shape(tuple(weight.shape), tuple(x.shape), geometry)

    def library(x: torch.Tensor, da: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.convolution_backward(
            da, x, w, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1,
            [False, True, False])[1]

    def ours(step: bool) -> None:
        parameter = op.Parameter(weight, state, None if step else buffer, None)
        op._run_cpu(parameter, x, da, shape, optim, step, 1.0, not step)

    ours(False)
    exact = library(x.double(), da.double(), weight.double())
    error = (buffer.double() - exact).abs().max() / exact.abs().max()
    if not error < torch.finfo(torch.float32).eps * da.numel() ** 0.5:
        raise SystemExit(f"{layer}: wrong gradient, relative error {error:.1e}; not timed")
    cast, flat = weight.to(dtype), (x.contiguous(), da.contiguous(), weight.to(dtype).contiguous())
    return {"fused": lambda: ours(True), "ours": lambda: ours(False),
            "library": lambda: library(x, da, cast), "library nchw": lambda: library(*flat)}


def medians(what: dict[str, Callable[[], object]], repeats: int,
            clock: Callable[[], float]) -> dict[str, float]:
    """ms of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(repeats):
        for name, call in what.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 4])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--write", action="store_true", help="rewrite the table beside choose()")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ext = backends.extension()
    if ext is None:
        raise SystemExit("the C++ kernels are not built")
    torch.set_num_threads(options.threads)
    ext.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = [f"#   C    O  input  stride  {options.dtype}, {options.threads} thread(s), ms of "
            f"batch {', '.join(map(str, options.samples))}: ours | library"]
    total: dict[tuple[int, str], float] = {}
    measured: list[dict[str, object]] = []
    for layer in LAYERS:
        cells = []
        for n in options.samples:
            ms = medians(calls(layer, n, getattr(torch, options.dtype)), options.repeats, clock)
            for name, value in ms.items():
                total[n, name] = total.get((n, name), 0.0) + layer[-1] * value
            cells.append(f"{ms['ours']:7.2f} | {ms['library']:7.2f}")
            measured.append({"layer": layer, "samples": n, "milliseconds": ms})
            print(n, layer, " ".join(f"{k} {v:.2f}" for k, v in ms.items()), flush=True)
        c, o, size, stride, _ = layer
        rows.append(f"# {c:3d}  {o:3d}   {size:2d}²     {stride}   " + "   ".join(cells))
    print("\n".join(rows))
    for (n, name), value in total.items():
        print(f"all layers, batch {n}, {name}: {value:.1f} ms")
    if options.json:
        results.write(options.json, "weight_update", {
            "dtype": options.dtype, "cpu_time": options.cpu_time, "rows": measured})
    if options.write:
        path = Path(op.__file__)
        path.write_text(TABLE.sub("\n".join(rows) + "\n", path.read_text(), count=1))


if __name__ == "__main__":
    main()
