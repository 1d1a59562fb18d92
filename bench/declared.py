"""What every op declares about a call before it runs, over layouts, dtypes and settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ffengine.ops import batch_pass, linear_step, local_pass, weight_update
from ffengine.ops import config as c
from ffengine.ops.optim import ConvGeometry, OptimConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BACKENDS = ("reference", "cpu", "triton", "cuda")
MAPS, WIDE, ROWS = (8, 100, 32, 32), (32, 800, 4, 4), (128, 2000)
SWEEPS: dict[str, tuple[tuple[int, ...], c.LocalPassConfig]] = {
    "100x32x32": (MAPS, c.LocalPassConfig(groups=10)),
    "800x4x4": (WIDE, c.LocalPassConfig(groups=10)),
    "100x32x32 dropout": (MAPS, c.LocalPassConfig(groups=10, dropout=c.Dropout(0.2))),
    "100x32x32 pool": (MAPS, c.LocalPassConfig(groups=10, pool="max2")),
    "2000 length": (ROWS, c.LocalPassConfig(groups=1, goodness="mean_sq", loss=c.threshold(2.0),
                                            norm=c.Norm("length"))),
    "2000 blend": (ROWS, c.LocalPassConfig(groups=1, goodness="mean_sq", loss=c.threshold(2.0),
                                           norm=c.Norm("length"), blend=0.7)),
    "2000 k 1000": (ROWS, c.LocalPassConfig(groups=1000)),
}
COUPLINGS: dict[str, tuple[tuple[int, ...], c.LocalPassConfig, c.BatchNorm | c.Peer]] = {
    name: (shape, c.LocalPassConfig(groups=10, goodness="mean_sq", norm=c.Norm("none"), pool=pool),
           coupling)
    for name, shape, pool, coupling in (
        ("240x16x16", (32, 240, 16, 16), "none", c.BatchNorm(1e-4)),
        ("80x32x32 pool", (32, 80, 32, 32), "max2", c.BatchNorm(1e-4)),
        ("80x32x32 norm first", (32, 80, 32, 32), "max2", c.BatchNorm(1e-4, order="norm_pool")),
        ("2000 peer", (128, 2000), "none", c.Peer()))}
#: (x, da, weight, geometry) of weight gradients.
PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...],
                          ConvGeometry | None]] = {
    "100 -> 100 on 32x32": (MAPS, MAPS, (100, 100, 3, 3), ConvGeometry((3, 3), 1, 1)),
    "100 -> 200 stride 2": (MAPS, (8, 200, 16, 16), (200, 100, 3, 3), ConvGeometry((3, 3), 2, 1)),
    "800 -> 800 on 4x4": (WIDE, WIDE, (800, 800, 3, 3), ConvGeometry((3, 3), 1, 1)),
    "784 -> 2000": ((128, 784), ROWS, (2000, 784), None),
}
OPTIMS = {"adamw": OptimConfig(), "adamw bf16 states": OptimConfig(state_precision="bf16"),
          "adamw 8bit states": OptimConfig(state_precision="8bit"),
          "sgd": OptimConfig("sgd", momentum=0.9)}
DENSE: tuple[tuple[int, int], tuple[int, int]] = (4096, 784), (500, 784)
DENSE_CONFIG = c.LocalPassConfig(groups=1, goodness="mean_sq", loss=c.threshold(2.0))

Rows = Iterator[tuple[str, dict[str, int]]]


def moved() -> Rows:
    """bytes_moved: shapes and dtypes decide."""
    for kind, dtype in DTYPES.items():
        for name, (shape, config) in SWEEPS.items():
            for z in (True, False):
                yield (f"local_pass {name} {kind}{'' if z else ' without z'}",
                       _row(local_pass.bytes_moved(shape, dtype, config, want_z=z)))
        for name, (shape, config, coupling) in COUPLINGS.items():
            yield (f"batch_pass {name} {kind}",
                   _row(batch_pass.bytes_moved(shape, dtype, config, coupling)))
        for name, (x, da, weight, _) in PRODUCTS.items():
            for optimizer, optim in OPTIMS.items():
                for add in (False, True):
                    made = weight_update.bytes_moved(x, da, weight, dtype, optim=optim,
                                                     accumulate=add, finish=not add)
                    yield f"weight_update {name} {kind} {optimizer}{' adds' * add}", _row(made)
        yield (f"linear_step 784 -> 500 {kind}",
               _row(linear_step.bytes_moved(*DENSE, dtype, DENSE_CONFIG, optim=OPTIMS["adamw"])))


def extra() -> Rows:
    """extra_bytes by back-end; the CPU's with one thread and with two."""
    before = torch.get_num_threads()
    try:
        for backend in BACKENDS:
            for threads in (1, 2) if backend == "cpu" else (1,):
                torch.set_num_threads(threads)
                at = f"{backend}, {threads} thread(s)" if backend == "cpu" else backend
                for name, made in _extra_of(backend):
                    yield f"{name} {at}", made
    finally:
        torch.set_num_threads(before)


def _extra_of(backend: str) -> Rows:
    for kind in ("fp32", "bf16"):
        dtype = DTYPES[kind]
        for name, (shape, config) in SWEEPS.items():
            for last in (False, True) if len(shape) == 4 else (False,):
                made = local_pass.extra_bytes(shape, dtype, config, backend=backend,
                                              channels_last=last)
                yield f"local_pass {name} {kind}{' channels_last' * last}", _row(made)
        for name, (shape, config, coupling) in COUPLINGS.items():
            yield (f"batch_pass {name} {kind}",
                   _row(batch_pass.extra_bytes(shape, dtype, config, coupling, backend=backend,
                                               channels_last=len(shape) == 4)))
        for name, (x, da, weight, geometry) in PRODUCTS.items():
            for add, rounds in ((False, False), (True, False), (False, True)):
                made = weight_update.extra_bytes(x, da, weight, dtype, geometry=geometry,
                                                 accumulate=add, bias=geometry is None,
                                                 compressed=rounds, backend=backend)
                what = " adds" * add + " compressed" * rounds
                yield f"weight_update {name} {kind}{what}", _row(made)
        yield (f"linear_step 784 -> 500 {kind}",
               _row(linear_step.extra_bytes(*DENSE, dtype, DENSE_CONFIG, bias=True,
                                            input_norm=c.Norm("length"), backend=backend)))


def _row(nbytes: Any) -> dict[str, int]:
    return {"bytes": int(nbytes)}
