"""`linear_step`: a dense Forward-Forward layer trained whole.

Forward, goodness, local loss, weight gradient and optimizer, tile by tile over the samples: the
activations of one tile exist, those of the batch never do (50,000 samples, 784 -> 500: 10 MB
beside inputs, weight, states and results).

reference: ffengine/reference/linear_step.py   cpu: csrc/cpu/linear_step.cpp
triton: kernels/linear_step.py                 cuda: csrc/cuda/linear_step.cu
(the library multiplies, local_pass turns a tile of a into da where it lies; the kernels fold the
input's normalisation in as a row scale and sum the bias gradient: ffengine/ops/linear_tile.py)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from ffengine.ops import backends, linear_tile, product
from ffengine.ops import local_pass as sweep
from ffengine.ops import weight_update as update
from ffengine.ops.config import LocalPassConfig, Loss, Norm, Tile
from ffengine.ops.launch import recorded
from ffengine.ops.memory_accounting import allocating
from ffengine.ops.optim import DTYPE_CODES, OptimConfig, Parameter, state_bytes
from ffengine.ops.optimizer_step import check_state, step_dtype
from ffengine.ops.params import LinearStepOutput, LinearStepRequest
from ffengine.ops.tracing import traced, unrecorded
from ffengine.reference import linear_step as reference

__all__ = ["LinearStepOutput", "bytes_moved", "extra_bytes", "linear_step"]

NO_NORM = Norm("none")


def bytes_moved(x_shape: tuple[int, int], weight_shape: tuple[int, int], dtype: torch.dtype,
                config: LocalPassConfig, *, optim: OptimConfig, finish: bool = True,
                weight_dtype: torch.dtype | None = None) -> int:
    """Bytes a step must move: x read once, weight and states read and written, (N, K) results.

    Without `finish`: the gradient instead. weight_dtype: default is fp32 below fp64.
    """
    wide, n_w = 8 if dtype is torch.float64 else 4, math.prod(weight_shape)
    k, kept = len(config.offsets(weight_shape[0])) - 1, weight_dtype or step_dtype(dtype)
    stored = n_w * kept.itemsize + state_bytes(n_w, kept, optim) if finish else wide * n_w
    return (dtype.itemsize * math.prod(x_shape) + 2 * stored
            + wide * x_shape[0] * (2 * k + 1))


def extra_bytes(x_shape: tuple[int, int], weight_shape: tuple[int, int], dtype: torch.dtype,
                config: LocalPassConfig, *, input_norm: Norm = NO_NORM, bias: bool = False,
                g0: bool = False, tile_rows: int | None = None, grad_out: bool = False,
                backend: str = "cpu", weight_dtype: torch.dtype | None = None) -> int:
    """Most bytes a step holds beside its arguments and results: a tile's, and the gradient.

    For dense x, and without what a loss that is a function allocates; `grad_out`: buffers for the
    gradients are given.
    """
    (n, features), out = x_shape, weight_shape[0]
    wide, item = (8 if dtype is torch.float64 else 4), dtype.itemsize
    k, numel = len(config.offsets(out)) - 1, math.prod(weight_shape)
    gradients = 0 if grad_out else wide * (numel + out * bias)
    if backend == "reference":  # plain PyTorch keeps whole maps
        rows = min(n, tile_rows or n)
        return gradients + 4 * wide * numel + max(item, 4) * rows * (4 * features + 8 * out)
    paired = _paired(config)
    device = "cpu" if backend == "cpu" else "cuda"
    rows = min(n, tile_rows or linear_tile.choose_rows(n, features, out, dtype, input_norm, device))
    low = item * (numel * ((weight_dtype or step_dtype(dtype)) is not dtype) + out * bias)
    low = low if item < 4 else 0
    tile = rows * linear_tile.row_bytes(features, out, dtype, input_norm, device)
    gathered = rows * (8 + 4 * k * g0) * paired
    results = 4 * (2 * rows * k + rows // (1 + paired)) + sweep.extra_bytes(
        (rows, out), dtype, config, backend=backend, want_z=False)
    inside = _product_bytes(rows // (1 + paired), weight_shape, dtype, backend)
    return gradients + low + tile + max(gathered + results, inside)


def _product_bytes(rows: int, weight_shape: tuple[int, int], dtype: torch.dtype,
                   backend: str) -> int:
    """What the products of a tile hold inside: nothing where the library multiplies in fp32."""
    out, features = weight_shape
    device = "cpu" if backend == "cpu" else "cuda"
    if dtype is torch.float32:
        inside = product.extra_bytes(rows, weight_shape, dtype, device)
    else:
        inside = linear_tile.library_bytes(features, out) if backend == "cpu" else 0
    if library_adds(dtype, device):
        return inside
    return max(inside, update.extra_bytes((rows, features), (rows, out), weight_shape, dtype,
                                          accumulate=True, backend=backend))


def library_adds(dtype: torch.dtype, device: str) -> bool:
    """The library forms and adds a tile's weight gradient. 50,000 x 784 -> 500, two threads of a
    Xeon, s: fp32 by the library, which adds as it goes, 0.13, by weight_update 0.17; where MKL
    lags, one thread, 1024 rows: 6.8 and 3.8 ms. It rounds every 16-bit tile's sum to 16 bits,
    weight_update (on a CPU) none."""
    return dtype is torch.float32 and not (device == "cpu" and product.mkl_lags())


def linear_step(weight: Parameter, x: torch.Tensor, y: Any, *, config: LocalPassConfig,
                optim: OptimConfig, bias: Parameter | None = None, input_norm: Norm = NO_NORM,
                g0: torch.Tensor | None = None, tile_rows: int | None = None, finish: bool = True,
                backend: str = "auto") -> LinearStepOutput:
    """One training step of a dense layer on its own loss: a = x W^T + bias, local_pass, optimizer.

    Equal to F.linear(normalised x), local_pass(want_da=True) and weight_update in a row, whatever
    the tile, but for the order of sums.

    Args:
        weight: its value (O, in) fp32, or bf16 where x is bf16 (fp64: reference only), contiguous.
            Its state's step rises by one with `finish`, and may be None without. Nothing is
            accumulated: a step sees its whole batch.
        x: layer input (N, in), fp32 | bf16 | fp16 (fp64: reference only); products take its dtype.
        y: targets int64 (N,) as for local_pass, or, if `config.loss` is a function, a tensor of N
            rows; the function sees a tile of rows at a time.
        config: groups, goodness, loss, relu_gradient, dropout. Its norm counts for nothing (no z is
            formed); pool and blend must be off.
        bias: the same for the layer's bias, its value (O,) fp32 (fp64).
        input_norm: none, or length of scope sample: x / (||x|| + eps), folded in as a row scale.
        g0: (N, K) fp32 term added to the goodness (collaborative FF).
        tile_rows: most samples at a time, None: by shape and dtype. A loss of pairs takes row n and
            row n + N/2 together.
        finish: False leaves values and states alone: only the gradients are wanted.

    Returns:
        LinearStepOutput: g (N, K), loss (N,) unscaled per row (N/2 for pair losses), coef (N, K),
        fp32 (fp64 for fp64 input), of the weights before the step.

    Raises:
        TypeError, ValueError: one line with what was expected and what came.
    """
    call = LinearStepRequest(weight, x, y, config, optim, bias, input_norm, g0, tile_rows, finish)
    _check(call)
    name = backends.resolve("linear_step", backend, x.device.type, x.dtype)
    is_recorded = torch.is_grad_enabled() and x.requires_grad
    call = call._replace(x=x.detach(), config=replace(config, norm=NO_NORM))
    result = _results(call)
    with unrecorded():
        if traced() and not isinstance(config.loss, Loss):  # no schema holds a function
            torch.compiler.disable(run)(name, call, result)  # type: ignore[no-untyped-call]
        else:
            run(name, call, result)
    for p in (weight, bias):
        if finish and p is not None and p.state is not None:
            p.state.step += 1
    return cast(LinearStepOutput, sweep.forbid_backward(x, result)) if is_recorded else result


def _paired(config: LocalPassConfig) -> bool:
    return isinstance(config.loss, Loss) and config.loss.paired


def _results(c: LinearStepRequest) -> LinearStepOutput:
    n, k = c.x.shape[0], len(c.config.offsets(c.weight.value.shape[0])) - 1
    loss = n // 2 if _paired(c.config) else n
    wide = step_dtype(c.weight.value.dtype)
    return LinearStepOutput(*(torch.empty(size, dtype=wide, device=c.x.device)
                              for size in ((n, k), (loss,), (n, k))))


@recorded("linear_step")
def run(backend: str, c: LinearStepRequest, result: LinearStepOutput) -> None:
    """A checked call: fills `result`, then steps; the states' counts are the caller's to raise."""
    parameters = [p for p in (c.weight, c.bias) if p is not None]
    if backend == "reference":
        found = reference.linear_step(
            c.weight.value.to(step_dtype(c.weight.value.dtype)), c.x, c.y, config=c.config,
            bias=c.bias and c.bias.value, input_norm=c.input_norm, g0=c.g0, tile_rows=c.tile_rows)
        for mine, value in zip(result, found, strict=False):
            mine.copy_(value)
        gradients = [found.weight, found.bias]
        for p, grad in zip(parameters, gradients, strict=False):
            if p.grad_out is not None:
                p.grad_out.copy_(grad)
    else:
        with allocating("gradient"):
            gradients = [torch.zeros_like(p.value, dtype=step_dtype(p.value.dtype))
                         if p.grad_out is None else p.grad_out.zero_() for p in parameters]
        _run_tiles(c, backend, result, *gradients)
    for p, grad in zip(parameters, gradients, strict=False):
        if c.finish and p.state is not None:
            update.optimizer_step(p.value, grad, p.state, c.optim, 1.0, backend)


def _run_tiles(c: LinearStepRequest, backend: str, result: LinearStepOutput, dw: torch.Tensor,
               db: torch.Tensor | None = None) -> None:
    (n, features), out, paired = c.x.shape, len(c.weight.value), _paired(c.config)
    rows = _rows(n, features, out, c.x.dtype, c)
    weight, state, _, _ = c.weight
    half = None if state is None else state.half
    kept = half is not None and half.copy.dtype is c.x.dtype
    weight = half.current(weight) if half and kept else weight.to(c.x.dtype)  # itself in fp32
    buffer = torch.empty(rows, out, dtype=c.x.dtype, device=c.x.device)
    scale = room = None
    if linear_tile.folds(c.x.dtype, c.input_norm):
        scale = torch.empty(rows, dtype=torch.float32, device=c.x.device)
    if linear_tile.copies(c.x.dtype, c.input_norm):
        room = torch.empty(rows, features, dtype=c.x.dtype, device=c.x.device)
    for tile, parts in reference.tiles(n, rows, paired):
        _run_tile(c, backend, result, dw, db, weight, Buffers(buffer, scale, room), tile, parts)


class Buffers(NamedTuple):
    """What every tile uses again: a, which becomes da; row scales; normalised inputs."""

    a: torch.Tensor
    scale: torch.Tensor | None
    room: torch.Tensor | None

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None,
                                                   torch.Tensor | None]:
        return (self.a[start:stop], None if self.scale is None else self.scale[start:stop],
                None if self.room is None else self.room[start:stop])


def _run_tile(c: LinearStepRequest, backend: str, result: LinearStepOutput, dw: torch.Tensor,
              db: torch.Tensor | None, weight: torch.Tensor, buffers: Buffers, tile: Tile,
              parts: tuple[slice, ...]) -> None:
    """One tile; its rows lie together or, in pairs, in two runs, which are never gathered."""
    runs, at = [], 0
    for p in parts:
        part, scale, room = buffers.rows(at, at + p.stop - p.start)
        x = linear_tile.inputs(backend, c.x[p], c.input_norm, room)
        linear_tile.forward(backend, x, weight, c.bias and c.bias.value, c.input_norm, part, scale)
        runs.append((x, part))
        at += p.stop - p.start
    a, scales, _ = buffers.rows(0, at)
    da_scale = _sweep(c, backend, result, a, tile, parts)
    linear_tile.finish(backend, a, scales, db, 1.0 / da_scale)
    for x, part in runs:
        _add_product(c, backend, dw, part, x, da_scale)


def _rows(n: int, features: int, out: int, dtype: torch.dtype, c: LinearStepRequest) -> int:
    """Rows of a tile's buffers: at least a pair where the loss takes pairs."""
    wanted = c.tile_rows or linear_tile.choose_rows(n, features, out, dtype, c.input_norm,
                                                    c.x.device.type)
    return max(1, min(n, max(wanted, 2 if _paired(c.config) else 1)))


def _sweep(c: LinearStepRequest, backend: str, result: LinearStepOutput, a: torch.Tensor,
           tile: Tile, parts: tuple[slice, ...]) -> float:
    """a becomes da where it lies; g, loss and coef go to their rows. Returns da's scale."""
    found = sweep.local_pass(
        a, reference.gather(c.y, parts), config=c.config, want_z=False, want_da=True, da_out=a,
        g0=None if c.g0 is None else reference.gather(c.g0, parts), tile=tile, backend=backend)
    for whole, part in zip(result, (found.g, found.loss, found.coef), strict=True):
        reference.scatter(whole, cast(torch.Tensor, part), parts)
    return found.da_scale


def _add_product(c: LinearStepRequest, backend: str, dw: torch.Tensor, da: torch.Tensor,
                 x: torch.Tensor, da_scale: float) -> None:
    """dw += da^T x / da_scale."""
    if library_adds(x.dtype, x.device.type):
        dw.addmm_(da.t(), x)
        return
    update.weight_update(Parameter(c.weight.value, accumulate=dw), x, da, optim=c.optim,
                         finish=False, da_scale=da_scale, backend=backend)


def _check(c: LinearStepRequest) -> None:
    """Validate without a host sync."""
    weight = c.weight.value
    for name, t in (("weight", weight), ("x", c.x)):
        if not isinstance(t, torch.Tensor) or t.dim() != 2:
            came = tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
            raise ValueError(f"[linear_step] {name} must be a matrix, got {came}")
    if c.x.dtype not in (*DTYPE_CODES, torch.float64):
        raise TypeError("[linear_step] x must be of float32, bfloat16, float16 or float64, got "
                        f"{c.x.dtype}")
    update.check_weight_dtype("linear_step", weight, c.x.dtype)
    if c.x.shape[1] != weight.shape[1] or c.x.device != weight.device:
        raise ValueError(f"[linear_step] x must be (N, {weight.shape[1]}) on {weight.device} "
                         f"as the weight, got {tuple(c.x.shape)} on {c.x.device}")
    _check_settings(c)
    _check_rows(c)
    _check_parameter(c, "weight", c.weight)
    if c.bias is not None:
        _check_parameter(c, "bias", c.bias)


def _check_settings(c: LinearStepRequest) -> None:
    if c.config.pool != "none" or c.config.blend != 1.0:
        raise ValueError("[linear_step] expected a config without pool and blend, got "
                         f"pool={c.config.pool!r} blend={c.config.blend}")
    norm = c.input_norm
    if norm.kind not in ("none", "length") or (norm.kind == "length" and norm.scope != "sample"):
        raise ValueError("[linear_step] input_norm must be none, or length of scope sample, got "
                         f"{norm.kind} of scope {norm.scope}")
    if c.tile_rows is not None and c.tile_rows < 1:
        raise ValueError(f"[linear_step] tile_rows must be 1 or more, got {c.tile_rows}")


def _check_rows(c: LinearStepRequest) -> None:
    """Targets and g0: a row for every sample."""
    n, k = c.x.shape[0], len(c.config.offsets(c.weight.value.shape[0])) - 1
    if isinstance(c.config.loss, Loss):
        sweep.check_targets(c.y, n, k, c.config.loss, c.x.device, sweep.WHOLE)
    elif not isinstance(c.y, torch.Tensor) or c.y.shape[:1] != (n,):
        came = tuple(c.y.shape) if isinstance(c.y, torch.Tensor) else type(c.y).__name__
        raise ValueError(f"[linear_step] targets must be a tensor of {n} rows, got {came}")
    if c.g0 is not None and (tuple(c.g0.shape) != (n, k) or c.g0.device != c.x.device):
        raise ValueError(f"[linear_step] g0 must be ({n}, {k}) on {c.x.device}, got "
                         f"{tuple(c.g0.shape)} on {c.g0.device}")


def _check_parameter(c: LinearStepRequest, role: str, p: Parameter) -> None:
    weight, wide = c.weight.value, step_dtype(c.weight.value.dtype)
    size = tuple(weight.shape) if role == "weight" else (weight.shape[0],)
    if p.accumulate is not None:
        raise ValueError(f"[linear_step] expected no gradient accumulated of the {role}, got one")
    if not c.finish and p.grad_out is None:
        raise ValueError(f"[linear_step] finish=False expected a tensor for the gradient of the "
                         f"{role}, got None")
    for name, t, dtype in ((role, p.value, weight.dtype if role == "weight" else wide),
                           (f"the gradient of the {role}", p.grad_out, wide)):
        if t is not None and (tuple(t.shape) != size or t.dtype != dtype
                              or t.device != weight.device or not t.is_contiguous()):
            raise ValueError(f"[linear_step] {name} must be contiguous {size} {dtype} on "
                             f"{weight.device}, got {tuple(t.shape)} {t.dtype} on {t.device}")
    if c.finish and p.state is None:
        raise ValueError(f"[linear_step] finish=True expected a state for the {role}, got None")
    if c.finish and p.state is not None:
        check_state("linear_step", role, p.value, p.state, c.optim)
