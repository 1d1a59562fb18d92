"""The C++ back-end of local_pass against the fp64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close

from ffengine.ops import backends
from ffengine.ops.config import (
    Dropout,
    LocalPassConfig,
    Norm,
    Tile,
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
from ffengine.ops.local_pass import LocalPassOutput, local_pass
from ffengine.reference import local_pass as reference

C = backends.extension()
assert C is not None, "the suite tests the C++ kernels: build them first"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CL, NCHW = torch.channels_last, torch.contiguous_format
DROP = Dropout(0.3, seed=(7 << 40) + 5, layer=3, step=11)
UNEQUAL = (0, 1, 4, 17, 20)


def config(**settings: Any) -> LocalPassConfig:
    settings.setdefault("groups", 4)
    return LocalPassConfig(**settings)


def inputs(shape: tuple[int, ...], cfg: LocalPassConfig, dtype: torch.dtype = torch.float32,
           layout: torch.memory_format = NCHW, shift: float = 0.0,
           ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(a, y, optional tensors) for a config, drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(sum(shape) + 1)
    a = (torch.randn(shape, generator=draw) + shift).to(dtype)
    a = a.contiguous(memory_format=layout) if len(shape) == 4 else a
    k = len(cfg.offsets(shape[1])) - 1
    top = 2 if getattr(cfg.loss, "binary", False) else k
    y = torch.randint(0, top, shape[:1], generator=draw)
    more: dict[str, Any] = {}
    if cfg.blend != 1.0:
        size = (*shape[:2], *(s // 2 for s in shape[2:])) if cfg.pool == "max2" else shape
        previous = torch.randn(size, generator=draw).to(dtype)
        more["h_prev"] = previous.contiguous(memory_format=layout) if len(shape) == 4 else previous
    return a, y, more


def check(a: torch.Tensor, y: torch.Tensor | None, cfg: LocalPassConfig,
          tile: Tile | None = None, **more: Any) -> LocalPassOutput:
    """Run the kernel and hold every result to the tolerance rule; inputs must not change."""
    tile = tile or Tile()
    given = [t for t in (a, y, *more.values()) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in given]
    out = local_pass(a, y, config=cfg, want_da=True, tile=tile, backend="cpu", **more)
    for t, old in zip(given, before, strict=True):
        assert torch.equal(t.nan_to_num(), old.nan_to_num()), "an input changed"
    wide = {k: v.double() for k, v in more.items()}
    arguments: dict[str, Any] = {
        "config": cfg, "want_da": True, "tile": tile, "da_scale": out.da_scale}
    exact = reference.local_pass(a.double(), y, **arguments, **wide)
    same = reference.local_pass(a, y, **arguments, **more)
    numel = a[0].numel() if a.shape[0] else 1
    for name, got, want, rough in zip(LocalPassOutput._fields, out, exact, same, strict=False):
        assert (got is None) == (want is None), name
        if want is not None:
            assert_close(got, want, rough, reduction=numel, what=name)
    return out


SHAPES = {
    "conv": (3, 20, 8, 8), "odd-spatial": (5, 20, 7, 5), "one-pixel": (4, 20, 1, 1),
    "linear": (3, 20), "one-above-a-row": (2, 20, 13, 5), "above-a-block": (2, 20, 65, 33),
    "1d": (2, 20, 9), "empty": (0, 20, 4, 4), "one-sample": (1, 20, 4, 4),
}


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_dtypes_layouts(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    for settings in ({}, {"dropout": DROP}, {"goodness": "mean_sq", "norm": Norm("length")}):
        cfg = config(**settings)
        a, y, more = inputs(shape, cfg, dtype, layout)
        check(a, y, cfg, **more)


LOSSES = {
    "ce": ce(), "cwc": cwc(0.5), "pvn": pvn(), "pvn-sum": pvn(0.3, "sum"), "cwg": cwg(),
    "sparsemax": sparsemax(), "margin": margin(2), "ce-sum": ce("sum"),
}
ONE_GOODNESS = {
    "threshold": threshold(), "minimise": threshold(0.4, False, "sum"), "bce": bce(640.0),
    "symba": symba(),
}


@pytest.mark.parametrize("goodness", ["mean", "sum_sq", "mean_sq"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(loss: Any, goodness: Any) -> None:
    cfg = config(groups=UNEQUAL, loss=loss, goodness=goodness, norm=Norm("none"))
    a, y, more = inputs((5, 20, 3, 4), cfg)
    check(a, y, cfg, g0=torch.linspace(-1, 1, 20).view(5, 4), **more)


@pytest.mark.parametrize("goodness", ["mean", "sum_sq", "mean_sq"])
@pytest.mark.parametrize("loss", ONE_GOODNESS.values(), ids=ONE_GOODNESS)
def test_losses_of_one_goodness(loss: Any, goodness: Any) -> None:
    for layout in (NCHW, CL):
        cfg = config(groups=1, loss=loss, goodness=goodness, dropout=DROP)
        a, y, more = inputs((6, 20, 4, 8), cfg, layout=layout)
        check(a, y, cfg, **more)


NORMS = (
    Norm("none"), Norm("group"), Norm("layer", eps=1e-3),
    *(Norm("length", 1e-4, kind, scope) for kind in ("l2", "rms") for scope in ("sample", "group")),
)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: f"{n.kind}-{n.length}-{n.scope}")
@pytest.mark.parametrize("groups", [1, UNEQUAL, 20], ids=["one", "unequal", "a-channel-each"])
def test_norms(norm: Norm, groups: Any) -> None:
    for layout in (NCHW, CL):
        for goodness in ("mean", "mean_sq"):
            cfg = config(groups=groups, norm=norm, goodness=goodness)
            a, y, more = inputs((3, 20, 6, 6), cfg, layout=layout)
            check(a, y, cfg, **more)


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("straight", ["masked", "straight_through"])
@pytest.mark.parametrize("goodness", ["mean", "sum_sq"])
def test_pool_blend_dropout(
    goodness: Any, straight: Any, layout: torch.memory_format
) -> None:
    for shape in ((3, 20, 4, 6), (2, 20, 7, 5), (2, 20, 2, 3), (3, 20, 9, 9)):
        for pool in ("none", "max2"):
            for blend in (1.0, 0.7):
                for drop in (Dropout(), DROP):
                    cfg = config(goodness=goodness, relu_gradient=straight, pool=pool, blend=blend,
                                 dropout=drop, groups=UNEQUAL)
                    a, y, more = inputs(shape, cfg, layout=layout)
                    check(a, y, cfg, **more)


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
def test_ties_in_the_pool_go_to_the_first_in_row_major_order(layout: torch.memory_format) -> None:
    cfg = config(pool="max2", goodness="mean", relu_gradient="straight_through")
    a = torch.randint(-1, 2, (4, 20, 6, 6)).float().contiguous(memory_format=layout)
    check(a, torch.tensor([0, 1, 2, 3]), cfg)
    check(-a, torch.tensor([0, 1, 2, 3]), cfg)  # zeros with a sign are alive too


def test_many_groups() -> None:
    for shape in ((2, 1000), (2, 1000, 2, 2), (1, 3000, 3, 1)):
        for layout in (NCHW, CL):
            cfg = config(groups=1000)
            a, y, more = inputs(shape, cfg, layout=layout)
            check(a, y, cfg, **more)


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
def test_variance_is_centred(layout: torch.memory_format) -> None:
    for shape in ((2, 20, 32, 32), (2, 20, 1, 1), (2, 20, 65, 33)):
        for norm in (Norm(), Norm("layer")):
            cfg = config(norm=norm)
            a, y, more = inputs(shape, cfg, layout=layout, shift=1000.0)
            check(a, y, cfg, **more)


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
def test_dropout_mask_is_the_reference_mask(layout: torch.memory_format) -> None:
    """Bit for bit, for every layout, thread count, instruction set and tile split."""
    shapes = ((6, 20, 4, 4), (6, 300, 8, 8), (6, 10, 7, 3), (6, 33), (6, 3, 5, 1), (4, 7, 1, 9))
    for shape in shapes:
        cfg = config(groups=1, norm=Norm("none"), dropout=DROP)
        a = torch.ones(shape)
        a = a.contiguous(memory_format=layout) if a.dim() == 4 else a
        keep = reference.dropout_keep(DROP, shape, Tile(), a.device)
        for isa in C.isas():
            C.set_isa(isa)
            for threads in (1, 2, 5):
                C.set_num_threads(threads)
                z = local_pass(a, config=cfg, backend="cpu").z
                assert torch.equal(z != 0, keep)
        start, rows = 1, shape[0]
        tile = local_pass(a[start:start + 2], config=cfg, tile=Tile(start, rows), backend="cpu").z
        assert torch.equal(tile != 0, keep[start:start + 2])
        pair = torch.cat([a[1:2], a[1:2]])
        tile = local_pass(pair, config=cfg, tile=Tile(1, rows, paired=True), backend="cpu").z
        assert torch.equal(tile != 0, keep[[1, rows // 2 + 1]])


def test_dropout_counter_goes_past_32_bits() -> None:
    rows = 2**36
    cfg = config(groups=1, norm=Norm("none"), dropout=DROP)
    for layout in (NCHW, CL):
        a = torch.ones(2, 20, 4, 4).contiguous(memory_format=layout)
        tile = Tile(rows - 2, rows)
        keep = reference.dropout_keep(DROP, tuple(a.shape), tile, a.device)
        assert torch.equal(local_pass(a, config=cfg, tile=tile, backend="cpu").z != 0, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for layout in (NCHW, CL):
        for settings in ({}, {"dropout": DROP, "goodness": "mean_sq"}, {"pool": "max2"}):
            cfg = config(**settings)
            a, y, more = inputs((3, 20, 13, 6), cfg, dtype, layout)
            check(a, y, cfg, **more)


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
def test_threads_and_tiles_do_not_change_a_bit(layout: torch.memory_format) -> None:
    cfg = config(dropout=DROP)
    a, y, _ = inputs((7, 20, 33, 31), cfg, layout=layout)
    runs = []
    for threads in (1, 2, 3, 16):
        C.set_num_threads(threads)
        runs.append(local_pass(a, y, config=cfg, want_da=True, backend="cpu"))
    parts = [local_pass(a[s:t], y[s:t], config=cfg, want_da=True, tile=Tile(s, 7), backend="cpu")
             for s, t in ((0, 1), (1, 5), (5, 7))]
    runs.append(LocalPassOutput(*(torch.cat(p) for p in list(zip(*parts, strict=True))[:5])))
    for run in runs[1:]:
        for name, one, other in zip(LocalPassOutput._fields[:5], runs[0], run, strict=False):
            assert torch.equal(one, other), name


def test_a_paired_tile_is_the_whole_batch_s() -> None:
    cfg = config(groups=1, loss=symba(), goodness="mean_sq", dropout=DROP)
    a, y, _ = inputs((8, 20, 4, 4), cfg)
    whole = local_pass(a, y, config=cfg, want_da=True, backend="cpu")
    rows = torch.tensor([1, 2, 5, 6])
    part = local_pass(a[rows], y[rows], config=cfg, want_da=True,
                      tile=Tile(1, 8, paired=True), backend="cpu")
    assert torch.equal(part.loss, whole.loss[1:3])
    for name in ("z", "g", "coef", "da"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_a_loss_in_python_gives_what_the_built_in_one_gives() -> None:
    def own(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(g, y, reduction="none")

    for layout in (NCHW, CL):
        for settings in ({"dropout": DROP}, {"pool": "max2"}, {"goodness": "mean_sq"}):
            cfg = config(loss=own, **settings)
            a, y, more = inputs((4, 20, 6, 6), cfg, layout=layout)
            check(a, y, cfg, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_a(dtype: torch.dtype) -> None:
    for layout in (NCHW, CL):
        for drop in (Dropout(), DROP):
            cfg = config(dropout=drop)
            a, y, _ = inputs((3, 20, 6, 6), cfg, dtype, layout)
            apart = local_pass(a, y, config=cfg, want_da=True, backend="cpu")
            over = a.clone(memory_format=torch.preserve_format)
            result = local_pass(over, y, config=cfg, want_da=True, out=over, backend="cpu")
            assert result.z is over
            for name in ("z", "g", "loss", "coef", "da"):
                assert torch.equal(getattr(result, name), getattr(apart, name)), name


def test_only_what_is_asked_for() -> None:
    cfg = config()
    a, y, _ = inputs((3, 20, 6, 6), cfg)
    full = local_pass(a, y, config=cfg, want_da=True, backend="cpu")
    for want_z in (True, False):
        for want_da in (True, False):
            for goodness in ("mean", "mean_sq"):
                part = local_pass(a, y, config=config(goodness=goodness), want_z=want_z,
                                  want_da=want_da, backend="cpu")
                assert (part.z is None) == (not want_z) and (part.da is None) == (not want_da)
                if goodness == "mean" and want_da:
                    assert torch.equal(part.da, full.da)
    no_loss = local_pass(a, config=cfg, backend="cpu")
    assert no_loss.loss is None and no_loss.coef is None and torch.equal(no_loss.z, full.z)


def test_fp16_gradients_of_a_large_batch_stay_normal() -> None:
    cfg = config(groups=10)
    a, y, _ = inputs((1024, 20, 8, 8), cfg, torch.float16, CL)
    out = check(a, y, cfg)
    assert out.da_scale > 1
    live = out.da[out.da != 0].abs().float()
    assert live.min() > torch.finfo(torch.float16).tiny and live.max() < 2.0


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("settings", [
    {}, {"dropout": DROP}, {"pool": "max2"}, {"goodness": "mean_sq"}, {"norm": Norm("layer")},
    {"goodness": "mean_sq", "norm": Norm("length")},
], ids=["plain", "dropout", "pool", "squares", "layer", "length"])
def test_nan_reaches_every_result(settings: dict[str, Any], layout: torch.memory_format) -> None:
    for dtype in DTYPES:
        for position in ((1, 3, 0, 0), (1, 3, 2, 5), (1, 3, 3, 3)):
            cfg = config(**settings)
            a, y, _ = inputs((3, 20, 4, 6), cfg, dtype, layout)
            a[position] = float("nan")
            out = local_pass(a, y, config=cfg, want_da=True, backend="cpu")
            assert out.g[1, 0].isnan() and out.loss[1].isnan() and out.coef[1].isnan().all()
            pooled = (1, 3, position[2] // 2, position[3] // 2)
            assert out.z[pooled if cfg.pool == "max2" else position].isnan()
            for row in (0, 2):
                assert not any(t[row].isnan().any() for t in out[:5])


def test_infinity_is_not_lost() -> None:
    a = torch.zeros(1, 20, 4, 4)
    a[0, 7, 1, 1] = float("inf")
    g = local_pass(a, config=config(), backend="cpu").g
    assert not g[0, 1].isfinite() and g[0, 0] == 0


def test_sliced_and_permuted_inputs() -> None:
    cfg = config()
    base = torch.randn(4, 40, 6, 6)
    for a in (base[:, ::2], base[:, 20:], base[1:3, :20], base[:, :20].transpose(2, 3)):
        check(a, torch.arange(a.shape[0]) % 4, cfg)


def test_rounding_to_16_bits_is_torch_s() -> None:
    """Every bf16 and fp16 value in, and the values half way between them out, ties included."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every > 0]
        a = every.view(1, -1)
        cfg = config(groups=1, norm=Norm("none"))
        for isa in C.isas():
            C.set_isa(isa)
            assert torch.equal(local_pass(a, config=cfg, backend="cpu").z, a)
            for beta in (0.5, 0.375):
                other = a.roll(1, 1)
                other[other.isinf()] = 0
                z = local_pass(a, config=config(groups=1, norm=Norm("none"), blend=beta),
                               h_prev=other, backend="cpu").z
                want = torch.addcmul(other.float() * (1 - beta), a.float(), torch.tensor(beta))
                finite = want.isfinite()
                assert torch.equal(z[finite], want.to(dtype)[finite])
