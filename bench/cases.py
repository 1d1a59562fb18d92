"""What is timed: one list of checked calls, which two programs share.

`make bench` runs all of them under pytest-benchmark (bench/test_ops.py); the regression gate
(bench/timing.py) times those marked `gate` in two builds by turns. A name says what is computed:
another shape or dtype is another name, so that equal names of two commits are equal work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import ffengine as ff
from bench import batch_pass as coupled
from bench import linear_step as linear
from bench import local_pass as local
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.plans import Memory
from ffengine.engine.run.recipe import Recipe
from ffengine.nn.convolution import convolve
from ffengine.ops import linear_step
from ffengine.ops.config import Dropout, LocalPassConfig
from ffengine.ops.local_pass import bytes_moved, local_pass
from ffengine.ops.optim import ConvGeometry, OptimConfig, OptimState, Parameter
from ffengine.ops.weight_update import weight_update

BATCH = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Thresholds. Sweeps live on memory traffic, which neighbours disturb more than arithmetic.
SWEEP, GEMM, STEP = 0.15, 0.12, 0.12


@dataclass(frozen=True)
class Call:
    """A call whose result has been checked, and what it is known to move and compute."""

    run: Callable[[], Any]
    info: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the suites.

    Args:
        name: op, shape, dtype, setting: all that decides how much work it is.
        make: builds the inputs and checks the result; an exception makes a failing row.
        gate: the regression gate times it too.
        threshold: least slow-down, as a share, that the gate calls a regression.
    """

    name: str
    make: Callable[[], Call]
    gate: bool
    threshold: float


def maps(c: int, size: int, dtype: torch.dtype, batch: int = BATCH) -> torch.Tensor:
    """A batch (N, C, H, W) in channels_last, as the engine's maps are."""
    return torch.randn(batch, c, size, size).to(dtype).contiguous(
        memory_format=torch.channels_last)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """ValueError unless the two agree to 1 % in norm, which bf16 does by a wide margin."""
    error, size = (float(t.norm()) for t in (ours.float() - exact.float(), exact.float()))
    if not error <= 1e-2 * size:
        raise ValueError(f"[bench] wrong result: off by {error:.1e} of {size:.1e}")


def sweep(c: int, size: int, dtype: torch.dtype, dropout: float = 0.0) -> Call:
    a, y = maps(c, size, dtype), torch.randint(0, local.GROUPS, (BATCH,))
    local.check(a, y, LocalPassConfig(groups=local.GROUPS), "auto")
    config = LocalPassConfig(groups=local.GROUPS, dropout=Dropout(dropout))
    return Call(lambda: local_pass(a, y, config=config, want_da=True, out=a),
                {"bytes": bytes_moved(tuple(a.shape), a.dtype, config)})


def update(c: int, size: int, dtype: torch.dtype, batch: int = BATCH) -> Call:
    x, da = (maps(c, size, dtype, batch) for _ in range(2))
    weight = torch.randn(c, c, 3, 3).contiguous(memory_format=torch.channels_last)
    optim, geometry = OptimConfig(lr=1e-3), ConvGeometry((3, 3), 1, 1)
    exact, ours = torch.empty_like(weight), torch.empty_like(weight)
    for backend, out in (("reference", exact), ("auto", ours)):
        weight_update(Parameter(weight.clone(memory_format=torch.preserve_format),
                                OptimState.create(weight, optim), None, out), x, da, optim=optim,
                      geometry=geometry, backend=backend)
    close(ours, exact)
    given = Parameter(weight, OptimState.create(weight, optim))
    return Call(lambda: weight_update(given, x, da, optim=optim, geometry=geometry),
                {"flops": 2 * x.shape[0] * size * size * weight.numel()})


def convolution(c: int, size: int, dtype: torch.dtype) -> Call:
    x, geometry = maps(c, size, dtype), ConvGeometry((3, 3), 1, 1)
    weight = torch.randn(c, c, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    close(convolve(x, weight, None, geometry), torch.nn.functional.conv2d(x, weight, None, 1, 1))
    return Call(lambda: convolve(x, weight, None, geometry),
                {"flops": 2 * x.shape[0] * size * size * weight.numel()})


def dense(rows: int, features: int, out: int, dtype: torch.dtype, side: str = "ours") -> Call:
    layer = linear.Layer(rows, features, out, dtype)
    layer.check()
    call = getattr(layer, side)
    return Call(call, {
        "flops": 4 * rows * features * out, "working_bytes": linear.metered(call, layer),
        "bytes": linear_step.bytes_moved(tuple(layer.x.shape), tuple(layer.weight.shape),
                                         dtype, linear.CONFIG, optim=linear.OPTIM)})


def batch_sweeps(c: int, size: int, pools: bool, dtype: torch.dtype, side: str = "ours") -> Call:
    layer = coupled.Layer(BATCH, c, size, pools, dtype)
    layer.check()
    return Call(getattr(layer, side), {"bytes": layer.moved})


def training_step(model: str, precision: str, options: dict[str, Any]) -> Call:
    """A whole step of the engine, its own plan; its losses are the unfused rule's to 2 %."""
    recipe = Recipe(lr=1e-4, epochs=4, batch_size=BATCH)

    def trainer(backend: str, kind: str, plan: Plan | None = None) -> ff.Trainer:
        torch.manual_seed(0)
        net = ff.models.create(model, num_classes=10, in_channels=1, **options)
        return ff.Trainer(net, recipe=recipe, batch_size=BATCH, backend=backend, precision=kind,
                          memory=Memory(plan=plan), progress=False)

    ours = trainer("auto", precision)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, *ours.net.in_shape, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    # the reference back-end would search long for a plan, whose numbers are every plan's
    exact, made = (t.step(x, y).losses for t in (
        trainer("reference", "fp32", plan=ours.plan), ours))
    pairs = [(a, b) for a, b in zip(made, exact, strict=True) if a is not None and b is not None]
    if not pairs or any(not abs(float(a - b)) <= 0.02 * max(1.0, abs(float(b)))
                        for a, b in pairs):
        raise ValueError(f"[bench] {model}: losses {[float(a) for a, _ in pairs]}, the unfused "
                         f"rule's {[float(b) for _, b in pairs]}")
    return Call(lambda: ours.step(x, y))


STEPS: dict[str, dict[str, Any]] = {
    "deeperforward/tinycnn": {"image_size": 16, "widths": (20, 40, 80, 80)},
    "deeperforward/resnet17": {"image_size": 16, "planes": (20, 40, 80, 160)},
    "fflib/ffnn": {"image_size": 16, "layers": (400, 400), "theta": 2.0},
    "trifecta/shallow": {"image_size": 16, "widths": (16, 16, 32, 32, 64, 64)},
    "cwcomp/cfse": {"image_size": 16, "channels": (20, 40, 60, 80), "ilt": "none"},
}
#: (op, arguments, dtype) of the ops that the gate times.
GATED = {("sweep", 200, 16, "fp32"), ("sweep", 200, 16, "bf16"), ("sweep", 800, 4, "fp32"),
         ("update", 200, 16, "bf16"), ("update", 800, 4, "bf16"),
         ("convolution", 800, 4, "bf16"), ("convolution", 100, 32, "bf16")}


def cases() -> list[Case]:
    """Every case, the ops first."""
    found = []
    for precision, dtype in DTYPES.items():
        for c, size, _ in local.RESNET17:
            shape = f"{BATCH}x{c}x{size}x{size} {precision}"
            for make, name in ((sweep, "local_pass"), (update, "weight_update"),
                               (convolution, "convolve")):
                found.append(Case(f"{name} {shape}", partial(make, c, size, dtype),
                                  (make.__name__, c, size, precision) in GATED,
                                  SWEEP if make is sweep else GEMM))
        found.append(Case(f"local_pass {BATCH}x400x8x8 {precision} dropout 0.2",
                          partial(sweep, 400, 8, dtype, 0.2), True, SWEEP))
        found.append(Case(f"linear_step 512x784x500 {precision}",
                          partial(dense, 512, 784, 500, dtype), True, GEMM))
        found.append(Case(f"weight_update 8x400x8x8 {precision}",
                          partial(update, 400, 8, dtype, 8), precision == "fp32", GEMM))
        for side in ("ours", "eager"):
            of = "" if side == "ours" else f" {side}"
            found += [Case(f"linear_step {rows}x784x500 {precision}{of}",
                           partial(dense, rows, 784, 500, dtype, side), False, GEMM)
                      for rows in (4096, 50_000)]
            found += [Case(f"batch_pass {BATCH}x{c}x{size}x{size}{' pool' * pools} {precision}{of}",
                           partial(batch_sweeps, c, size, pools, dtype, side),
                           side == "ours" and (c, precision) in ((80, "fp32"), (240, "bf16")),
                           SWEEP)
                      for c, size, pools in coupled.CWCOMP]
        found += [Case(f"step {model} {'x'.join(map(str, _sizes(options)))} {precision}",
                       partial(training_step, model, precision, options),
                       precision == "fp32" or model == "deeperforward/resnet17", STEP)
                  for model, options in STEPS.items()]
    return found


def _sizes(options: dict[str, Any]) -> list[int]:
    (widths,) = (v for v in options.values() if isinstance(v, tuple))
    return [BATCH, int(options["image_size"]), *widths]
