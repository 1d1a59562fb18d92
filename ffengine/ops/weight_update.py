"""`weight_update`: the weight gradient and the optimizer as one act.

dW[o, c, i, j] = sum over samples n and pixels p, q of da[n, o, p, q] x[n, c, p s + i - pad,
q s + j - pad], straight into Adam, AdamW or SGD; a linear layer is the 1x1 case.

reference: ffengine/reference/weight_update.py   cpu: csrc/cpu/weight_update.cpp, gemm*
triton: kernels/weight_update.py                 cuda: csrc/cuda/weight_update.cu
(on GPUs the library forms the gradient and one fused kernel steps the optimizer)
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ffengine.ops import backends, product_rule
from ffengine.ops.launch import compiled, launch, recorded, scratch
from ffengine.ops.memory_accounting import allocating, is_fake
from ffengine.ops.optim import (
    DTYPE_CODES,
    LINEAR,
    ConvGeometry,
    OptimConfig,
    OptimState,
    Parameter,
    compressed,
    optim_call,
    state_bytes,
)
from ffengine.ops.optimizer_step import (
    as_laid_out,
    check_state,
    finish_gradient,
    is_channels_last,
    is_compressed,
    optimizer_step,
    same_layout,
    step_dtype,
    stepped,
)
from ffengine.ops.params import WeightUpdateCall, WeightUpdateRequest
from ffengine.ops.tracing import unrecorded
from ffengine.reference import weight_update as reference
from ffengine.reference.state_formats import SCRATCH_BYTES

__all__ = ["ConvGeometry", "OptimConfig", "OptimState", "Parameter", "bytes_moved", "choose",
           "extra_bytes", "gradient_update", "optimizer_step", "weight_update"]


#: Where the library's fp32 convolution gradient beats ours: input channels below `limit`. ms of one
#: thread, kernel 3, batch 32 and 4, ours | library; bench/weight_update.py measures it anew.
LIBRARY_BELOW_CHANNELS = 8
#   C    O  input  stride  float32, 1 thread(s), ms of batch 32, 4: ours | library
#   3  100   32²     1     10.70 |    3.09      1.05 |    0.42
# 100  100   32²     1     46.59 |   46.93      6.15 |    6.29
# 100  200   32²     2     26.86 |   27.01      3.69 |    4.04
# 200  200   16²     1     44.39 |   41.39      5.26 |    6.41
# 200  400   16²     2     26.89 |   28.49      3.32 |    5.45
# 400  400    8²     1     42.52 |   42.84      5.59 |    8.78
# 400  800    8²     2     25.68 |   43.06      4.80 |   12.54
# 800  800    4²     1     43.00 |   81.81      9.05 |   33.52
#: Elements of da that the bias gradient casts at a time.
BIAS_CHUNK = 1 << 18
#: Elements of x and da that the library's gradient casts at a time on a CPU.
WIDENED_CHUNK = 1 << 20


def choose(shape: tuple[int, ...], dtype: torch.dtype) -> Literal["library", "im2col"]:
    """Who forms the gradient on a CPU, of (N, C, H, W, O, P, Q, kH, kW, stride, padding).

    The library rounds a 16-bit gradient to 16 bits, and unfolds x below AVX2: neither is its.
    """
    n, c, _, _, _, p, q, *_ = shape
    small = n > 0 and c < LIBRARY_BELOW_CHANNELS and p * q > 1 and dtype is torch.float32
    return "library" if small and compiled().isa() != "baseline" else "im2col"


def bytes_moved(x_shape: tuple[int, ...], da_shape: tuple[int, ...],
                weight_shape: tuple[int, ...], dtype: torch.dtype, *, optim: OptimConfig,
                accumulate: bool = False, finish: bool = True,
                weight_dtype: torch.dtype | None = None) -> int:
    """Bytes a call must move: x and da read once; buffer, weight and states read and written.

    A step on rounded weights or states reads a gradient that was written. weight_dtype: default is
    fp32 below fp64.
    """
    n_w, kept = math.prod(weight_shape), weight_dtype or step_dtype(dtype)
    buffer = accumulate or (finish and compressed(n_w, kept, optim))
    stored = n_w * kept.itemsize + state_bytes(n_w, kept, optim) if finish else 0
    return dtype.itemsize * (math.prod(x_shape) + math.prod(da_shape)) + 2 * (
        stored + step_dtype(dtype).itemsize * n_w * buffer)


def extra_bytes(x_shape: tuple[int, ...], da_shape: tuple[int, ...],
                weight_shape: tuple[int, ...], dtype: torch.dtype, *,
                geometry: ConvGeometry | None = None, accumulate: bool = False,
                bias: bool = False, compressed: bool = False, backend: str = "cpu",
                weight_dtype: torch.dtype | None = None) -> int:
    """Most bytes a call holds beside its arguments: packing buffers, gradients, casts.

    For dense x and da of one layout; `accumulate`: a buffer is given; `compressed`: the step rounds
    weight or states (ffengine.ops.optim.compressed). On the CPU it depends on the number of threads
    and the instruction set in use, as the packing does.
    """
    shape = conv_shape(weight_shape, x_shape, geometry or LINEAR)
    wide, item = (8 if dtype is torch.float64 else 4), dtype.itemsize
    kept = weight_dtype or step_dtype(dtype)
    n_w, n_x, n_da = math.prod(weight_shape), math.prod(x_shape), math.prod(da_shape)
    bias_bytes = 4 * wide * da_shape[1] * bias
    if backend in ("triton", "cuda"):
        # dW in the compute dtype; fp16's is formed from fp32 forms of x and da
        return wide * (n_w + n_x + n_da) + bias_bytes if dtype is torch.float16 else (
            item * n_w + bias_bytes)
    bias_bytes += wide * min(n_da, BIAS_CHUNK) * bias
    if backend == "cpu" and shape[1] == weight_shape[1] and choose(shape, dtype) == "im2col":
        buffer = wide * n_w * (compressed and not accumulate)
        given = [*[True] * 5, accumulate or compressed, False]
        inside = scratch("weight_update", given, shape, dtype, WeightUpdateCall())
        return max(buffer + inside, bias_bytes)
    casts = wide * (n_x + n_da) if item < 4 else 0
    casts += wide * n_w * (kept.itemsize < wide)  # the gradient's operator wants an fp32 weight
    if backend == "cpu":
        return wide * 2 * n_w + wide * n_w * (kept.itemsize < wide) + bias_bytes
    casts += SCRATCH_BYTES * compressed
    # the library's fp64 convolution unfolds x and reorders both; Adam holds two temporaries
    unfolded = wide * (n_x + n_da + n_w + shape[0] * shape[1] * math.prod(shape[5:9]))
    return wide * 4 * n_w + casts + (unfolded if geometry else 0) + wide * n_da * bias


def weight_update(weight: Parameter, x: torch.Tensor, da: torch.Tensor, *, optim: OptimConfig,
                  geometry: ConvGeometry | None = None, bias: Parameter | None = None,
                  finish: bool = True, da_scale: float = 1.0, backend: str = "auto") -> None:
    """Add the gradient of these samples to the sum so far and, with `finish`, step the optimizer.

    Args:
        weight: its value (O, C, kH, kW) or (O, in), fp32, or bf16 where x is bf16 (fp64: reference
            only), contiguous or channels_last. Its state's step rises by one with `finish`, and
            may be None without. What is accumulated is complete with `finish`.
        x: layer input (N, C, H, W) or (N, in), fp32 | bf16 | fp16, contiguous or channels_last;
            other strides are copied first.
        da: gradient at the pre-activation (N, O, P, Q) or (N, O), dtype of x, times da_scale.
        geometry: None for a linear layer.
        bias: the same for the layer's bias, its value (O,) fp32 (fp64).
        da_scale: power of two that da was multiplied by (fp16).

    Raises:
        TypeError, ValueError: one line with what was expected and what came.
    """
    _check(weight, bias, x, da, optim, geometry, finish)
    name = backends.resolve("weight_update", backend, x.device.type, x.dtype)
    with unrecorded():
        _update(name, WeightUpdateRequest(weight, x, da, optim, geometry, bias, finish, da_scale))
    if finish:
        for p in (weight, bias):
            if p is not None and p.state is not None:
                p.state.step += 1


@recorded("weight_update")
def _update(backend: str, c: WeightUpdateRequest) -> None:
    """A checked call; the states' counts are the caller's to raise."""
    _update_weight(c.weight, _dense(c.x), _dense(c.da), c.optim, c.geometry or LINEAR, c.finish,
                   c.da_scale, backend)
    if c.bias is not None:
        grad = bias_gradient(c.da, c.bias.value.dtype)
        finish_gradient(c.bias, grad, c.optim, c.finish, c.da_scale, backend)


def _library_gradient(x: torch.Tensor, da: torch.Tensor, weight: torch.Tensor,
                      geometry: ConvGeometry, backend: str) -> torch.Tensor:
    """dW in weight's dtype; what has to be cast to it for that, some samples at a time."""
    n = x.shape[0]
    if is_fake(x) and x.device.type == "cuda" and x.dtype is weight.dtype:
        return torch.empty_like(weight)  # as cuDNN lays it out; a fake operator forgets that
    numbers = geometry.stride, geometry.padding, geometry.groups
    if backend != "cpu" or x.dtype is weight.dtype or n == 0:
        return reference.weight_gradient(x, da, weight, *numbers)
    step = max(1, WIDENED_CHUNK * n // (x.numel() + da.numel()))
    parts = (reference.weight_gradient(xs, das, weight, *numbers) for xs, das in zip(
        torch.split(x, step), torch.split(da, step), strict=True))
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total


def shaped_like(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the weight's shape and layout, and of a dtype: all that a gradient's operator
    asks of it. In fewer bits the weight's own memory serves; its numbers are nobody's."""
    if weight.dtype is dtype:
        return weight
    if dtype.itemsize > weight.element_size():
        return torch.empty_like(weight, dtype=dtype)
    flat = weight.as_strided((weight.numel(),), (1,)).view(dtype)
    return flat.as_strided(weight.shape, weight.stride())


def _update_weight(p: Parameter, x: torch.Tensor, da: torch.Tensor, optim: OptimConfig,
                   geometry: ConvGeometry, finish: bool, da_scale: float, backend: str) -> None:
    shape = conv_shape(tuple(p.value.shape), tuple(x.shape), geometry)
    if backend == "cpu" and geometry.groups == 1 and (
            choose(shape, x.dtype) == "im2col" or is_channels_last(x) != is_channels_last(da)):
        if finish and p.state is not None and is_compressed(p.value, p.state):
            _update_in_two(p, x, da, shape, optim, da_scale)
        else:
            _run_cpu(p, x, da, shape, optim, finish, da_scale, p.accumulate is not None)
        return
    # The library's gradient on a GPU, in the compute dtype. In fp16 it would add up N·P products of
    # a da that is already scaled to order one, past the dtype's range at large batches.
    upcast = backend in ("reference", "cpu") or x.dtype is torch.float16
    dtype, half = step_dtype(x.dtype) if upcast else x.dtype, p.state and p.state.half
    weight = half.copy if half and half.copy.dtype is dtype else shaped_like(p.value, dtype)
    with product_rule.exact(x.device.type):
        grad = _library_gradient(x, da, weight, geometry, backend)
    finish_gradient(p, as_laid_out(grad, p.value), optim, finish, da_scale, backend)


def _update_in_two(p: Parameter, x: torch.Tensor, da: torch.Tensor, shape: tuple[int, ...],
                   optim: OptimConfig, da_scale: float) -> None:
    """The gradient into a buffer, the caller's or a new one, and then the sweep that rounds."""
    with allocating("gradient"):
        buffer = p.accumulate if p.accumulate is not None else torch.empty_like(
            p.value, dtype=torch.float32)
    into = p._replace(accumulate=buffer, state=None, grad_out=None)
    _run_cpu(into, x, da, shape, optim, False, da_scale, p.accumulate is not None)
    finish_gradient(p._replace(accumulate=None), buffer, optim, True, 1.0, "cpu")


def _run_cpu(p: Parameter, x: torch.Tensor, da: torch.Tensor, shape: tuple[int, ...],
             optim: OptimConfig, finish: bool, da_scale: float, add: bool) -> None:
    """add: the buffer holds earlier tiles' sum; else it is written."""
    state = p.state if finish else None
    call = WeightUpdateCall(
        is_channels_last(x), is_channels_last(da), not p.value.is_contiguous(),
        accumulate=add, finish=finish, inv_scale=1.0 / da_scale,
        optim=optim_call(optim, state.step + 1) if state else None)
    m, v = (state.m, state.v) if state else (None, None)
    launch("weight_update", "cpu", (x, da, p.value, m, v, p.accumulate, p.grad_out), shape, call)
    if state is not None:
        stepped(p.value, state, "cpu")


def conv_shape(weight: tuple[int, ...], x: tuple[int, ...],
               geometry: ConvGeometry) -> tuple[int, ...]:
    """(N, C, H, W, O, P, Q, kH, kW, stride, padding), as the kernels take it."""
    n, c, h, w = (*x, 1, 1)[:4]
    return (n, c, h, w, weight[0], *geometry.output_size(h, w), *geometry.kernel,
            geometry.stride, geometry.padding)


def gradient_update(p: Parameter, grad: torch.Tensor, *, optim: OptimConfig, scale: float = 1.0,
                    backend: str = "auto") -> None:
    """Step the optimizer with a gradient that exists: affine maps, embeddings, folded weights.

    Args:
        p: its value fp32 or bf16 (fp64: reference only), dense; its state's step rises by one.
        grad: of the value's shape, times `scale`.
    """
    name = backends.resolve("weight_update", backend, p.value.device.type, p.value.dtype)
    with unrecorded():
        finish_gradient(p, as_laid_out(grad, p.value), optim, True, scale, name)
    if p.state is not None:
        p.state.step += 1


def bias_gradient(da: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of da over samples and pixels in `dtype`, without a cast copy of all of da."""
    if da.device.type != "cpu" or da.dtype is dtype or da.numel() <= BIAS_CHUNK:
        return reference.bias_gradient(da, dtype)
    total = torch.zeros(da.shape[1], dtype=dtype)
    rows = max(1, BIAS_CHUNK * da.shape[0] // da.numel())
    for start in range(0, da.shape[0], rows):
        total += reference.bias_gradient(da[start:start + rows], dtype)
    return total


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.is_contiguous() or is_channels_last(t) else t.contiguous()


def _check(main: Parameter, bias: Parameter | None, x: torch.Tensor, da: torch.Tensor,
           optim: OptimConfig, geometry: ConvGeometry | None, finish: bool) -> None:
    weight = main.value
    if x.dtype not in (*DTYPE_CODES, torch.float64) or da.dtype != x.dtype:
        raise TypeError("[weight_update] x and da must share a dtype of float32, bfloat16, "
                        f"float16 or float64, got {x.dtype} and {da.dtype}")
    check_weight_dtype("weight_update", weight, x.dtype)
    _check_shapes(weight, x, da, geometry)
    for role, p in (("weight", main), ("bias", bias)):
        if p is not None:
            _check_parameter(role, p, optim, finish, weight)
    if bias is not None and tuple(bias.value.shape) != (weight.shape[0],):
        raise ValueError(f"[weight_update] bias must be ({weight.shape[0]},), "
                         f"got {tuple(bias.value.shape)}")
    if not x.device == da.device == weight.device:
        raise ValueError("[weight_update] weight, x and da must share a device, got "
                         f"{weight.device}, {x.device} and {da.device}")


def _check_shapes(weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor,
                  geometry: ConvGeometry | None) -> None:
    dims = 2 if geometry is None else 4
    if not weight.dim() == x.dim() == da.dim() == dims:
        kind = "a linear layer" if geometry is None else "a convolution"
        raise ValueError(f"[weight_update] weight, x and da of {kind} must have {dims} dimensions, "
                         f"got {weight.dim()}, {x.dim()} and {da.dim()}")
    if geometry is not None and tuple(weight.shape[2:]) != tuple(geometry.kernel):
        raise ValueError(f"[weight_update] weight must have the geometry's kernel "
                         f"{tuple(geometry.kernel)}, got shape {tuple(weight.shape)}")
    channels = weight.shape[1] * (1 if geometry is None else geometry.groups)
    if x.shape[1] != channels:
        raise ValueError(f"[weight_update] x must have {channels} channels as the weight, "
                         f"got shape {tuple(x.shape)}")
    out = () if geometry is None else geometry.output_size(x.shape[2], x.shape[3])
    if min(out, default=1) < 1:
        raise ValueError(f"[weight_update] x is smaller than the kernel: {tuple(x.shape)} with "
                         f"{geometry}")
    expected = (x.shape[0], weight.shape[0], *out)
    if tuple(da.shape) != expected:
        raise ValueError(f"[weight_update] da must be {expected}, got {tuple(da.shape)}")


def _check_parameter(role: str, p: Parameter, optim: OptimConfig, finish: bool,
                     weight: torch.Tensor) -> None:
    if finish and p.state is None:
        raise ValueError(f"[weight_update] finish=True expected a state for the {role}, got None")
    wide = step_dtype(weight.dtype)
    kind = weight.dtype if role == "weight" else wide
    if not (p.value.is_contiguous() or is_channels_last(p.value)) or p.value.dtype != kind:
        raise ValueError(f"[weight_update] {role} must be dense {kind}, got strides "
                         f"{p.value.stride()} {p.value.dtype}")
    if finish and p.state is not None:
        check_state("weight_update", role, p.value, p.state, optim)
    for name, t in (("accumulate", p.accumulate), ("grad_out", p.grad_out)):
        if t is not None and (t.shape != p.value.shape or t.dtype != wide
                              or t.device != p.value.device or not same_layout(t, p.value)):
            raise ValueError(
                f"[weight_update] {name} of the {role} must be {tuple(p.value.shape)} "
                f"{wide} with the {role}'s strides {p.value.stride()}, got "
                f"{tuple(t.shape)} {t.dtype} with {t.stride()}")


def check_weight_dtype(op: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """TypeError unless a weight of this dtype trains on inputs of `dtype`."""
    wide = step_dtype(dtype)
    also = dtype is torch.bfloat16
    if weight.dtype is not wide and not (also and weight.dtype is torch.bfloat16):
        raise TypeError(f"[{op}] weight must be {wide}{' or torch.bfloat16' * also} for {dtype} "
                        f"inputs, got {weight.dtype}")
