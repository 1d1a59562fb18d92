"""Calls on the Triton kernels, one or two of each, that bench/aot.py compiles without a GPU.

Layouts and settings with the most registers, and each way a call is specialised. `VARIANTS` maps a
name to a function that makes the call on CPU tensors, whose values do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ffengine.kernels import batch_pass, linear_step, weight_update

from ffengine.ops import config as c
from ffengine.ops import local_pass as op
from ffengine.ops.layout import pooled_shape
from ffengine.ops.optim import OptimConfig, OptimState, StatePrecision
from ffengine.ops.optimizer_step import step_arguments
from ffengine.ops.params import BatchPassCall, BatchPassTensors, LinearCall


def sweep(shape: tuple[int, ...], config: c.LocalPassConfig, dtype: torch.dtype = torch.float32,
          channels_last: bool = False, tile: c.Tile = op.WHOLE, joined: bool = False) -> None:
    """One local_pass of every result, through the op's own argument layout.

    joined: a shortcut is added, z is the second half of a map's channels, a clock counts.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    n, k = shape[0], len(config.offsets(shape[1])) - 1
    h_prev = torch.zeros_like(a) if config.blend != 1.0 else None
    shortcut = clock = out = None
    if joined:
        shortcut, clock = torch.zeros_like(a), torch.zeros(1, dtype=torch.int32)
        wide = torch.zeros(n, 2 * shape[1], *shape[2:], dtype=dtype)
        out = wide.contiguous(memory_format=layout)[:, shape[1]:]
    op._run_kernel(op._Request(
        a, torch.zeros(n, dtype=torch.int64), config, torch.zeros(n, k), h_prev, shortcut, clock,
        out, True, True, tile, pooled_shape(shape, config), 1.0), "triton")


def from_memory(half: torch.dtype) -> dict[str, torch.Tensor]:
    """A row of numbers and a 16-bit copy, of weights of 4096 elements."""
    return {"row": torch.zeros(8), "half": torch.zeros(4096, dtype=half)}


def step(kind: str, count: int = 2, grad: torch.dtype = torch.float32,
         **beside: torch.Tensor) -> None:
    """One optimizer step."""
    optim = OptimConfig(kind, lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=kind == "sgd")
    weight, m, v = torch.zeros(3, 4096)
    take(weight, torch.zeros(4096, dtype=grad), OptimState(m, v, count - 1), optim, **beside)


def take(weight: torch.Tensor, grad: torch.Tensor, state: OptimState, optim: OptimConfig,
         **beside: torch.Tensor) -> None:
    tensors, _, call = step_arguments(weight, grad, state, optim, 1.0, **beside)
    weight_update.optimizer_step(tensors, call)


def compressed(form: StatePrecision, dtype: torch.dtype = torch.float32, count: int = 2,
               seed: int = 2, **beside: torch.Tensor) -> None:
    """One optimizer step on states of this format and a weight of this dtype."""
    weight, grad = torch.zeros(4096, dtype=dtype), torch.zeros(4096)
    optim = OptimConfig("adamw", weight_decay=0.01, state_precision=form)
    state = OptimState.create(weight, optim, seed=seed, name=str(seed))
    state.step = count
    take(weight, grad, state, optim, **beside)


def surround(dtype: torch.dtype, n: int = 64, scaled: bool = True) -> None:
    """linear_step's two passes around a tile's local_pass, 784 -> 512."""
    x, a = torch.zeros(n, 784, dtype=dtype), torch.zeros(n, 512, dtype=dtype)
    bias, scale, call = torch.zeros(512), torch.zeros(n), LinearCall(rms=True, eps=1e-5, chunk=64)
    if scaled:
        linear_step.prepare((x, a, a, bias, scale), call)
    else:
        linear_step.prepare((x, x, torch.zeros_like(x), None, None), call)
    linear_step.finish((a, scale if scaled else None, torch.zeros(-(-n // 64), 512)), call)


def sweeps(shape: tuple[int, ...], pool: bool = False, norm_first: bool = False,
           dtype: torch.dtype = torch.float32, channels_last: bool = False) -> None:
    """Both sweeps under BatchNorm, of every result."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    n, channels = shape[:2]
    size_z = [s // 2 if pool else s for s in shape[2:]]
    z = torch.zeros(n, channels, *size_z, dtype=dtype)
    zeros = torch.zeros
    for phase in (0, 1):
        batch_pass.batch_pass(
            BatchPassTensors(
                a, gamma=zeros(channels), table=zeros(5, channels), weight=zeros(n, channels),
                moments=zeros(2, n, channels), extrema=zeros(2, n, channels), z=z,
                da=torch.zeros_like(a)),
            BatchPassCall(phase, channels_last, pool, norm_first, True, False))


def middle(n: int, channels: int, groups: tuple[int, ...] | int, goodness: int, loss: c.Loss,
           affine: bool = True) -> None:
    """Between BatchNorm's sweeps, of every result."""
    equal = isinstance(groups, int)
    k = groups if equal else len(groups) - 1
    zeros = torch.zeros
    vectors = {name: zeros(channels) for name in ("pivot", "running_mean", "running_var")}
    if affine:
        vectors |= {name: zeros(channels) for name in ("gamma", "beta", "dgamma", "dbeta")}
    batch_pass.batch_pass(
        BatchPassTensors(
            zeros(n, channels), y=zeros(n, dtype=torch.int64), table=zeros(5, channels),
            weight=zeros(n, channels), moments=zeros(2, n, channels), offsets=zeros(k + 1).long(),
            g=zeros(n, k), loss=zeros(n), coef=zeros(n, k),
            work=zeros(3, channels, dtype=torch.float64), **vectors),
        BatchPassCall(4, False, False, False, goodness > 0, False, groups=k, equal_groups=equal,
                      goodness=goodness, loss=loss.code, pixels=256, pixels_z=64))


def peer() -> None:
    """The two kernels of peer normalisation."""
    a = torch.zeros(8, 1000)
    for phase in (2, 3):
        batch_pass.batch_pass(
            BatchPassTensors(a, y=torch.zeros(8, dtype=torch.int64), table=torch.zeros(1000),
                             moments=torch.zeros(1000), da=torch.zeros_like(a)),
            BatchPassCall(phase, False, False, False, False, False))


DROP = c.Dropout(0.2, 1, 2, 3)
CONV, LINEAR = (2, 128, 16, 16), (2, 2048)
#: ResNet-17's maps (channels, side), and as many groups as channels.
PIXELS = {"100": (100, 32, 10), "200": (200, 16, 10), "400": (400, 8, 10), "800": (800, 4, 10),
          "100-of-100": (100, 32, 100)}


def pixels(name: str, dtype: torch.dtype, joined: bool = False,
           **settings: Any) -> Callable[[], None]:
    """A sweep of one of those maps in channels_last."""
    channels, side, groups = PIXELS[name]
    shape = (2, channels, side, side)
    return lambda: sweep(shape, c.LocalPassConfig(groups=groups, **settings), dtype, True,
                         joined=joined)


VARIANTS = {
    **{f"pixels-{name}-{short}": pixels(name, dtype) for name in PIXELS
       for short, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))},
    "pixels-100-joined-bf16": pixels("100", torch.bfloat16, joined=True),
    "pixels-200-joined-bf16": pixels("200", torch.bfloat16, joined=True),
    "runs-joined-bf16": lambda: sweep(CONV, c.LocalPassConfig(groups=8, dropout=DROP),
                                      torch.bfloat16, joined=True),
    "pixels-100-dropout-bf16": pixels("100", torch.bfloat16, dropout=DROP),
    "pixels-800-dropout-fp32": pixels("800", torch.float32, dropout=DROP, goodness="mean_sq"),
    "pixels-200-pool-bf16": pixels("200", torch.bfloat16, pool="max2", goodness="mean_sq"),
    "pixels-100-squares-bf16": pixels("100", torch.bfloat16, goodness="mean_sq",
                                      norm=c.Norm("layer")),
    "group-fp32": lambda: sweep(CONV, c.LocalPassConfig(groups=8)),
    "group-bf16": lambda: sweep(CONV, c.LocalPassConfig(groups=8), torch.bfloat16),
    "dropout-fp32": lambda: sweep(CONV, c.LocalPassConfig(groups=8, dropout=DROP)),
    "dropout-nhwc-bf16": lambda: sweep(
        CONV, c.LocalPassConfig(groups=8, dropout=DROP), torch.bfloat16, True),
    "dropout-pool-nhwc-fp32": lambda: sweep(
        CONV, c.LocalPassConfig(groups=8, dropout=DROP, pool="max2", goodness="mean_sq",
                                loss=c.cwg()), channels_last=True),
    "pool-sum-fp32": lambda: sweep(
        CONV, c.LocalPassConfig(groups=8, pool="max2", goodness="sum_sq", loss=c.sparsemax())),
    "group-nhwc-fp32": lambda: sweep(CONV, c.LocalPassConfig(groups=8, loss=c.cwc()),
                                     channels_last=True),
    "length-linear-fp16": lambda: sweep(
        LINEAR, c.LocalPassConfig(groups=1, goodness="sum_sq", loss=c.symba(),
                                  norm=c.Norm("length")), torch.float16),
    "blend-linear-fp32": lambda: sweep(
        LINEAR, c.LocalPassConfig(groups=1, goodness="mean_sq", loss=c.threshold(), blend=0.7,
                                  norm=c.Norm("length", length="l2"))),
    "unequal-k1000-fp32": lambda: sweep(
        (2, 1024, 4, 4), c.LocalPassConfig(groups=(*range(1000), 1024), norm=c.Norm("layer"),
                                           loss=c.pvn())),
    "linear-step-fp32": lambda: surround(torch.float32),
    "linear-step-bf16": lambda: surround(torch.bfloat16, scaled=False),
    "adamw": lambda: step("adamw"),
    "sgd": lambda: step("sgd"),
    "adamw-from-memory": lambda: step("adamw", grad=torch.bfloat16, **from_memory(torch.bfloat16)),
    "states-8bit": lambda: compressed("8bit"),
    "states-8bit-from-memory": lambda: compressed("8bit", **from_memory(torch.float16)),
    "states-8bit-bf16-weight": lambda: compressed("8bit", torch.bfloat16),
    "states-bf16": lambda: compressed("bf16"),
    "states-bf16-bf16-weight": lambda: compressed("bf16", torch.bfloat16),
    "states-fp32-bf16-weight": lambda: compressed("fp32", torch.bfloat16),
    "batch-nhwc-fp32": lambda: sweeps((2, 240, 16, 16), channels_last=True),
    "batch-nhwc-bf16": lambda: sweeps((2, 240, 16, 16), dtype=torch.bfloat16, channels_last=True),
    "batch-nchw-bf16": lambda: sweeps((2, 240, 16, 16), dtype=torch.bfloat16),
    "batch-linear-fp32": lambda: sweeps((2, 2048)),
    "batch-pool-nhwc-fp32": lambda: sweeps((2, 80, 32, 32), True, channels_last=True),
    "batch-first-nhwc-bf16": lambda: sweeps((2, 480, 16, 16), True, True, torch.bfloat16, True),
    "batch-first-nchw-fp32": lambda: sweeps((2, 80, 33, 31), True, True),
    "batch-peer": peer,
    "middle": lambda: middle(32, 240, 10, 2, c.cwc()),
    "middle-alone": lambda: middle(16, 64, 1, 1, c.symba(), affine=False),
    "middle-unequal": lambda: middle(32, 256, (0, 30, 256), 0, c.ce()),
    "middle-many": lambda: middle(8, 1024, 512, 0, c.sparsemax()),
}
