"""weight_update: the gradient against fp64, the optimizers against torch.optim, memory, errors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ffengine.ops import backends
from ffengine.ops import weight_update as op
from ffengine.ops.launch import pack
from ffengine.ops.weight_update import (
    ConvGeometry,
    OptimConfig,
    OptimState,
    Parameter,
    bytes_moved,
    choose,
    extra_bytes,
    shaped_like,
    weight_update,
)
from ffengine.reference import weight_update as reference
from tests.tolerances import assert_close

CPU = ["reference"] + (["cpu"] if backends.extension() is not None else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SGD0 = OptimConfig("sgd", lr=0.0)

# id: N, C, O, H, W, kernel, stride, padding; why
SHAPES = {
    "k3": (2, 3, 5, 7, 9, 3, 1, 1),  # few channels, odd map
    "k3-tails": (3, 17, 33, 9, 6, 3, 1, 1),  # one above a panel, one above a tile pair
    "k3-s2": (3, 17, 33, 9, 6, 3, 2, 1),
    "k3-pad2": (2, 7, 9, 5, 5, 3, 1, 2),
    "k5": (2, 16, 70, 8, 8, 5, 1, 2),
    "k5-s2-pad0": (2, 16, 40, 8, 9, 5, 2, 0),
    "k5-pad1": (2, 7, 9, 12, 5, 5, 1, 1),
    "k1": (3, 40, 20, 8, 8, 1, 1, 0),
    "k1-s2": (3, 40, 20, 9, 9, 1, 2, 0),
    "one-pixel": (5, 20, 30, 3, 3, 3, 1, 0),
    "empty": (0, 4, 6, 8, 8, 3, 1, 1),
    "one": (1, 20, 40, 8, 8, 3, 1, 1),
    "compact": (5, 48, 200, 4, 4, 3, 1, 1),  # a copy of x per tap on AMX
    "chunks": (9, 100, 36, 20, 20, 3, 1, 1),  # more samples than one chunk holds
    "no-padding-shared": (5, 16, 1, 2, 3, 3, 1, 2),  # x's grid is the output's, of an odd width
}


def random_shapes(seed: int, count: int) -> list[tuple[int, ...]]:
    """Any sizes, kernels, strides and paddings that give an output."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        n, c = rng.choice((1, 2, 3, 5, 8, 9, 33)), rng.choice((1, 3, 7, 15, 16, 17, 40, 100))
        o, k = rng.choice((1, 3, 20, 29, 57)), rng.choice((1, 2, 3, 4, 5, 7))
        h, w = (rng.choice((1, 2, 3, 4, 5, 7, 8, 9, 14, 20)) for _ in range(2))
        stride, padding = rng.choice((1, 1, 2, 3)), rng.choice((0, 1, 2, 3))
        if min(h, w) + 2 * padding >= k:
            found.append((n, c, o, h, w, k, stride, padding))
    return found


def laid_out(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t.contiguous()


def conv_case(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "lll",
              seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ConvGeometry]:
    """(weight, x, da, geometry); layout: x, da, weight each c(ontiguous) or channels_(l)ast."""
    n, c, o, h, w, k, stride, padding = shape
    rng = torch.Generator().manual_seed(seed)
    geometry = ConvGeometry((k, k), stride, padding)
    x = torch.randn(n, c, h, w, generator=rng) + 0.5
    da = torch.randn(n, o, *geometry.output_size(h, w), generator=rng)
    weight = torch.randn(o, c, k, k, generator=rng)
    return (laid_out(weight, layout[2] == "l"), laid_out(x.to(dtype), layout[0] == "l"),
            laid_out(da.to(dtype), layout[1] == "l"), geometry)


def gradient(weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor,
             geometry: ConvGeometry | None, backend: str, **kwargs: Any) -> torch.Tensor:
    out = torch.full_like(weight, float("nan"))
    weight_update(Parameter(weight.clone(), OptimState.create(weight, SGD0), None, out), x, da,
                  optim=SGD0, geometry=geometry, backend=backend, **kwargs)
    return out


def check_gradient(weight: torch.Tensor, x: torch.Tensor, da: torch.Tensor,
                   geometry: ConvGeometry | None, backend: str) -> None:
    before = x.clone(), da.clone()
    got = gradient(weight, x, da, geometry, backend)
    exact = gradient(weight.double(), x.double(), da.double(), geometry, "reference")
    same = gradient(weight, x, da, geometry, "reference")
    reduction = max(1, da.numel() // da.shape[1])
    assert_close(got, exact, same, reduction=reduction, what="dW")
    assert torch.equal(before[0], x) and torch.equal(before[1], da)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", CPU)
def test_gradient_of_a_convolution(backend: str, shape: tuple[int, ...],
                                   dtype: torch.dtype) -> None:
    weight, x, da, geometry = conv_case(shape, dtype)
    check_gradient(weight, x, da, geometry, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_any_convolution(dtype: torch.dtype, isa: str) -> None:
    for i, shape in enumerate(random_shapes(1, 60)):
        layout = ("lll", "llc", "cll", "lcl", "ccc")[i % 5]
        weight, x, da, geometry = conv_case(shape, dtype, layout, seed=i)
        check_gradient(weight, x, da, geometry, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["ccc", "llc", "lcl", "cll", "ccl"])
@pytest.mark.parametrize("name", ["k3", "k3-s2", "compact", "k1"])
@pytest.mark.parametrize("backend", CPU)
def test_gradient_in_every_layout(backend: str, name: str, layout: str,
                                  dtype: torch.dtype) -> None:
    weight, x, da, geometry = conv_case(SHAPES[name], dtype, layout)
    check_gradient(weight, x, da, geometry, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 7, 3), (33, 100, 50), (130, 600, 10)], ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_gradient_of_a_linear_layer(backend: str, shape: tuple[int, int, int],
                                    dtype: torch.dtype) -> None:
    n, features, out = shape
    rng = torch.Generator().manual_seed(1)
    x = (torch.randn(n, features, generator=rng) + 0.5).to(dtype)
    da = torch.randn(n, out, generator=rng).to(dtype)
    check_gradient(torch.zeros(out, features), x, da, None, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["k3-tails", "k5-s2-pad0", "chunks"])
def test_gradient_on_every_instruction_set(name: str, dtype: torch.dtype, isa: str) -> None:
    weight, x, da, geometry = conv_case(SHAPES[name], dtype)
    check_gradient(weight, x, da, geometry, "cpu")


@pytest.mark.parametrize("backend", CPU)
def test_special_values_reach_the_gradient(backend: str) -> None:
    for dtype in DTYPES:
        weight, x, da, geometry = conv_case(SHAPES["k3-tails"], dtype)
        da[1, 4, 3, 3] = float("nan")
        x[0, 2, 4, 4] = float("inf")
        grad = gradient(weight, x, da, geometry, backend)
        assert grad[4].isnan().all()
        assert not grad[:, 2].isfinite().any()
        clean = torch.ones_like(grad, dtype=torch.bool)
        clean[4] = clean[:, 2] = False
        assert grad[clean].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_tiles_add_up_to_the_whole(backend: str, dtype: torch.dtype) -> None:
    weight, x, da, geometry = conv_case((7, 20, 24, 6, 6, 3, 1, 1), dtype)
    optim = OptimConfig("adam", lr=0.01)
    buffer, out, tiled = torch.zeros_like(weight), torch.empty_like(weight), weight.clone()
    state = OptimState.create(weight, optim)
    for start in range(0, 7, 3):
        tile = slice(start, start + 3)
        weight_update(Parameter(tiled, state, buffer, out), x[tile], da[tile], optim=optim,
                      geometry=geometry, finish=start == 6, backend=backend)
        assert torch.equal(tiled, weight) == (start < 6)
    exact = gradient(weight.double(), x.double(), da.double(), geometry, "reference")
    same = gradient(weight, x, da, geometry, "reference")
    assert_close(out, exact, same, reduction=7 * 36, what="sum of tiles")
    assert torch.equal(buffer, out)
    assert state.step == 1


OPTIMIZERS = [
    OptimConfig("adam", lr=0.01), OptimConfig("adam", lr=0.01, weight_decay=0.1),
    OptimConfig("adamw", lr=0.02, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6),
    OptimConfig("sgd", lr=0.1), OptimConfig("sgd", lr=0.1, weight_decay=0.1, momentum=0.9),
    OptimConfig("sgd", lr=0.1, momentum=0.9, nesterov=True),
]


def torch_optimizer(parameter: torch.Tensor, c: OptimConfig) -> torch.optim.Optimizer:
    if c.kind == "sgd":
        return torch.optim.SGD([parameter], lr=c.lr, momentum=c.momentum, nesterov=c.nesterov,
                               weight_decay=c.weight_decay)
    kind = torch.optim.Adam if c.kind == "adam" else torch.optim.AdamW
    return kind([parameter], lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay)


@pytest.mark.parametrize("optim", OPTIMIZERS,
                         ids=lambda c: f"{c.kind}-{c.weight_decay}-{c.momentum}")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", CPU)
def test_optimizers_are_torchs(backend: str, channels_last: bool, optim: OptimConfig) -> None:
    """The steps are torch.optim's, given the gradient that came out."""
    weight = laid_out(torch.randn(6, 21, 3, 3, generator=torch.Generator().manual_seed(2)),
                      channels_last)
    bias = torch.linspace(-1, 1, 6)
    mine = {d: (weight.to(d, copy=True), bias.to(d, copy=True))
            for d in (torch.float32, torch.float64)}
    steppers = {d: [torch_optimizer(p, optim) for p in pair] for d, pair in mine.items()}
    state, bias_state = OptimState.create(weight, optim), OptimState.create(bias, optim)
    out, bias_out = torch.empty_like(weight), torch.empty_like(bias)
    for step in range(4):
        _, x, da, geometry = conv_case((2, 21, 6, 5, 5, 3, 1, 1), torch.float32, seed=step)
        weight_update(Parameter(weight, state, None, out), x, da, optim=optim, geometry=geometry,
                      bias=Parameter(bias, bias_state, None, bias_out), backend=backend)
        for d, pair in mine.items():
            for parameter, grad, stepper in zip(pair, (out, bias_out), steppers[d], strict=True):
                parameter.grad = grad.to(d)
                stepper.step()
    assert state.step == bias_state.step == 4
    for got, exact, same in zip((weight, bias), mine[torch.float64], mine[torch.float32],
                                strict=True):
        assert_close(got, exact, same, reduction=4, what=optim.kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_bias_gradient(backend: str, dtype: torch.dtype) -> None:
    for shape in ((3, 4, 40, 9, 7, 3, 1, 1), (40, 4, 40, 20, 20, 1, 1, 0)):
        weight, x, da, geometry = conv_case(shape, dtype)
        out = torch.empty(40)
        buffer = torch.ones(40)
        bias = Parameter(torch.zeros(40), OptimState.create(out, SGD0), buffer, out)
        weight_update(Parameter(weight, OptimState.create(weight, SGD0)), x, da, optim=SGD0,
                      geometry=geometry, bias=bias, backend=backend)
        exact = da.double().sum((0, 2, 3)) + 1
        assert_close(out, exact, da.float().sum((0, 2, 3)) + 1, reduction=da.numel() // 40,
                     what="bias gradient")
        assert torch.equal(buffer, out)


@pytest.mark.parametrize("backend", CPU)
def test_da_scale_is_taken_out(backend: str) -> None:
    weight, x, da, geometry = conv_case(SHAPES["k3-tails"], torch.float16)
    plain = gradient(weight, x, da, geometry, backend)
    assert torch.equal(gradient(weight, x, da * 2, geometry, backend, da_scale=2.0), plain)
    buffer = torch.zeros_like(weight)
    weight_update(Parameter(weight, accumulate=buffer), x, da * 4, optim=SGD0, geometry=geometry,
                  finish=False, da_scale=4.0, backend=backend)
    assert torch.equal(buffer, plain)


@pytest.mark.parametrize("backend", CPU)
def test_no_samples_still_step(backend: str) -> None:
    weight, x, da, geometry = conv_case(SHAPES["empty"], torch.float32)
    optim = OptimConfig("adamw", lr=0.1, weight_decay=0.5)
    state, stepped = OptimState.create(weight, optim), weight.clone()
    weight_update(Parameter(stepped, state), x, da, optim=optim, geometry=geometry,
                  backend=backend)
    assert state.step == 1
    torch.testing.assert_close(stepped, weight * 0.95)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["k3-tails", "compact", "chunks", "k3-s2"])
def test_any_thread_count_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    ext = backends.extension()
    if ext is None:
        return
    weight, x, da, geometry = conv_case(SHAPES[name], dtype)
    results = []
    for threads in (1, 2, 3, 7):
        ext.set_num_threads(threads)
        results.append(gradient(weight, x, da, geometry, "cpu"))
    assert all(torch.equal(r, results[0]) for r in results)


def peak_allocated(call: Any) -> int:
    """Most bytes of tensors alive at once during a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.skipif("cpu" not in CPU, reason="the C++ kernels are not built")
def test_a_grouped_gradient_casts_some_samples_at_a_time(dtype: torch.dtype) -> None:
    weight = laid_out(torch.randn(40, 8, 3, 3), True)
    x, da = (laid_out(torch.randn(64, 40, 32, 32).to(dtype), True) for _ in range(2))
    geometry = ConvGeometry((3, 3), 1, 1, 5)
    check_gradient(weight, x, da, geometry, "cpu")
    # x and da in fp32 would be 21 MB
    assert peak_allocated(lambda: gradient(weight, x, da, geometry, "cpu")) < 10e6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", ["k3", "k3-tails", "compact", "chunks", "k1-s2"])
@pytest.mark.parametrize("backend", CPU)
def test_declared_memory_is_kept(backend: str, name: str, accumulate: bool,
                                 dtype: torch.dtype) -> None:
    weight, x, da, geometry = conv_case(SHAPES[name], dtype)
    optim, bias = OptimConfig(), torch.zeros(da.shape[1])
    state, bias_state = OptimState.create(weight, optim), OptimState.create(bias, optim)
    buffer = torch.zeros_like(weight) if accumulate else None
    ext = backends.extension()

    def call() -> None:
        weight_update(Parameter(weight, state, buffer), x, da, optim=optim, geometry=geometry,
                      bias=Parameter(bias, bias_state), backend=backend)

    if ext is not None:
        ext.scratch_peak_cpu(True)
    allocated = peak_allocated(call)
    kernel = ext.scratch_peak_cpu(True) if ext is not None else 0
    declared = extra_bytes(tuple(x.shape), tuple(da.shape), tuple(weight.shape), dtype,
                           geometry=geometry, accumulate=accumulate, bias=True, backend=backend)
    assert max(allocated, kernel) <= declared
    if backend == "cpu" and kernel:
        alone = extra_bytes(tuple(x.shape), tuple(da.shape), tuple(weight.shape), dtype,
                            geometry=geometry, accumulate=accumulate, backend=backend)
        assert kernel == alone


def test_bytes_moved() -> None:
    shapes = (2, 3, 4, 4), (2, 5, 4, 4), (5, 3, 3, 3)
    maps, weights = 2 * (96 + 160), 4 * 135
    assert bytes_moved(*shapes, torch.bfloat16, optim=OptimConfig()) == maps + 6 * weights
    assert bytes_moved(*shapes, torch.bfloat16, optim=SGD0, accumulate=True,
                       finish=False) == maps + 2 * weights


def test_choice_follows_shape_and_instruction_set(isa: str) -> None:
    deep = (32, 800, 4, 4, 800, 4, 4, 3, 3, 1, 1)
    first = (32, 3, 32, 32, 100, 32, 32, 3, 3, 1, 1)
    assert choose(deep, torch.float32) == "im2col"
    assert choose(first, torch.float32) == ("im2col" if isa == "baseline" else "library")
    assert choose(first, torch.bfloat16) == "im2col"


@pytest.mark.parametrize("name", ["k3-tails", "empty", "linear"])
def test_registered_op(name: str) -> None:
    optim = OptimConfig()
    if name == "linear":
        weight, geometry = torch.randn(5, 7), None
        x, da = torch.randn(3, 7), torch.randn(3, 5)
    else:
        weight, x, da, geometry = conv_case(SHAPES[name], torch.float32)
    given = Parameter(weight, OptimState.create(weight, optim), torch.zeros_like(weight),
                      torch.zeros_like(weight))
    request = op.WeightUpdateRequest(given, x, da, optim, geometry, None, True, 1.0)
    torch.library.opcheck(torch.ops.ffengine.weight_update.default,
                          (CPU[-1], *pack(op._update.parts, (request,))))


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tracer cannot guard on the suite's poisoned torch.empty
    weight, x, da, geometry = conv_case(SHAPES["k3-tails"], torch.float32)
    optim, bias = OptimConfig(weight_decay=0.1), torch.linspace(-1, 1, weight.shape[0])
    results = []
    for compiled in (False, True):
        mine = [Parameter(t.clone(), OptimState.create(t, optim)) for t in (weight, bias)]

        def step(x: torch.Tensor, da: torch.Tensor, mine: list[Parameter] = mine) -> None:
            weight_update(mine[0], x, da, optim=optim, geometry=geometry, bias=mine[1])

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        run(x, da)
        assert [p.state.step for p in mine] == [1, 1]
        results.append([t for p in mine for t in (p.value, *p.state.tensors().values())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_errors_are_one_line() -> None:
    weight, x, da, geometry = conv_case((2, 3, 4, 6, 6, 3, 1, 1), torch.float32, "ccc")
    optim = OptimConfig()
    state = OptimState.create(weight, optim)

    def call(**changes: Any) -> None:
        given: dict[str, Any] = {"weight": Parameter(weight, state), "x": x, "da": da,
                                 "optim": optim, "geometry": geometry, **changes}
        weight_update(given.pop("weight"), given.pop("x"), given.pop("da"), **given)

    for error, changes in [
        (ValueError, {"da": da[:, :, :5]}), (ValueError, {"da": da[:1]}),
        (ValueError, {"x": x[:, :2]}), (ValueError, {"geometry": ConvGeometry((5, 5), 1, 2)}),
        (ValueError, {"geometry": ConvGeometry((3, 3), 2, 1)}), (ValueError, {"geometry": None}),
        (ValueError, {"weight": Parameter(weight)}), (ValueError, {"backend": "gpu"}),
        (ValueError, {"weight": Parameter(weight, OptimState(None, None))}),
        (ValueError, {"weight": Parameter(weight, state, torch.zeros(4, 3, 3))}),
        (ValueError, {"weight": Parameter(weight, state,
                                          laid_out(torch.zeros_like(weight), True))}),
        (ValueError, {"bias": Parameter(torch.zeros(3), OptimState.create(weight, optim))}),
        (TypeError, {"x": x.bfloat16()}), (TypeError, {"x": x.long(), "da": da.long()}),
        (TypeError, {"weight": Parameter(weight.double(), state)}),
    ]:
        with pytest.raises(error) as caught:
            call(**changes)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("[")
    if "cpu" in CPU:
        wide = weight.double()
        with pytest.raises(ValueError, match="usable: reference"):
            call(weight=Parameter(wide, OptimState.create(wide, optim)), x=x.double(),
                 da=da.double(), backend="cpu")
    for bad in ({"kind": "lion"}, {"lr": -1.0}, {"nesterov": True}, {"betas": (1.0, 0.9)}):
        with pytest.raises(ValueError):
            OptimConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        ConvGeometry((3, 3), 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("groups", [1, 2, 8, 0], ids=["plain", "grouped", "depthwise", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradients_operator_reads_no_weight(dtype: torch.dtype, groups: int,
                                              device: str) -> None:
    """Its shape and layout are all it asks for: the weight's memory in fewer bits serves."""
    conv, generator = groups > 0, torch.Generator().manual_seed(0)
    weight = torch.full((16, 8 // groups, 3, 3) if conv else (16, 8), float("nan"), device=device)
    x, da = (torch.randn(4, c, *(6, 6) * conv, generator=generator).to(device, dtype)
             for c in (8, 16))
    if conv:
        weight, x, da = (t.contiguous(memory_format=torch.channels_last) for t in (weight, x, da))
    like = shaped_like(weight, dtype)
    assert like.dtype is dtype and like.stride() == weight.stride()
    assert like.data_ptr() == weight.data_ptr()
    made, told = (reference.weight_gradient(x, da, w, 1, 1, groups or 1)
                  for w in (like, torch.ones_like(like)))
    assert torch.equal(made, told) and made.isfinite().all()
