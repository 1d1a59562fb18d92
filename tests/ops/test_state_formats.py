"""Optimizer states and weights in fewer bits: codes, rounding, the fused step, memory, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ffengine.engine.memory.meter import MemoryMeter
from ffengine.ops import backends
from ffengine.ops import weight_update as op
from ffengine.ops.config import LocalPassConfig
from ffengine.ops.launch import pack
from ffengine.ops.linear_step import bytes_moved as step_bytes_moved
from ffengine.ops.linear_step import linear_step
from ffengine.ops.optim import (
    STATE_CODES,
    OptimConfig,
    OptimState,
    Parameter,
    state_bytes,
    stream_of,
)
from ffengine.ops.optimizer_step import optimizer_step
from ffengine.ops.weight_update import (
    ConvGeometry,
    bytes_moved,
    extra_bytes,
    gradient_update,
    weight_update,
)
from ffengine.reference import state_formats as formats
from tests.compressed_step_cases import CASES, check

BUILT = backends.extension() is not None
CPU = ["reference", *["cpu"] * BUILT]
PRECISIONS = ["fp32", "bf16", "8bit"]
#: On gradients of 8 bits every operation of these is exact or rounded once, with or without fused
#: multiply-adds, so back-ends agree bit for bit.
SGD = OptimConfig("sgd", lr=2**-7, momentum=0.5)
NESTEROV = replace(SGD, nesterov=True, weight_decay=0.0)
ADAM = OptimConfig("adam", lr=2**-7, betas=(0.75, 0.5))
SGD0 = OptimConfig("sgd", lr=2**-7)
SHORT = (17, 251)  # 4267 elements: 16 blocks of 256 and one of 171


def drawn(shape: tuple[int, ...], seed: int = 0, *, channels_last: bool = False) -> torch.Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def stepped(optim: OptimConfig, backend: str, steps: int, dtype: torch.dtype = torch.float32,
            shape: tuple[int, ...] = SHORT, *, channels_last: bool = False,
            ) -> tuple[torch.Tensor, OptimState]:
    weight = drawn(shape, channels_last=channels_last).to(dtype)
    state = OptimState.create(weight, optim, seed=2**63 + 11, name="layers.3.weight")
    for i in range(steps):
        gradient_update(Parameter(weight, state),
                        drawn_gradient(shape, i, channels_last=channels_last), optim=optim,
                        backend=backend, scale=2.0)
    return weight, state


def drawn_gradient(shape: tuple[int, ...], i: int, *, channels_last: bool = False) -> torch.Tensor:
    grad = drawn(shape, 100 + i, channels_last=channels_last) * 8.0**(i % 5 - 3)
    return grad.bfloat16().float()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(formats.flat(a).view(torch.uint8), formats.flat(b).view(torch.uint8))


def decoded(state: OptimState) -> list[torch.Tensor]:
    parts = [(state.m, state.m_scale, formats.SIGNED), (state.v, state.v_scale, formats.UNSIGNED)]
    return [formats.decode(formats.flat(t), s, *codes) for t, s, codes in parts
            if t is not None and s is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optim", [SGD0, SGD, NESTEROV, ADAM],
                         ids=["sgd", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_are_the_references(precision: Any, optim: OptimConfig, dtype: torch.dtype,
                                  isa: str) -> None:
    optim = replace(optim, state_precision=precision)
    (weight, state), (expected, wanted) = (
        stepped(optim, b, 7, dtype) for b in ("cpu", "reference"))
    for name, t in wanted.tensors().items():
        assert same_bits(state.tensors()[name], t), name
    if optim.kind == "sgd":
        assert same_bits(weight, expected)


@pytest.mark.parametrize("threads", [1, 3] * BUILT)
def test_threads_do_not_count(threads: int) -> None:
    backends.extension().set_num_threads(threads)  # type: ignore[union-attr]
    optim = replace(SGD, state_precision="8bit")
    results = [stepped(optim, b, 2, torch.bfloat16, (300, 300)) for b in ("cpu", "reference")]
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1].m, results[1][1].m)  # type: ignore[arg-type]


def check_steps(name: str, backend: str) -> None:
    check(name, CASES[name], lambda weight, grad, state, optim, inv_scale: optimizer_step(
        weight, grad, state, optim, inv_scale, backend))


@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_on_general_numbers(name: str) -> None:
    check_steps(name, "reference")


@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_on_every_instruction_set(name: str, isa: str) -> None:
    check_steps(name, "cpu")


@pytest.mark.parametrize("form", ["bf16", "m", "v"])
def test_rounding_is_unbiased_and_bounded(form: str) -> None:
    draws, n = 1500, 512
    x = torch.exp2(-12 * torch.rand(n, generator=torch.Generator().manual_seed(1)))
    x = x if form == "v" else x * drawn((n,), 2).sign()
    total, square, worst = torch.zeros(n, dtype=torch.float64), torch.zeros(n), torch.zeros(n)
    for step in range(draws):
        random = formats.words(slice(0, n), 5, stream_of("w"), step, x.device)
        if form == "bf16":
            got = formats.encode_bf16(x, random & 0xFFFF).float()
        else:
            codes = formats.SIGNED if form == "m" else formats.UNSIGNED
            stored, scale = formats.encode(x, random >> 16, *codes)
            got = formats.decode(stored, scale, *codes)
        error = got - x
        total += error.double()
        square += error * error
        worst = torch.maximum(worst, error.abs())
    step_size = x.abs() * (2**-7 if form == "bf16" else 2**-3)
    assert (worst <= step_size).all()
    assert (worst > 0).sum() > n / 2  # it does round
    sigma = (square / draws).sqrt() / draws**0.5
    # 16 random bits resolve a step to 2^-16 of it
    assert (total.abs() / draws <= 4 * sigma + 2**-16 * step_size).all()


def test_kernels_have_the_formats_codes() -> None:
    ext = backends.extension()
    assert ext is None or ext.codes()["state"] == STATE_CODES


def test_zero_second_moments_are_zeros_alone() -> None:
    x = torch.tensor([0.0, 1e-30, 2**-33, 2**-20, 1.0]).repeat(30)
    for step in range(20):
        random = formats.words(slice(0, x.numel()), 0, 0, step, x.device)
        codes, scale = formats.encode(x, random >> 16, *formats.UNSIGNED)
        assert torch.equal(codes == 0, x == 0)
        assert (formats.decode(codes, scale, *formats.UNSIGNED) > 0).equal(x > 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["bf16", "8bit"])
@pytest.mark.parametrize("backend", CPU)
def test_what_is_not_finite_stays_so(backend: str, precision: Any, bad: float) -> None:
    optim = replace(ADAM, state_precision=precision)
    weight, grad = drawn(SHORT), drawn(SHORT, 1)
    state = OptimState.create(weight, optim)
    grad.view(-1)[4200] = bad  # in the short block
    gradient_update(Parameter(weight, state), grad, optim=optim, backend=backend)
    assert not weight.view(-1)[4200].isfinite() or bad == float("inf")
    if precision == "bf16":
        assert not state.m.view(-1)[4200].isfinite()  # type: ignore[union-attr]
    else:
        for values in decoded(state):
            assert not values[4096:].isfinite().any() and values[:4096].isfinite().all()
    gradient_update(Parameter(weight, state), drawn(SHORT, 2), optim=optim, backend=backend)
    assert not weight.view(-1)[4200].isfinite()  # the next step shows it to the guard
    codes = [t for t in (state.m, state.v) if t is not None and t.dtype is torch.uint8]
    assert all((t.view(-1)[4096:] == 0).all() for t in codes)


@pytest.mark.parametrize("backend", CPU)
def test_blocks_follow_memory(backend: str) -> None:
    """A channels_last weight is stepped as its elements lie."""
    optim = replace(SGD, state_precision="8bit")
    weight, state = stepped(optim, backend, 3, torch.bfloat16, (24, 20, 3, 3), channels_last=True)
    assert state.m is not None and state.m.stride() == weight.stride()
    rows = OptimState.create(formats.flat(weight), optim, seed=state.seed, name="layers.3.weight")
    line = formats.flat(drawn((24, 20, 3, 3), channels_last=True)).to(torch.bfloat16)
    for i in range(3):
        grad = formats.flat(drawn_gradient((24, 20, 3, 3), i, channels_last=True))
        gradient_update(Parameter(line, rows), grad, optim=optim, backend=backend, scale=2.0)
    assert same_bits(line, weight) and same_bits(rows.m, state.m)  # type: ignore[arg-type]


def test_small_parameters_and_fp64_keep_plain_states() -> None:
    optim = replace(ADAM, state_precision="8bit")
    for weight, dtype in ((torch.zeros(4095), torch.float32), (torch.zeros(4096), torch.uint8),
                          (torch.zeros(5000).double(), torch.float64)):
        state = OptimState.create(weight, optim)
        assert state.m is not None and state.m.dtype is dtype
        assert state.format == ("8bit" if dtype is torch.uint8 else "fp32")
        assert sum(t.numel() * t.element_size() for t in state.tensors().values()) == state_bytes(
            weight.numel(), weight.dtype, optim)


def test_bf16_weights_move_by_less_than_half_a_step() -> None:
    """64 steps of 2^-10 from 1: each far below half of bf16's spacing, 2^-8."""
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    optim = OptimConfig("sgd", lr=2**-10)
    state = OptimState.create(weight, optim, name="w")
    for _ in range(64):
        gradient_update(Parameter(weight, state), torch.ones(64, 64), optim=optim)
    spread = 64**0.5 * 2**-8 / 2 / 64  # of the mean of 4096
    assert abs(weight.float().mean() - (1 - 64 * 2**-10)) < 4 * spread
    assert (torch.ones(1, dtype=torch.bfloat16) - 2**-10).item() == 1  # as plain rounding has it


def layer_case(kind: str, dtype: torch.dtype) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor, ConvGeometry | None]:
    """(weight, x, da, geometry)."""
    if kind == "linear":
        return drawn((70, 90)), drawn((9, 90), 1).to(dtype), drawn((9, 70), 2).to(dtype), None
    weight = drawn((32, 24, 3, 3), channels_last=True)
    x, da = (drawn((4, c, 6, 6), c, channels_last=True).to(dtype) for c in (24, 32))
    return weight, x, da, ConvGeometry((3, 3), 1, 1)


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32-weight", "bf16-weight"])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", CPU)
def test_weight_update_is_gradient_and_step(backend: str, precision: Any, kind: str, tiles: int,
                                            rounded: bool) -> None:
    dtype = torch.bfloat16 if rounded else torch.float32
    weight, x, da, geometry = layer_case(kind, dtype)
    weight = weight.to(dtype)
    optim = OptimConfig(lr=0.01, state_precision=precision)
    grad, mine = torch.zeros_like(weight, dtype=torch.float32), weight.clone()
    state = OptimState.create(weight, optim, name="a")
    buffer = torch.zeros_like(grad) if tiles > 1 else None
    for part, (rows, deltas) in enumerate(zip(x.chunk(tiles), da.chunk(tiles), strict=True)):
        weight_update(Parameter(mine, state, buffer, grad), rows, deltas, optim=optim,
                      geometry=geometry, finish=part == tiles - 1, backend=backend)
    assert state.step == 1
    other = OptimState.create(weight, optim, name="a")
    gradient_update(Parameter(weight, other), grad, optim=optim, backend=backend)
    assert same_bits(mine, weight)
    assert all(same_bits(t, other.tensors()[n]) for n, t in state.tensors().items())


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32-weight", "bf16-weight"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", CPU)
def test_linear_step_is_gradient_and_step(backend: str, precision: Any, rounded: bool) -> None:
    dtype = torch.bfloat16 if rounded else torch.float32
    weight, x, _, _ = layer_case("linear", dtype)
    weight, bias, y = weight.to(dtype), drawn((70,), 5), torch.arange(9) % 7
    optim, config = OptimConfig(lr=0.01, state_precision=precision), LocalPassConfig(groups=7)
    mine = [Parameter(p.clone(), OptimState.create(p, optim, name="a"), None, torch.zeros(p.shape))
            for p in (weight, bias)]
    made = linear_step(mine[0], x, y, config=config, optim=optim, bias=mine[1], backend=backend)
    assert made.g.dtype is torch.float32
    for p, (now, state, _, grad) in zip((weight, bias), mine, strict=True):
        other = OptimState.create(p, optim, name="a")
        gradient_update(Parameter(p, other), grad, optim=optim, backend=backend)
        assert same_bits(now, p)
        assert all(same_bits(t, other.tensors()[n]) for n, t in state.tensors().items())


@pytest.mark.parametrize("accumulate", [False, True], ids=["one-tile", "buffer"])
@pytest.mark.parametrize("rounded", [False, True], ids=["fp32-weight", "bf16-weight"])
@pytest.mark.parametrize("backend", CPU)
def test_memory_is_as_declared(backend: str, rounded: bool, accumulate: bool) -> None:
    dtype = torch.bfloat16 if rounded else torch.float32
    weight, x, da, geometry = layer_case("conv", dtype)
    weight, optim = weight.to(dtype), OptimConfig(state_precision="8bit")
    state = OptimState.create(weight, optim)
    buffer = torch.zeros_like(weight, dtype=torch.float32) if accumulate else None
    known = [weight, x, da, *state.tensors().values(), *([] if buffer is None else [buffer])]
    with MemoryMeter(feature=known) as meter:
        weight_update(Parameter(weight, state, buffer), x, da, optim=optim, geometry=geometry,
                      backend=backend)
    held = meter.report.peak_bytes - sum(t.numel() * t.element_size() for t in known)
    declared = extra_bytes(tuple(x.shape), tuple(da.shape), tuple(weight.shape), dtype,
                           geometry=geometry, accumulate=accumulate, compressed=True,
                           weight_dtype=weight.dtype, backend=backend)
    assert held == declared if backend == "cpu" else held <= declared


def test_bytes_moved() -> None:
    shapes, n = ((2, 64, 4, 4), (2, 64, 4, 4), (64, 64, 3, 3)), 64 * 64 * 9
    maps, eight = 2 * 2 * 2 * 64 * 16, OptimConfig(state_precision="8bit")
    states = 2 * (n + 4 * n // 256)
    moved = bytes_moved(*shapes, torch.bfloat16, optim=eight)
    assert moved == maps + 2 * (4 * n + 4 * n + states)  # the gradient is written and read
    assert bytes_moved(*shapes, torch.bfloat16, optim=eight, weight_dtype=torch.bfloat16) == (
        moved - 2 * 2 * n)
    config = LocalPassConfig(groups=4)
    plain, ours = (step_bytes_moved((9, 64), (64, 64), torch.float32, config, optim=o)
                   for o in (OptimConfig(), eight))
    assert plain - ours == 2 * 2 * (4 * 4096 - 4096 - 4 * 16)


def test_the_registered_op_carries_every_format() -> None:
    for precision, dtype in (("8bit", torch.float32), ("bf16", torch.bfloat16)):
        weight, x, da, _ = layer_case("linear", dtype)
        weight, bias = weight.to(dtype), drawn((70,), 5)
        optim = OptimConfig(state_precision=precision)  # type: ignore[arg-type]
        results = []
        for registered in (False, True):
            mine, offset = weight.clone(), bias.clone()
            state, other = (OptimState.create(p, optim, seed=2**64 - 1, name="w")
                            for p in (mine, offset))
            given = Parameter(mine, state), Parameter(offset, other)
            if registered:
                request = op.WeightUpdateRequest(given[0], x, da, optim, None, given[1], True, 1.0)
                torch.ops.ffengine.weight_update(CPU[-1], *pack(op._update.parts, (request,)))
            else:
                weight_update(given[0], x, da, optim=optim, bias=given[1])
            results.append([mine, offset, *state.tensors().values(), *other.tensors().values()])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_errors_are_one_line() -> None:
    weight, x, da, _ = layer_case("linear", torch.float32)
    eight = OptimConfig(state_precision="8bit")
    state = OptimState.create(weight, eight)
    for optim, given, words in (
            (OptimConfig(), state, "state.m of the weight must be"),
            (eight, OptimState.create(weight, OptimConfig()), "must be (70, 90) torch.uint8"),
            (eight, replace(state, v_scale=None), "state.v_scale of the weight must be (25,)"),
            (eight, replace(state, m_scale=torch.zeros(24)), "state.m_scale of the weight"),
            (OptimConfig("sgd", state_precision="8bit"), state, "expected 0 state tensors")):
        with pytest.raises(ValueError) as found:
            weight_update(Parameter(weight, given), x, da, optim=optim)
        assert words in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(ValueError, match="state_precision must be one of fp32, bf16, 8bit"):
        OptimConfig(state_precision="4bit")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight must be torch\.float32 for torch.float32 inputs"):
        weight_update(Parameter(weight.bfloat16(), state), x, da, optim=eight)
