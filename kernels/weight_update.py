"""The optimizer step of `weight_update`: SGD, Adam and AdamW in one sweep over the weights.

Weights and states in fp32, or stored in fewer bits (kernels/states.py) and stepped in fp32.

reference: ffengine/reference/weight_update.py   op: ffengine/ops/weight_update.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from ffengine.kernels import philox, states
from ffengine.kernels.forms import Form, on_device_of
from ffengine.kernels.launch import grid

if TYPE_CHECKING:
    from ffengine.ops.optim import OptimCall
    from ffengine.ops.params import StepCall

Tensors = tuple[torch.Tensor | None, ...]
#: Elements a program owns: 128 threads with two 16-byte loads of an fp32 tensor each.
BLOCK = 1024
#: By the codes of csrc/params.h.
KINDS = ("sgd", "adam", "adamw")
#: What m and v are stored in, by format.
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
FORMATS = tuple(STATE_DTYPES)


class Scalars(NamedTuple):
    """A step's numbers, all floats: Triton compiles nothing anew when their values change."""

    inv_scale: float  # 1 / da_scale
    decay: float  # weight decay (sgd, adam); lr * weight decay (adamw)
    beta1: float  # momentum for sgd
    one_minus_beta1: float  # 1 for sgd: its buffer is an undamped sum
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr, divided by the first moment's bias correction for Adam
    root_correction: float  # sqrt of the second moment's bias correction
    eps: float


class Variant(NamedTuple):
    """Compile-time choices."""

    kind: str
    momentum: bool
    nesterov: bool
    states: str  # of STATE_DTYPES
    bf16_weight: bool
    bf16_half: bool
    block: int


@triton.jit
def load_state(p, p_scale, i, b, numel, signed: tl.constexpr, v: tl.constexpr):
    if v.states == "fp32":
        x = tl.load(p + i, mask=b, other=0.0)
    elif v.states == "bf16":
        x = states.load_bf16(p, i, b)
    else:
        x = states.load_codes(p, p_scale, i, b, numel, signed, v.block)
    return x


@triton.jit
def store_state(p, p_scale, i, b, x, random, numel, signed: tl.constexpr, v: tl.constexpr):
    if v.states == "fp32":
        tl.store(p + i, x, mask=b)
    elif v.states == "bf16":
        states.store_bf16(p, i, b, x, random)
    else:
        states.store_codes(p, p_scale, i, b, x, random, numel, signed, v.block)


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "stream", "step"])
def optimizer_kernel(p_weight, p_grad, p_m, p_v, p_m_scale, p_v_scale, p_row, p_half, numel,
                     seed_lo, seed_hi, stream, step, s, v: tl.constexpr):
    """One optimizer step in place, g = grad / da_scale; all tensors (numel,), scales one a block.

    p_row: decay, step size, root correction and, in column 7, the bits of `step`, read from memory;
    p_half: a 16-bit copy of the new weight.

    sgd:   g += decay w;  m = momentum m + g;  w -= lr (g + momentum m if nesterov else m)
    adam:  g += decay w;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;
           w -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    adamw: w -= lr decay w first, no decay in g; then as adam
    """
    i = tl.program_id(0).to(tl.int64) * v.block + tl.arange(0, v.block)
    b = i < numel
    if v.bf16_weight:
        w = states.load_bf16(p_weight, i, b)
    else:
        w = tl.load(p_weight + i, mask=b, other=0.0)
    g = tl.load(p_grad + i, mask=b, other=0.0).to(tl.float32) * s.inv_scale
    decay = s.decay
    step_size = s.step_size
    root_correction = s.root_correction
    if p_row is not None:
        decay = tl.load(p_row)
        step_size = tl.load(p_row + 1)
        root_correction = tl.load(p_row + 2)
        step = tl.load(p_row + 7).to(tl.int32, bitcast=True)
    word = 0
    if v.states != "fp32":
        word = states.random_words((seed_lo, seed_hi, stream, step), v.block)
    if v.kind == "adamw":
        w -= decay * w
    else:
        g += decay * w
    if v.kind == "sgd":
        if v.momentum:
            m = s.beta1 * load_state(p_m, p_m_scale, i, b, numel, True, v) + g
            store_state(p_m, p_m_scale, i, b, m, word & 0xFFFF, numel, True, v)
            g = g + s.beta1 * m if v.nesterov else m
        w -= step_size * g
    else:
        m = load_state(p_m, p_m_scale, i, b, numel, True, v)
        square = load_state(p_v, p_v_scale, i, b, numel, False, v)
        m += s.one_minus_beta1 * (g - m)
        square = s.beta2 * square + s.one_minus_beta2 * g * g
        store_state(p_m, p_m_scale, i, b, m, word & 0xFFFF, numel, True, v)
        store_state(p_v, p_v_scale, i, b, square, word >> 16, numel, False, v)
        w -= step_size * m / (tl.sqrt(square) / root_correction + s.eps)
    if v.bf16_weight:
        key = (seed_lo, seed_hi, stream ^ states.WEIGHT_STREAM, step)
        states.store_bf16(p_weight, i, b, w, states.random_words(key, v.block) & 0xFFFF)
    else:
        tl.store(p_weight + i, w, mask=b)
    if p_half is not None:
        if v.bf16_half:  # to nearest, ties to even, in the interpreter too
            states.store_bf16(p_half, i, b, w, 0x7FFF + (w.to(tl.uint32, bitcast=True) >> 16 & 1))
        else:
            tl.store(p_half + i, w, mask=b)


def scalars(optim: OptimCall, inv_scale: float) -> Scalars:
    """Bias corrections and products on the host, in double. Pure: unit-tested without a GPU."""
    kind = KINDS[optim.kind]
    if kind == "sgd":
        return Scalars(float(inv_scale), float(optim.weight_decay), float(optim.momentum), 1.0,
                       0.0, 0.0, float(optim.lr), 1.0, 0.0)
    beta1, beta2, step = optim.beta1, optim.beta2, optim.step
    decay = optim.weight_decay * (optim.lr if kind == "adamw" else 1.0)
    return Scalars(float(inv_scale), float(decay), float(beta1), 1.0 - beta1, float(beta2),
                   1.0 - beta2, optim.lr / (1.0 - beta1**step),
                   math.sqrt(1.0 - beta2**step), float(optim.eps))


class Bound(NamedTuple):
    """What calls on tensors of one form share."""

    form: Form
    grid: tuple[int]
    numel: int
    copies: bool  # the gradient's memory order is not the weight's


#: By everything that a call's checks and its machine code depend on.
_BOUND: dict[Any, Bound] = {}


def optimizer_step(tensors: Tensors, call: StepCall) -> None:
    """Step a weight (fp32 or bf16) and its states in place with grad * inv_scale.

    m: first moment or SGD's momentum buffer, zeros before step 1; v: second moment. grad: fp32,
    bf16 or fp16; copied first where its memory order is not weight's. Semantics of torch.optim,
    step 1 the first. Rounding is stochastic, by Philox of seed, stream and step. row: on the
    device, [decay, step size, root correction] as `scalars` forms them and in column 7 the step as
    int32 bits, in place of what lr, weight_decay and step say, so that a captured launch follows
    them. half: bf16 or fp16 like weight, gets a copy of the new weight.
    """
    grad, weight, m, v, m_scale, v_scale, half, row = tensors
    optim, step = call.optim, call.optim.step
    key = (optim.kind, optim.momentum != 0.0, optim.nesterov, call.format,
           *[None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors])
    bound = _BOUND.get(key)
    if bound is None:
        bound = _BOUND[key] = _bind(tensors, call)
    if step < 1:
        raise ValueError(f"[weight_update] step counts from 1, got {step}")
    if bound.numel == 0:
        return
    if bound.copies:
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    numbers = scalars(optim, call.inv_scale)
    if row is not None:  # no argument changes from step to step
        numbers, step = numbers._replace(decay=0.0, step_size=0.0, root_correction=1.0), 0
    words = (0, 0, 0, 0) if call.format == 0 and weight.dtype is torch.float32 else (
        philox.int32_patterns(call.seed, call.seed >> 32, call.stream, step))
    with on_device_of(weight):
        bound.form.launch(
            bound.grid, (_pattern(weight), grad, _pattern(m), _pattern(v), m_scale, v_scale, row,
                         _pattern(half)), (bound.numel, *words, numbers))


def _pattern(t: torch.Tensor | None) -> torch.Tensor | None:
    """bf16 travels as int16 patterns."""
    return t.view(torch.int16) if t is not None and t.dtype is torch.bfloat16 else t


def _bind(tensors: Tensors, call: StepCall) -> Bound:
    """Check a call's tensors, once for all of their form."""
    grad, weight, *held, half, row = tensors
    kind = KINDS[call.optim.kind]
    variant = Variant(kind, kind == "sgd" and call.optim.momentum != 0.0,
                      kind == "sgd" and call.optim.nesterov, FORMATS[call.format],
                      weight.dtype is torch.bfloat16,
                      half is not None and half.dtype is torch.bfloat16, BLOCK)
    _check(weight, grad, held, variant)
    _check_row_and_half(weight, row, half)
    numel = weight.numel()
    return Bound(Form(optimizer_kernel, v=variant, warps=4),
                 grid("weight_update", -(-numel // BLOCK)), numel, not _same_order(grad, weight))


def _same_order(t: torch.Tensor, weight: torch.Tensor) -> bool:
    """Both contiguous or both channels_last: one flat index serves both."""
    return any(t.is_contiguous(memory_format=f) and weight.is_contiguous(memory_format=f)
               for f in (torch.contiguous_format, torch.channels_last)
               if f is torch.contiguous_format or weight.dim() == 4)


def _check(weight: torch.Tensor, grad: torch.Tensor, held: list[torch.Tensor | None],
           variant: Variant) -> None:
    _expect("grad", grad, weight, grad.dtype)
    if not variant.bf16_weight:
        _expect("weight", weight, weight, torch.float32)
    adam = variant.kind != "sgd"
    for i, name in enumerate(("m", "v")[:2 if adam else int(variant.momentum)]):
        state, scale = held[i], held[i + 2]
        if state is None:
            raise ValueError(f"[weight_update] {variant.kind} needs the state {name}, got None")
        _expect(name, state, weight, STATE_DTYPES[variant.states])
        if not _same_order(state, weight):
            raise ValueError("[weight_update] weight and states must all be contiguous or all "
                             f"channels_last, got strides {state.stride()} of {name}")
        count = triton.cdiv(weight.numel(), states.SCALED.value)
        if variant.states == "8bit" and (scale is None or scale.shape != (count,)
                                         or scale.dtype is not torch.float32):
            raise ValueError(f"[weight_update] {name}_scale must be float32 ({count},), got "
                             f"{None if scale is None else (scale.dtype, tuple(scale.shape))}")


def _check_row_and_half(weight: torch.Tensor, row: torch.Tensor | None,
                        half: torch.Tensor | None) -> None:
    if row is not None and (row.dtype is not torch.float32 or tuple(row.shape) != (8,)
                            or not row.is_contiguous()):
        raise ValueError(f"[weight_update] row must be contiguous float32 (8,), got "
                         f"{row.dtype} {tuple(row.shape)} with strides {row.stride()}")
    if half is None:
        return
    if weight.dtype is not torch.float32 or half.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError("[weight_update] half must be bfloat16 or float16 beside a float32 weight, "
                        f"got {half.dtype} beside {weight.dtype}")
    _expect("half", half, weight, half.dtype)
    if not _same_order(half, weight):
        raise ValueError("[weight_update] half must lie in memory as the weight does, got strides "
                         f"{half.stride()} beside {weight.stride()}")


def _expect(name: str, t: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
    if t.dtype is not dtype:
        raise TypeError(f"[weight_update] {name} must be {str(dtype).removeprefix('torch.')}, "
                        f"got {t.dtype}")
    if t.shape != weight.shape:
        raise ValueError(f"[weight_update] {name} must have the weight's shape "
                         f"{tuple(weight.shape)}, got {tuple(t.shape)}")
