"""Times `linear_step` against the eager step of the same layer, and counts both sides' bytes:

    python -m bench.linear_step --threads 2 [--dtype bfloat16] [--rows 50000] [--json FILE]

The layer of the full-batch networks (784 -> 500 of 50,000 samples): length-normalised input, bias,
mean of squares against a threshold, Adam. The eager step is F.linear, relu, mean of squares,
softplus, autograd and torch.optim.Adam; "eager" normalises its input at every step, as the papers'
code does, "eager, normalised before" is given it normalised. Interleaved medians; nothing is timed
before its gradient agrees with fp64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import machine, results
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.ops import backends, linear_tile
from ffengine.ops.config import LocalPassConfig, Norm, threshold
from ffengine.ops.linear_step import bytes_moved, extra_bytes, linear_step
from ffengine.ops.optim import OptimConfig, OptimState, Parameter

THETA = 2.0
CONFIG = LocalPassConfig(groups=1, goodness="mean_sq", loss=threshold(THETA))
NORM = Norm("length", eps=1e-4, length="l2")
OPTIM = OptimConfig("adam", lr=0.03)


class Layer:
    """One layer's data and parameters, with a step of each side."""

    def __init__(self, rows: int, features: int, out: int, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.rand(rows, features, generator=rng).to(dtype)
        self.y = torch.randint(0, 2, (rows,), generator=rng)
        self.weight = torch.randn(out, features, generator=rng)
        self.bias = torch.zeros(out)
        self.state, self.bias_state = (OptimState.create(p, OPTIM)
                                       for p in (self.weight, self.bias))
        self.side = 2 * self.y.float() - 1
        self.twin = [p.clone().requires_grad_() for p in (self.weight, self.bias)]
        self.adam = torch.optim.Adam(self.twin, lr=OPTIM.lr)
        self.unit = self.normalised()

    def ours(self, tile_rows: int | None = None) -> Any:
        return linear_step(
            Parameter(self.weight, self.state), self.x, self.y, config=CONFIG, optim=OPTIM,
            bias=Parameter(self.bias, self.bias_state), input_norm=NORM, tile_rows=tile_rows)

    def normalised(self) -> torch.Tensor:
        return self.x / (self.x.norm(dim=1, keepdim=True) + NORM.eps)

    def eager(self, x: torch.Tensor | None = None) -> None:
        weight, bias = (p.to(self.x.dtype) for p in self.twin)
        h = F.relu(F.linear(self.normalised() if x is None else x, weight, bias))
        g = h.float().pow(2).mean(1)
        self.adam.zero_grad()
        F.softplus(-self.side * (g - THETA)).mean().backward()
        self.adam.step()

    def check(self) -> None:
        """SystemExit unless this very call's gradient is right."""
        ours, same = (torch.empty_like(self.weight) for _ in range(2))
        exact = same.double()
        for out, kind, rows, where in ((ours, self.x.dtype, None, "auto"),
                                       (exact, torch.float64, 4096, "reference"),
                                       (same, self.x.dtype, 4096, "reference")):
            weight, bias = (p.to(out.dtype) for p in (self.weight, self.bias))
            linear_step(Parameter(weight, grad_out=out), self.x.to(kind), self.y, config=CONFIG,
                        optim=OPTIM, bias=Parameter(bias, grad_out=torch.empty_like(bias)),
                        input_norm=NORM, finish=False, tile_rows=rows, backend=where)
        error, allowed = ((t - exact).abs().max().item() for t in (ours, same))
        rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
        if not error <= 2 * allowed + rounding * len(self.x) ** 0.5:
            raise SystemExit(f"wrong gradient: error {error:.1e}, reference {allowed:.1e}")


def metered(call: Callable[[], object], layer: Layer) -> int:
    """Bytes a step holds at its peak beside inputs, weights and states."""
    moments = [t for s in (layer.state, layer.bias_state) for t in (s.m, s.v) if t is not None]
    kept = [t for s in layer.adam.state.values() for t in s.values()]
    known = [layer.x, layer.y, layer.side, layer.unit, layer.weight, layer.bias, *layer.twin,
             *moments, *kept]
    with MemoryMeter(state=known) as meter:
        call()
    return meter.report.working_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=784)
    parser.add_argument("--out", type=int, default=500)
    parser.add_argument("--tiles", type=int, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ext = backends.extension()
    if ext is not None:
        ext.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    layer = Layer(options.rows, options.features, options.out, dtype)
    layer.check()
    sides: dict[str, Callable[[], object]] = {
        "ours": layer.ours, "eager": layer.eager,
        "eager, normalised before": lambda: layer.eager(layer.unit)}
    for rows in options.tiles:
        sides[f"ours, tiles of {rows}"] = lambda rows=rows: layer.ours(rows)
    times = machine.interleaved(sides, options.repeats)
    shapes = tuple(layer.x.shape), tuple(layer.weight.shape)
    report: dict[str, Any] = {
        "shape": [options.rows, options.features, options.out], "dtype": options.dtype,
        "tile_rows": linear_tile.choose_rows(*layer.x.shape, options.out, dtype, NORM, "cpu"),
        "bytes_moved": bytes_moved(*shapes, dtype, CONFIG, optim=OPTIM),
        "extra_bytes": extra_bytes(*shapes, dtype, CONFIG, input_norm=NORM, bias=True),
        "sides": {}}
    for name, call in sides.items():
        report["sides"][name] = {
            **machine.spread(times[name]), "working_bytes": metered(call, layer),
            "ours_is_faster": 1 / machine.ratio(times["ours"], times[name])}
        row = report["sides"][name]
        print(f"{name:26s} {1e3 * row['median']:8.1f} ms  x{row['ours_is_faster']:.2f}  "
              f"{row['working_bytes'] / 1e6:8.1f} MB beside inputs, weights and states", flush=True)
    if options.json:
        results.write(options.json, "linear_step", report)


if __name__ == "__main__":
    main()
