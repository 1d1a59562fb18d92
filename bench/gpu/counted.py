"""The program that ncu counts kernels of: each call once to warm up, then once to be counted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu import sweeps
from bench.gpu.scale import FULL, REHEARSAL, Scale
from bench.gpu.work import error_text
from ffengine.nn.convolution import convolve
from ffengine.ops.batch_pass import batch_pass
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm
from ffengine.ops.local_pass import local_pass
from ffengine.ops.optim import ConvGeometry, OptimConfig, OptimState, Parameter
from ffengine.ops.weight_update import gradient_update


def calls(scale: Scale) -> Iterator[tuple[str, Callable[[], Any]]]:
    device = torch.device(scale.device)
    a, y = sweeps.inputs(scale.sweeps["stage1"], torch.bfloat16, "nhwc", 0, device)
    config, backend = LocalPassConfig(groups=10), scale.backends[0]
    for name in scale.backends:
        yield f"local_pass, {name}", partial(local_pass, a, y, config=config, want_da=True,
                                             backend=name)
    weight, optim = torch.randn(scale.weight, device=device), OptimConfig("adamw")
    state, grad = OptimState.create(weight, optim), torch.randn(scale.weight, device=device)
    yield f"optimizer, {backend}", partial(gradient_update, Parameter(weight, state), grad,
                                           optim=optim, backend=backend)
    c = scale.batch_norm[1]
    b, target = sweeps.inputs(scale.batch_norm, torch.bfloat16, "nhwc", 1, device)
    vectors = {name: torch.rand(c, device=device) + 0.5
               for name in ("gamma", "beta", "running_mean", "running_var")}
    norm = LocalPassConfig(groups=4, goodness="mean_sq", norm=Norm("none"), pool="max2")
    yield f"batch_pass, {backend}", partial(
        batch_pass, b, target % 4, config=norm, coupling=BatchNorm(), training=True, want_da=True,
        backend=backend, **vectors)
    x = a.clone(memory_format=torch.channels_last)
    w = torch.randn(a.shape[1], a.shape[1], 3, 3, device=device).bfloat16().contiguous(
        memory_format=torch.channels_last)
    yield "convolution of the library", partial(convolve, x, w, None, ConvGeometry((3, 3), 1, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true")
    scale = REHEARSAL if parser.parse_args().rehearse else FULL
    gpu = scale.device == "cuda"
    for name, call in calls(scale):
        try:
            call()
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
            call()
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
        except Exception as reason:  # the others are counted all the same
            print(f"WRONG {name}: {error_text(reason)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
