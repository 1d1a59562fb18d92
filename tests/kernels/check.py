"""Run one case on a device and hold it to the fp64 reference under the suite's tolerance rule."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ffengine.ops import local_pass as op
from ffengine.ops.config import Dropout, LocalPassConfig, Loss, Tile, da_scale
from ffengine.ops.layout import pooled_shape
from ffengine.reference import local_pass as reference
from tests.kernels.cases import Case
from tests.tolerances import assert_close

#: Elements before and after every buffer: 256 bytes or more, so alignment stays as it would be.
BAND = 128
SENTINEL = 987_654_321


class Banded:
    """A tensor between guard bands of NaN (a sentinel for integers), `offset` elements further."""

    def __init__(self, like: torch.Tensor, fill: bool, offset: int = 0) -> None:
        self.first = BAND + offset
        poison = (math.nan if like.is_floating_point()
                  else SENTINEL & torch.iinfo(like.dtype).max)
        self.store = torch.full((self.first + like.numel() + BAND,), poison, dtype=like.dtype,
                                device=like.device)
        self.view = self.store.as_strided(like.shape, like.stride(), self.first)
        if fill:
            self.view.copy_(like)
        self.before = self.store.clone()

    def bits(self, store: torch.Tensor) -> torch.Tensor:
        return store.view(torch.uint8).view(-1, store.element_size())

    def check(self, name: str, written: bool) -> None:
        """Bands untouched; inputs bit-identical as a whole."""
        same = (self.bits(self.store) == self.bits(self.before)).all(1)
        outside = torch.cat((same[:self.first], same[same.numel() - BAND:]))
        assert outside.all(), f"{name}: written outside its buffer"
        assert written or same.all(), f"{name}: an input was changed"


def draw(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    """The inputs of a case, from a seed."""
    rng = torch.Generator().manual_seed(hash_of(case.id))
    n, k = case.shape[0], len(case.config.offsets(case.shape[1])) - 1
    a = torch.randn(case.shape, generator=rng) + case.shift
    if case.nan:
        a.view(-1)[1] = math.nan
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    a = a.to(case.dtype).to(device).contiguous(memory_format=layout)
    shape_z = pooled_shape(case.shape, case.config)
    h_prev = torch.rand(shape_z, generator=rng).to(case.dtype).to(device)
    binary = isinstance(case.config.loss, Loss) and case.config.loss.binary
    y = torch.randint(0, 2 if binary else k, (n,), generator=rng)
    return {
        "a": a.transpose(1, -1).contiguous().transpose(1, -1) if case.strided else a,
        "y": y.to(device) if case.targets else None,
        "g0": torch.randn(n, k, generator=rng).to(device) if case.g0 else None,
        "h_prev": h_prev.contiguous(memory_format=layout) if case.config.blend != 1.0 else None,
        "shortcut": torch.randn(shape_z, generator=rng).to(case.dtype).to(device).contiguous(
            memory_format=layout) if case.shortcut else None,
    }


def hash_of(text: str) -> int:
    """A seed that, unlike hash(), is the same in every process."""
    return sum((i + 1) * ord(c) for i, c in enumerate(text))


def check(case: Case, device: str) -> None:
    """AssertionError says what is off."""
    data = draw(case, device)
    n = case.shape[0]
    shape_z = pooled_shape(case.shape, case.config)
    k = len(case.config.offsets(case.shape[1])) - 1
    m = max(math.prod(shape_z) // max(n, 1) // k, 1)
    scale = da_scale(case.dtype, case.config.goodness, case.tile.rows(n), m)
    want = {"want_z": case.outputs != "da", "want_da": case.outputs in ("z+da", "da", "z-over-a")}
    runner = through_op if case.public else between_bands
    got = runner(case, data, want, scale)
    exact = truth(case, data, want, scale, torch.float64)
    same = truth(case, data, want, scale, case.dtype)
    sample = math.prod(shape_z[1:])
    whole = case.config.norm.kind == "layer" or case.config.norm.scope == "sample"
    for name, kernel, e, s in zip(("z", "g", "loss", "coef", "da"), got, exact, same, strict=True):
        assert (kernel is None) == (e is None), f"{name}: {kernel} against {e}"
        if kernel is None:
            continue
        nan = e.isnan()
        assert torch.equal(kernel.isnan(), nan), f"{name}: NaN at other places"
        length = max(sample if name == "z" and whole else m, k)
        clean = [t.masked_fill(nan, 0.0) for t in (kernel, e, s)]
        assert_close(*clean, reduction=length, what=name)


def check_rows_alone(channels_last: bool, device: str) -> None:
    """Every row of a batch, alone, gets the bits it got among the others."""
    rng = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = torch.randn(3, 100, 9, 8, generator=rng).to(device).contiguous(memory_format=layout)
    y = torch.tensor([3, 1, 9], device=device)
    config = LocalPassConfig(groups=10, goodness="mean_sq", dropout=Dropout(0.3, 1, 2, 3))
    whole = op.local_pass(a, y, config=config, want_da=True, backend="triton")
    for n in range(3):
        alone = op.local_pass(a[n:n + 1], y[n:n + 1], config=config, want_da=True,
                              tile=Tile(n, 3), backend="triton")
        for what, ours, theirs in zip(alone._fields[:5], alone, whole, strict=False):
            assert torch.equal(ours, theirs[n:n + 1]), f"row {n}: other {what}"


def truth(case: Case, data: dict[str, torch.Tensor | None], want: dict[str, bool], scale: float,
          dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """The reference's results for the same (already rounded) inputs, computed in `dtype`."""
    cast = {k: t if t is None or k == "y" else t.to(dtype) for k, t in data.items()}
    if cast["g0"] is not None and dtype is not torch.float64:
        cast["g0"] = data["g0"]
    return reference.local_pass(cast["a"], cast["y"], config=case.config, g0=cast["g0"],
                                h_prev=cast["h_prev"], shortcut=cast["shortcut"], tile=case.tile,
                                da_scale=scale, **want)


def through_op(case: Case, data: dict[str, torch.Tensor | None], want: dict[str, bool],
               scale: float) -> tuple[torch.Tensor | None, ...]:
    """The public function; `out=a` where the case says so."""
    a = data["a"].clone()
    kept = {name: t.clone() for name, t in data.items() if t is not None}
    result = op.local_pass(
        a, data["y"], config=case.config, g0=data["g0"], h_prev=data["h_prev"], tile=case.tile,
        out=a if case.outputs == "z-over-a" else None, backend="triton", **want)
    assert result.da_scale == scale
    if case.outputs == "z-over-a":
        assert result.z.data_ptr() == a.data_ptr()
    else:
        assert torch.equal(a, kept["a"])
    for name, t in kept.items():
        assert torch.equal(data[name], t), f"{name}: an input was changed"
    return tuple(result[:5])


def between_bands(case: Case, data: dict[str, torch.Tensor | None], want: dict[str, bool],
                  scale: float) -> tuple[torch.Tensor | None, ...]:
    """The back-end itself, every buffer between guard bands and every output NaN at first."""
    config, a = case.config, data["a"]
    beside = {"offsets": torch.tensor(config.offsets(a.shape[1]), device=a.device)}
    if case.clock:
        words = torch.tensor([config.dropout.step], device=a.device)
        beside["clock"] = words.to(torch.int32)  # keeps the low 32 bits
        config = replace(config, dropout=replace(config.dropout, step=0))
    inputs = {name: Banded(t, True) for name, t in {**data, **beside}.items() if t is not None}
    outputs = {name: Banded(t, False)
               for name, t in destinations(a, beside["offsets"], config, case, want).items()}
    empty = dict.fromkeys(op.LocalPassTensors._fields)
    views = {name: b.view for name, b in {**inputs, **outputs}.items()}
    wide = a.shape[1] + sum(case.around)
    whole_z = views.get("z")
    if whole_z is not None:
        views["z"] = whole_z[:, case.around[0]:case.around[0] + a.shape[1]]
    call = op.make_call(a, config, case.tile, scale, 0, case.targets, wide)
    op.run("triton", op.LocalPassTensors(**{**empty, **views}), call)
    if whole_z is not None and wide > a.shape[1]:
        rest = torch.cat([whole_z[:, :case.around[0]],
                          whole_z[:, case.around[0] + a.shape[1]:]], 1)
        assert rest.isnan().all(), "z: written beside its slice"
    for name, banded in inputs.items():
        banded.check(name, written=False)
    for name, banded in outputs.items():
        banded.check(name, written=True)
    return tuple(views.get(name) for name in ("z", "g", "loss", "coef", "da"))


def destinations(a: torch.Tensor, offsets: torch.Tensor, config: LocalPassConfig, case: Case,
                 want: dict[str, bool]) -> dict[str, torch.Tensor]:
    """Shapes of what the call writes."""
    n, k = a.shape[0], offsets.numel() - 1
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    f32 = {"dtype": torch.float32, "device": a.device}
    found = {"g": torch.empty(n, k, **f32), "stats": torch.empty(n, k, 2, **f32)}
    if want["want_z"]:
        n, channels, *size = pooled_shape(tuple(a.shape), config)
        shape_z = (n, channels + sum(case.around), *size)
        found["z"] = torch.empty(shape_z, dtype=a.dtype, device=a.device, memory_format=layout)
    if case.targets:
        paired = config.loss.paired
        found["loss"] = torch.empty(n // 2 if paired else n, **f32)
        found["coef"] = torch.empty(n, k, **f32)
        if want["want_da"]:
            found["da"] = torch.empty_like(a)
    return found
