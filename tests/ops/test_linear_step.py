"""linear_step: against the ops it is made of, fp64, every tile; memory, tracing, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ffengine.engine.memory.meter import MemoryMeter
from ffengine.ops import backends, linear_tile
from ffengine.ops import linear_step as op
from ffengine.ops.config import Dropout, LocalPassConfig, Norm, ce, symba, threshold
from ffengine.ops.launch import pack, unpack
from ffengine.ops.linear_step import bytes_moved, extra_bytes, linear_step
from ffengine.ops.local_pass import local_pass
from ffengine.ops.optim import OptimConfig, OptimState, Parameter
from ffengine.ops.weight_update import weight_update
from ffengine.reference.linear_step import normalise_input
from tests.linear_step_cases import CASES, L2, RMS, SGD0, Case, check, draw, one, outcome

BUILT = backends.extension() is not None
KERNELS = ["cpu"] if BUILT else []
ADAM = OptimConfig("adam", lr=0.03, weight_decay=0.1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reference_is_the_composition(case: Case) -> None:
    """F.linear, local_pass and weight_update in fp64, one after the other."""
    data = draw(case, torch.float64)
    ours = outcome(case, data, torch.float64, None, "reference", ADAM)
    weight, x = data["weight"].double(), data["x"]
    bias = None if data["bias"] is None else data["bias"].double()
    z = normalise_input(x, case.norm)
    swept = local_pass(F.linear(z, weight, bias), data["y"], config=case.config, want_da=True,
                       g0=None if data["g0"] is None else data["g0"].double())
    grads = [torch.empty_like(p) for p in (weight, bias) if p is not None]
    of_weight, *of_bias = (Parameter(p, OptimState.create(p, ADAM), None, grad) for p, grad in zip(
        (weight, bias), grads, strict=False))
    weight_update(of_weight, z, swept.da, optim=ADAM, backend="reference",
                  bias=of_bias[0] if of_bias else None)
    theirs = [swept.g, swept.loss, swept.coef, *grads]
    for name, value in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile_rows", [None, 6])
@pytest.mark.parametrize("norm", [Norm("none"), L2, RMS], ids=["none", "l2", "rms"])
def test_gradients_are_autograds(norm: Norm, tile_rows: int | None) -> None:
    case = Case("autograd", one(), (21, 30, 12), norm)
    data = draw(case, torch.float64)
    ours = outcome(case, data, torch.float64, tile_rows, "reference")
    weight, bias = (data[n].double().requires_grad_() for n in ("weight", "bias"))
    a = F.linear(normalise_input(data["x"], norm), weight, bias)
    side = 2 * data["y"] - 1
    loss = F.softplus(-side * (a.relu().pow(2).mean(1) - 0.5))
    loss.mean().backward()
    for name, value in (("loss", loss.detach()), ("dW", weight.grad), ("db", bias.grad)):
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("case", "dtype", "tile_rows"), [
    pytest.param(case, dtype, rows, id=f"{case.id}-{str(dtype)[6:]}-{rows}")
    for case in CASES for dtype in case.dtypes for rows in case.tiles])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rule(backend: str, case: Case, dtype: torch.dtype, tile_rows: int | None) -> None:
    check(case, dtype, tile_rows, backend)


@pytest.mark.parametrize("tile_rows", [1, 2, 5, 36, 37, 1000])
def test_every_tile_gives_the_same_gradients(tile_rows: int) -> None:
    for case in CASES[:6]:
        data = draw(case, torch.float64)
        whole = outcome(case, data, torch.float64, None, "reference")
        tiled = outcome(case, data, torch.float64, tile_rows, "reference")
        for name in whole:
            torch.testing.assert_close(tiled[name], whole[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(dtype: torch.dtype, isa: str) -> None:
    check(CASES[1], dtype, 64, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_thread_count_gives_the_same_bits(dtype: torch.dtype) -> None:
    ext = backends.extension()
    if ext is None:
        return
    data = draw(CASES[1], dtype)
    results = []
    for threads in (1, 2, 3, 7, 1):
        ext.set_num_threads(threads)
        results.append(outcome(CASES[1], data, dtype, 40, "cpu"))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_optimizer_takes_the_gradient_that_came_out(backend: str) -> None:
    data = draw(CASES[1], torch.float32)
    weight, bias = data["weight"], data["bias"]
    twins = [p.clone().requires_grad_() for p in (weight, bias)]
    stepper = torch.optim.Adam(twins, lr=ADAM.lr, weight_decay=ADAM.weight_decay)
    states = [OptimState.create(p, ADAM) for p in (weight, bias)]
    for _ in range(3):
        grads = [torch.empty_like(p) for p in twins]
        linear_step(Parameter(weight, states[0], None, grads[0]), data["x"], data["y"],
                    config=CASES[1].config, optim=ADAM,
                    bias=Parameter(bias, states[1], None, grads[1]), backend=backend)
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad
        stepper.step()
    assert states[0].step == states[1].step == 3
    for mine, twin in zip((weight, bias), twins, strict=True):
        torch.testing.assert_close(mine, twin.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_gradients_alone_leave_the_parameters(backend: str) -> None:
    case = CASES[1]
    data = draw(case, torch.float32)
    before, grads = data["weight"].clone(), [torch.empty_like(data[n]) for n in ("weight", "bias")]
    weight, bias = (Parameter(data[n], grad_out=grad) for n, grad in zip(
        ("weight", "bias"), grads, strict=True))
    linear_step(weight, data["x"], data["y"], config=case.config, optim=ADAM, bias=bias,
                input_norm=L2, finish=False, backend=backend)
    stepped = outcome(case, data, torch.float32, None, backend)
    assert torch.equal(before, data["weight"])
    assert torch.equal(grads[0], stepped["dW"]) and torch.equal(grads[1], stepped["db"])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_no_samples_still_step(backend: str) -> None:
    weight = torch.ones(4, 3)
    optim = OptimConfig("adamw", lr=0.1, weight_decay=0.5)
    state = OptimState.create(weight, optim)
    found = linear_step(Parameter(weight, state), torch.empty(0, 3),
                        torch.empty(0, dtype=torch.int64), config=LocalPassConfig(groups=2),
                        optim=optim, backend=backend)
    assert state.step == 1 and found.g.shape == (0, 2) and found.loss.shape == (0,)
    torch.testing.assert_close(weight, torch.full((4, 3), 0.95))


@pytest.mark.parametrize("norm", [Norm("none"), L2], ids=["none", "l2"])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_special_values_reach_the_results(backend: str, norm: Norm) -> None:
    case = Case("nan", one(), (9, 20, 12), norm)
    data = draw(case, torch.float32)
    data["x"][4, 3] = float("nan")
    data["x"][6] = 0.0  # a row without length
    got = outcome(case, data, torch.float32, 4, backend)
    assert got["g"][4].isnan().all() and got["loss"][4].isnan()
    clean = torch.arange(9) != 4
    assert got["g"][clean].isfinite().all() and got["loss"][clean].isfinite().all()
    assert got["dW"][:, 3].isnan().all()


def test_fp16_keeps_its_range() -> None:
    """Inputs of 1e-4 and of 1e4: a row scale would leave fp16's range on one side or the other."""
    for size in (1e-4, 1e4):
        case = Case("range", one(), (40, 50, 12), RMS)
        data = draw(case, torch.float32)
        data["x"] = (data["x"] * size).half()
        data["weight"] = data["weight"] * 0.2
        for backend in ("reference", *KERNELS):
            got = outcome(case, data, torch.float16, 16, backend)
            assert all(t.isfinite().all() for t in got.values())
            assert got["dW"].abs().max() > 0


@pytest.mark.parametrize("grad_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bias", "plain", "pairs", "unequal", "dropout"])
def test_declared_bytes_are_the_bytes_held(name: str, dtype: torch.dtype, grad_out: bool,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the suite's poison allocates
    if not BUILT:
        return
    case = next(c for c in CASES if c.id == name)
    case = replace(case, shape=(300, 130, 72), config=replace(
        case.config, groups=(0, 5, 72) if name == "unequal" else case.config.groups))
    data = draw(case, dtype)
    parameters = [p for p in (data["weight"], data["bias"]) if p is not None]
    states = [OptimState.create(p, ADAM) for p in parameters]
    grads = [torch.empty_like(p) for p in parameters] if grad_out else []
    given = [*parameters, *grads, *(t for s in states for t in (s.m, s.v)),
             *(t for t in (data["x"], data["y"], data["g0"]) if t is not None)]

    weight, *bias = (Parameter(p, state, None, grads[i] if grads else None)
                     for i, (p, state) in enumerate(zip(parameters, states, strict=True)))

    def call() -> Any:
        return linear_step(weight, data["x"], data["y"], config=case.config, optim=ADAM,
                           bias=bias[0] if bias else None, input_norm=case.norm, g0=data["g0"],
                           tile_rows=100, backend="cpu")

    call()
    with MemoryMeter(state=given) as meter:
        found = call()
    held = meter.report.working_bytes - sum(t.untyped_storage().nbytes() for t in found)
    declared = extra_bytes((300, 130), (72, 130), dtype, case.config, input_norm=case.norm,
                           bias=case.bias, g0=case.g0, tile_rows=100, grad_out=grad_out)
    assert held <= declared
    if dtype is torch.float32:  # the library's 16-bit products declare a bound
        assert held == declared


def test_a_full_batch_works_in_32_mb() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for backend in ("cpu", "cuda") if BUILT else ("cuda",):
            for norm in (Norm("none"), L2):
                assert extra_bytes((50_000, 784), (500, 784), dtype, one(), input_norm=norm,
                                   bias=True, backend=backend) <= 32_000_000


def test_bytes_moved() -> None:
    shapes = (100, 30), (12, 30)
    moved = bytes_moved(*shapes, torch.bfloat16, LocalPassConfig(groups=3), optim=ADAM)
    assert moved == 2 * 3000 + 4 * 6 * 360 + 4 * 100 * 7
    assert bytes_moved(*shapes, torch.float32, one(), optim=SGD0, finish=False) == (
        4 * 3000 + 4 * 2 * 360 + 4 * 100 * 3)


def test_tile_choice_is_pure() -> None:
    layer = (784, 500, torch.float32, L2)
    assert linear_tile.choose_rows(50_000, *layer, "cpu") == 4160
    assert linear_tile.choose_rows(100, *layer, "cpu") == 100
    assert linear_tile.choose_rows(0, *layer, "cpu") == 1
    assert linear_tile.choose_rows(50_000, 10, 10**7, torch.float32, L2, "cpu") == 64


def arguments(case: Case, tile_rows: int | None = 8) -> tuple[Any, ...]:
    data = draw(case, torch.float32)
    weight, bias = (Parameter(data[n], OptimState.create(data[n], ADAM), None,
                              torch.zeros_like(data[n])) if data[n] is not None else None
                    for n in ("weight", "bias"))
    call = op.LinearStepRequest(weight, data["x"], data["y"], case.config, ADAM, bias, case.norm,
                                data["g0"], tile_rows, True)
    result = op._results(call)
    for t in result:
        t.zero_()
    return ("cpu" if BUILT else "reference", *pack(op.run.parts, (call, result)))


@pytest.mark.parametrize("name", ["plain", "unequal", "pairs", "no-rows", "strided"])
def test_registered_op(name: str) -> None:
    case = next(c for c in CASES if c.id == name)
    torch.library.opcheck(torch.ops.ffengine.linear_step.default, arguments(case))


def test_a_call_survives_its_schema() -> None:
    config = LocalPassConfig(groups=(0, 3, 8), goodness="sum_sq", loss=threshold(1.5, False, "sum"),
                             norm=Norm("none"), relu_gradient="straight_through",
                             dropout=Dropout(0.3, 2**64 - 3, 7, 9))
    weight, x = torch.zeros(8, 3), torch.zeros(2, 3)
    optim = OptimConfig("sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.2)
    state = OptimState(weight, None, 4, x, None, 2**63 + 5, 2**31 + 7)
    call = op.LinearStepRequest(Parameter(weight, state, None, weight), x, torch.zeros(2), config,
                                optim, None, L2, None, 6, False)
    result = op.LinearStepOutput(x, x, x)
    assert unpack(op.run.kinds, pack(op.run.parts, (call, result))) == [call, result]


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tracer cannot guard on the suite's poisoned torch.empty
    case = CASES[1]
    data = draw(case, torch.float32)
    results = []
    for compiled in (False, True):
        weight = data["weight"].clone()
        state = OptimState.create(weight, ADAM)

        def step(x: torch.Tensor, weight: torch.Tensor = weight,
                 state: OptimState = state) -> tuple[torch.Tensor, ...]:
            return tuple(linear_step(Parameter(weight, state), x, data["y"], config=case.config,
                                     optim=ADAM, input_norm=L2))

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        results.append([*run(data["x"]), weight])
        assert state.step == 1
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_backward_through_the_step_explains_itself() -> None:
    weight = torch.randn(8, 5)
    found = linear_step(Parameter(weight, OptimState.create(weight, SGD0)),
                        torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 0, 1]),
                        config=LocalPassConfig(groups=2), optim=SGD0)
    with pytest.raises(RuntimeError, match="local by design"):
        found.loss.sum().backward()


def test_errors_are_one_line() -> None:
    weight, bias, x = torch.randn(8, 5), torch.zeros(8), torch.randn(6, 5)
    y, config = torch.tensor([0, 1, 0, 1, 0, 1]), LocalPassConfig(groups=2, loss=ce())
    state = OptimState.create(weight, ADAM)
    of_weight, of_bias = Parameter(weight, state), Parameter(bias, OptimState.create(bias, ADAM))

    def call(**changes: Any) -> None:
        given: dict[str, Any] = {"weight": of_weight, "x": x, "y": y, "config": config,
                                 "optim": ADAM, "bias": of_bias, **changes}
        linear_step(given.pop("weight"), given.pop("x"), given.pop("y"), **given)

    def changed(**of_the_weight: Any) -> dict[str, Parameter]:
        return {"weight": of_weight._replace(**of_the_weight)}

    pairs = LocalPassConfig(groups=1, loss=symba())
    for error, changes in [
        (TypeError, {"x": x.double()}), (TypeError, {"x": x.long()}),
        (TypeError, changed(value=weight.half())), (ValueError, {"x": x[0]}),
        (ValueError, {"x": 3}), (ValueError, {"x": x[:, :4]}),
        (ValueError, changed(value=weight[None])),
        (ValueError, changed(value=weight.t().contiguous().t())),
        (ValueError, {"config": LocalPassConfig(groups=3)}),
        (ValueError, {"config": replace(config, pool="max2")}),
        (ValueError, {"config": replace(config, blend=0.5)}),
        (ValueError, {"y": torch.full((6,), 2)}), (ValueError, {"y": y - 1}),
        (ValueError, {"y": y[:5]}), (TypeError, {"y": y.float()}),
        (ValueError, {"config": pairs, "x": x[:5], "y": y[:5]}),
        (ValueError, {"config": replace(config, loss=lambda g, y: g[:, 0]), "y": None}),
        (ValueError, {"config": replace(config, loss=lambda g, y: g), "y": y}),
        (ValueError, {"input_norm": Norm("layer")}),
        (ValueError, {"input_norm": Norm("length", scope="group")}),
        (ValueError, {"tile_rows": 0}), (ValueError, {"tile_rows": -3}),
        (ValueError, {"g0": torch.zeros(6, 3)}), (ValueError, changed(state=None)),
        (ValueError, changed(state=OptimState(None, None))),
        (ValueError, {"bias": of_bias._replace(state=None)}),
        (ValueError, {"bias": of_bias._replace(value=torch.zeros(7))}),
        (ValueError, {"finish": False}), (ValueError, changed(grad_out=torch.zeros(8, 4))),
        (ValueError, changed(accumulate=torch.zeros(8, 5))),
        (ValueError, {"backend": "gpu"}), (ValueError, {"backend": "cuda"}),
    ]:
        with pytest.raises(error) as caught:
            call(**changes)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("["), changes
    assert state.step == 0
