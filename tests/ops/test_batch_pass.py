"""batch_pass: the reference against torch's autograd, the C++ back-end against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ffengine.engine.memory.meter import allocator_events
from ffengine.ops import backends
from ffengine.ops.batch_pass import batch_pass, bytes_moved, extra_bytes
from ffengine.ops.call import run_batch
from ffengine.ops.config import (
    BatchNorm,
    Dropout,
    LocalPassConfig,
    Norm,
    Peer,
    bce,
    ce,
    cwc,
    cwg,
    margin,
    pvn,
    sparsemax,
    symba,
    threshold,
)
from ffengine.ops.launch import pack
from ffengine.ops.memory_accounting import listening
from ffengine.ops.params import BatchPassCall, BatchPassTensors
from tests.batch_pass_cases import (
    CL,
    NCHW,
    Inputs,
    cases,
    check,
    draw,
    peer_settings,
    settings,
)

C = backends.extension()
assert C is not None, "the suite tests the C++ kernels: build them first"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ("pool_norm", "norm_pool")
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
ORDER = pytest.mark.parametrize("order", ORDERS)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("goodness", ["mean", "sum_sq", "mean_sq"])
@pytest.mark.parametrize("pool", ["none", "max2"])
@ORDER
def test_reference_is_torch(order: Any, pool: Any, goodness: Any, affine: bool) -> None:
    config, coupling = settings(goodness=goodness, pool=pool), BatchNorm(1e-4, 0.2, order)
    given = draw((5, 20, 5, 6), config, coupling, affine=affine).to(torch.float64)
    twin = Inputs(given.a.clone().requires_grad_(), given.y,
                  {k: v.clone() for k, v in given.vectors.items()})
    v = twin.vectors
    for name in ("gamma", "beta"):
        if affine:
            v[name].requires_grad_()
    h = F.relu(twin.a)
    if pool == "max2" and order == "pool_norm":
        h = F.max_pool2d(h, 2)
    z = F.batch_norm(h, v["running_mean"], v["running_var"], v.get("gamma"), v.get("beta"), True,
                     0.2, 1e-4)
    if pool == "max2" and order == "norm_pool":
        z = F.max_pool2d(z, 2)
    parts = (z if goodness == "mean" else z * z).reshape(5, 4, -1)
    g = parts.sum(2) if goodness == "sum_sq" else parts.mean(2)
    F.cross_entropy(g, twin.y).backward()  # type: ignore[no-untyped-call]
    out = batch_pass(given.a, given.y, config=config, coupling=coupling, want_da=True,
                     **given.vectors)
    pairs = [(out.z, z), (out.g, g), (out.da, twin.a.grad)]
    if affine:
        pairs += [(out.dgamma, v["gamma"].grad), (out.dbeta, v["beta"].grad)]
    pairs += [(given.vectors[n], v[n]) for n in ("running_mean", "running_var")]
    for ours, theirs in pairs:
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [0.03, 0.0])
@pytest.mark.parametrize("straight", [True, False])
def test_reference_peer_is_loewe_s_formula(straight: bool, weight: float) -> None:
    config = peer_settings(relu_gradient="straight_through" if straight else "masked",
                           norm=Norm("none"))
    a = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 0, 1, 1, 0, 0])
    state = torch.full((20,), 0.5, dtype=torch.float64)
    h = F.relu(a)
    if straight:
        h = h.detach() + a - a.detach()
    # the published code leaves the means alone where their penalty weighs nothing
    mean = 0.9 * state + 0.1 * h[y == 1].mean(0) if weight else state.clone()
    penalty = weight * ((mean.mean() - mean) ** 2).mean()
    logits = (h * h).sum(1) - 20
    (F.binary_cross_entropy_with_logits(logits, y.double()) + penalty).backward()  # type: ignore[no-untyped-call]
    out = batch_pass(a.detach(), y, config=config, coupling=Peer(weight), running_mean=state,
                     want_da=True)
    for ours, theirs in ((out.da, a.grad), (out.penalty, penalty), (state, mean)):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


SHAPES = {
    "conv": (3, 20, 8, 8), "odd-spatial": (5, 20, 7, 5), "one-sample": (1, 20, 4, 4),
    "linear": (7, 20), "two-rows": (2, 36), "one-pixel": (4, 20, 1, 1), "1d": (2, 20, 9),
    "sixteen": (2, 20, 4, 4), "one-above": (2, 20, 17, 1), "above-a-block": (2, 8, 65, 33),
    "narrow": (3, 4, 6, 6), "rows-paired-16": (2, 8, 6, 16), "rows-paired-8": (2, 8, 10, 8),
}


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_dtypes_layouts(shape: tuple[int, ...], dtype: torch.dtype,
                               layout: torch.memory_format) -> None:
    pools = ("none", "max2") if len(shape) == 4 and min(shape[2:]) > 1 else ("none",)
    for goodness in ("mean", "mean_sq", "sum_sq"):
        for pool in pools:
            for order in ORDERS:
                config = settings(goodness=goodness, pool=pool)
                coupling = BatchNorm(order=order)  # type: ignore[arg-type]
                check(draw(shape, config, coupling, dtype=dtype, layout=layout), config, coupling,
                      "cpu")


@pytest.mark.parametrize("case", cases())
def test_the_other_back_ends_cases(case: str) -> None:
    cases()[case].check("cpu", "cpu")


@pytest.mark.parametrize("goodness", ["mean", "sum_sq", "mean_sq"])
@pytest.mark.parametrize("loss", [ce(), cwc(0.5), pvn(), pvn(0.3, "sum"), cwg(), sparsemax(),
                                  margin(2)], ids=lambda loss: f"{loss.name}-{loss.reduction}")
def test_losses(loss: Any, goodness: Any) -> None:
    config = settings(groups=(0, 1, 4, 17, 20), loss=loss, goodness=goodness)
    check(draw((5, 20, 3, 4), config, BatchNorm()), config, BatchNorm(), "cpu")


@pytest.mark.parametrize("loss", [threshold(), threshold(0.4, False, "sum"), bce(64.0), symba()],
                         ids=lambda loss: loss.name)
def test_losses_of_one_goodness(loss: Any) -> None:
    config = settings(groups=1, loss=loss, goodness="mean_sq")
    check(draw((6, 20, 4, 4), config, BatchNorm(), layout=CL), config, BatchNorm(), "cpu")


def test_a_loss_in_python_gives_what_the_built_in_one_gives() -> None:
    def own(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(g, y, reduction="none")

    config = settings(loss=own, goodness="mean_sq")
    check(draw((5, 20, 3, 4), config, BatchNorm()), config, BatchNorm(), "cpu")


@LAYOUTS
@ORDER
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("mode", ["evaluation", "running"])
def test_running_statistics(mode: str, affine: bool, order: Any,
                            layout: torch.memory_format) -> None:
    coupling = BatchNorm(order=order, use_running=mode == "running")
    for pool in ("none", "max2"):
        for relu in ("masked", "straight_through"):
            config = settings(goodness="mean_sq", pool=pool, relu_gradient=relu)
            given = draw((3, 20, 5, 6), config, coupling, layout=layout, affine=affine)
            check(given, config, coupling, "cpu", training=mode == "running")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for layout in (NCHW, CL):
        for pool in ("none", "max2"):
            for order in ORDERS:
                config, coupling = settings(pool=pool), BatchNorm(order=order)  # type: ignore[arg-type]
                for shape in ((3, 36, 9, 6), (5, 8, 7, 4), (5, 8, 6, 8), (5, 8, 6, 16)):
                    given = draw(shape, config, coupling, dtype=dtype, layout=layout)
                    check(given, config, coupling, "cpu")
    config = peer_settings()
    check(draw((5, 37), config, Peer(), dtype=dtype), config, Peer(), "cpu")


@LAYOUTS
def test_shifted_data(layout: torch.memory_format) -> None:
    for shape in ((4, 20, 16, 16), (3, 20, 65, 33), (64, 20)):
        config = settings()
        check(draw(shape, config, BatchNorm(), layout=layout, shift=1000.0), config, BatchNorm(),
              "cpu")


@LAYOUTS
@ORDER
def test_dead_and_constant_channels(order: Any, layout: torch.memory_format) -> None:
    """Variance 0 in every channel of the first two groups; ties everywhere."""
    coupling = BatchNorm(order=order)
    for relu in ("masked", "straight_through"):
        config = settings(pool="max2", goodness="mean_sq", relu_gradient=relu)
        given = draw((3, 20, 4, 6), config, coupling, layout=layout)
        given.a[:, :5] = -1.0
        given.a[:, 5:10] = 2.0
        given.a[:, 10:] = given.a[:, 10:].round()
        check(given, config, coupling, "cpu")


@LAYOUTS
def test_threads_change_no_bit(layout: torch.memory_format) -> None:
    config, coupling = settings(goodness="mean_sq", pool="max2"), BatchNorm(order="norm_pool")
    runs = []
    for threads in (1, 2, 5):
        C.set_num_threads(threads)
        given = draw((7, 20, 33, 31), config, coupling, layout=layout)
        runs.append([*batch_pass(given.a, given.y, config=config, coupling=coupling, want_da=True,
                                 backend="cpu", **given.vectors), *given.vectors.values()])
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert one is None or isinstance(one, float) or torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_a(dtype: torch.dtype) -> None:
    for coupling, config, shape in ((BatchNorm(), settings(goodness="mean_sq"), (3, 20, 6, 6)),
                                  (Peer(), peer_settings(), (6, 20))):
        for layout in (NCHW, CL):
            given, again = (draw(shape, config, coupling, dtype=dtype, layout=layout)
                            for _ in range(2))
            apart = batch_pass(given.a, given.y, config=config, coupling=coupling, want_da=True,
                               backend="cpu", **given.vectors)
            over = batch_pass(again.a, again.y, config=config, coupling=coupling, want_da=True,
                              out=again.a, backend="cpu", **again.vectors)
            assert over.z is again.a
            for name in ("z", "g", "loss", "coef", "da", "dgamma", "penalty"):
                one, other = getattr(apart, name), getattr(over, name)
                assert one is None or torch.equal(one, other), name


def test_only_what_is_asked_for() -> None:
    config, coupling = settings(pool="max2"), BatchNorm(order="norm_pool")
    full: Any = None
    for want_z in (True, False):
        for want_da in (True, False):
            given = draw((3, 20, 5, 6), config, coupling)
            part = batch_pass(given.a, given.y, config=config, coupling=coupling, want_z=want_z,
                              want_da=want_da, backend="cpu", **given.vectors)
            full = full or part
            assert (part.z is None) == (not want_z) and (part.da is None) == (not want_da)
            assert part.dgamma is not None and torch.equal(part.dgamma, full.dgamma)
            assert part.z is None or torch.equal(part.z, full.z)
            assert part.da is None or torch.equal(part.da, full.da)
    given = draw((3, 20, 5, 6), config, coupling)
    given.y = None
    assert check(given, config, coupling, "cpu").loss is None


def test_peer_without_positive_rows_and_with_nan() -> None:
    config = peer_settings()
    given = draw((4, 20), config, Peer())
    assert given.y is not None
    given.y.zero_()
    before = given.vectors["running_mean"].clone()
    check(given, config, Peer(), "cpu")
    assert torch.equal(given.vectors["running_mean"], before)
    given = draw((4, 20), config, Peer())
    assert given.y is not None
    given.y.fill_(1)
    given.a[2, 3] = float("nan")
    check(given, config, Peer(), "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_rows(backend: str) -> None:
    for coupling, config, shape in ((BatchNorm(), settings(), (0, 20, 4, 4)),
                                  (Peer(), peer_settings(), (0, 20))):
        given = draw(shape, config, coupling)
        before = given.vectors["running_mean"].clone()
        out = batch_pass(given.a, given.y, config=config, coupling=coupling, want_da=True,
                         backend=backend, **given.vectors)
        assert out.z is not None and out.z.shape == shape and out.g.shape[0] == 0
        assert torch.equal(given.vectors["running_mean"], before)


def test_sliced_and_permuted_inputs() -> None:
    config = settings()
    base = torch.randn(4, 40, 6, 6)
    for a in (base[:, ::2], base[:, 20:], base[1:3, :20], base[:, :20].transpose(2, 3)):
        given = draw(tuple(a.shape), config, BatchNorm())
        check(Inputs(a, given.y, given.vectors), config, BatchNorm(), "cpu")


def test_fp64_goes_to_the_reference() -> None:
    config = settings()
    given = draw((3, 20, 4, 4), config, BatchNorm()).to(torch.float64)
    out = batch_pass(given.a, given.y, config=config, coupling=BatchNorm(), **given.vectors)
    assert out.g.dtype is torch.float64
    with pytest.raises(ValueError, match="no float64 kernels"):
        batch_pass(given.a, config=config, coupling=BatchNorm(), backend="cpu")


A = torch.randn(4, 20, 4, 4)
V = torch.ones(20)
NONE = settings()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"config": LocalPassConfig(groups=4)}, r"norm must be none, got group"),
    ({"config": settings(dropout=Dropout(0.2))}, r"expected no dropout, got p=0.2"),
    ({"config": settings(blend=0.7)}, r"expected no blend, got blend=0.7"),
    ({"a": A[:, :, 0, 0], "config": settings(pool="max2")}, r"max2 pooling needs \(N, C, H >= 2"),
    ({"gamma": torch.ones(19), "beta": V}, r"gamma must be \(20,\) torch.float32 on cpu, got"),
    ({"gamma": V.double(), "beta": V}, r"gamma must be .* got \(20,\) torch.float64"),
    ({"gamma": V}, r"gamma and beta both or neither, got one"),
    ({"running_mean": V}, r"running_mean and running_var both or neither, got one"),
    ({"training": False}, r"expected running statistics where .* got None"),
    ({"coupling": BatchNorm(use_running=True)}, r"expected running statistics where .* got None"),
    ({"a": A[:1, :, :1, :1]}, r"more than one value a channel, got \(1, 20, 1, 1\)"),
    ({"a": A[:1, :, :2, :2], "config": settings(pool="max2")}, r"more than one value a channel"),
    ({"coupling": Peer(), "running_mean": V}, r"linear layers: a must be \(N, C\), got \(4, 20"),
    ({"a": A[:, :, 0, 0], "coupling": Peer(), "running_mean": V},
     r"positive and negative rows, got"),
    ({"a": A[:, :, 0, 0], "coupling": Peer(), "config": peer_settings()},
     r"Peer takes running_mean"),
    ({"out": A.double()}, r"out must be \(4, 20, 4, 4\) torch.float32"),
    ({"y": torch.full((4,), 9)}, r"labels must lie in \[0, 4\), got 9"),
    ({"backend": "fpga"}, r"backend must be one of"),
], ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_bad_input_is_one_line(arguments: dict[str, Any], message: str) -> None:
    given = {"a": A, "config": NONE, "coupling": BatchNorm(), **arguments}
    with pytest.raises(ValueError, match=message) as error:
        batch_pass(given.pop("a"), **given)
    assert "\n" not in str(error.value)


def test_bad_types_are_one_line() -> None:
    with pytest.raises(TypeError, match="floating-point tensor, got"):
        batch_pass(torch.ones(2, 3, dtype=torch.int64), config=NONE, coupling=BatchNorm())
    with pytest.raises(TypeError, match="coupling must be BatchNorm or Peer, got str"):
        batch_pass(A, config=NONE, coupling="peer")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Peer in training needs positive rows"):
        batch_pass(A[:, :, 0, 0], config=peer_settings(), coupling=Peer(), running_mean=V)
    with pytest.raises(ValueError, match="order must be norm_pool or pool_norm, got 'both'"):
        BatchNorm(order="both")  # type: ignore[arg-type]


def test_backward_through_it_explains_itself() -> None:
    out = batch_pass(A.clone().requires_grad_(), torch.zeros(4, dtype=torch.int64), config=NONE,
                     coupling=BatchNorm())
    assert out.loss is not None
    with pytest.raises(RuntimeError, match="local by design"):
        out.loss.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("n", [0, 1, 3])
@LAYOUTS
def test_opcheck(n: int, size: int, phase: int, layout: torch.memory_format) -> None:
    a = torch.randn(n, 8, size, size).contiguous(memory_format=layout)
    call = BatchPassCall(phase, layout is CL, False, False, True, False)
    zeros = torch.zeros
    tensors = BatchPassTensors(a, table=zeros(8), moments=zeros(2, n, 8)) if phase == 0 else (
        BatchPassTensors(a, table=zeros(5, 8), weight=zeros(n, 8), z=torch.zeros_like(a),
                         da=torch.zeros_like(a)))
    torch.library.opcheck(torch.ops.ffengine.batch_pass.default,
                          ("cpu", *pack(run_batch.parts, (tensors, call))))


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a break at the loss: its gradient is autograd's own, which the tracer leaves alone."""
    monkeypatch.undo()  # the tracer cannot guard on the suite's poisoned torch.empty
    config, results = settings(goodness="mean_sq"), []

    def call(a: torch.Tensor, y: torch.Tensor, **vectors: torch.Tensor) -> Any:
        return batch_pass(a, y, config=config, coupling=BatchNorm(), want_da=True, backend="cpu",
                          **vectors)[:5]

    for run in (call, torch.compile(call, backend="aot_eager")):
        given = draw((3, 8, 4, 4), config, BatchNorm(), layout=CL)
        results.append([*run(given.a, given.y, **given.vectors), *given.vectors.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 40, 16, 16), (64, 40, 3, 3), (256, 400)], ids=str)
@pytest.mark.parametrize("goodness", ["mean", "mean_sq"])
def test_declared_bytes_are_the_bytes_held(goodness: Any, shape: tuple[int, ...],
                                           dtype: torch.dtype,
                                           layout: torch.memory_format) -> None:
    pools = ("none",) if len(shape) == 2 else ("none", "max2")
    for pool in pools:
        for want in (True, False):
            config, coupling = settings(goodness=goodness, pool=pool), BatchNorm(order="norm_pool")
            given = draw(shape, config, coupling, dtype=dtype, layout=layout)

            def call(given: Inputs = given, config: LocalPassConfig = config,
                     coupling: BatchNorm = coupling, want: bool = want) -> Any:
                return batch_pass(given.a, given.y, config=config, coupling=coupling, want_z=want,
                                  want_da=want, backend="cpu", **given.vectors)

            call()
            declared: list[int] = []
            with listening(declared.append), allocator_events() as events:
                r = call()
            outputs = sum(t.untyped_storage().nbytes() for t in (r.z, r.da) if t is not None)
            bound = extra_bytes(shape, dtype, config, coupling, want_z=want, want_da=want,
                                channels_last=layout is CL and len(shape) == 4)
            held = events.peak - outputs
            # the arithmetic between the sweeps is torch's: a bound, and not a loose one
            assert held <= bound + 8 * (4 * shape[0] * 4 + 8 * shape[1])
            assert bound <= 1.35 * (held + max(declared))


def test_bytes_moved_counts_two_reads() -> None:
    config, shape = settings(), (6, 40, 8, 8)
    maps, small, plane = 4 * 6 * 40 * 64, 4 * 6 * (2 * 4 + 1), 4 * 6 * 40
    assert bytes_moved(shape, torch.float32, config, BatchNorm()) == 4 * maps + small + 6 * plane
    pooled = settings(pool="max2")
    assert bytes_moved(shape, torch.float32, pooled, BatchNorm(order="norm_pool"),
                       want_da=False) == 2 * maps + maps // 4 + small + 8 * plane
