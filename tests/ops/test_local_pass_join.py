"""`local_pass` with a shortcut added to z, with z as a slice of a wider map, with a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ffengine.ops.config import Dropout, LocalPassConfig, Norm
from ffengine.ops.layout import map_channels
from ffengine.ops.local_pass import local_pass
from tests.tolerances import assert_close

SHAPES = {
    "map": (3, 20, 5, 6), "pixels": (2, 100, 4, 4), "odd": (3, 10, 3, 3), "linear": (5, 40),
    "pooled": (2, 20, 6, 5), "pairs": (2, 40, 8, 8),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def given(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format,
          device: str) -> tuple[torch.Tensor, torch.Tensor, LocalPassConfig]:
    generator = torch.Generator().manual_seed(1)
    layout = layout if len(shape) == 4 else torch.contiguous_format
    config = LocalPassConfig(groups=10, norm=Norm("group"),
                             pool="max2" if shape == SHAPES["pooled"] else "none",
                             dropout=Dropout(0.25, seed=3, layer=1, step=2)
                             if shape == SHAPES["pairs"] else Dropout())
    a = torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=layout)
    y = torch.arange(shape[0], device=device) % 10
    return a, y, config


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("wide", [False, True], ids=["dense", "slice"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "shortcut"])
@pytest.mark.parametrize("backend", ["reference", "cpu", *(
    pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda"))])
def test_join(backend: str, joined: bool, wide: bool, shape: tuple[int, ...], dtype: torch.dtype,
              layout: torch.memory_format) -> None:
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    check_join(backend, device, given(shape, dtype, layout, device), layout, joined,
               (12, 12) if wide else (0, 0))


def check_join(backend: str, device: str, drawn: tuple[torch.Tensor, torch.Tensor, LocalPassConfig],
               layout: torch.memory_format, joined: bool, beside: tuple[int, int]) -> None:
    """Against fp64; nothing of the map's channels `beside` the slice, before and after it, is
    written, and no other result sees the join."""
    a, y, config = drawn
    shape, dtype, (before, after) = tuple(a.shape), a.dtype, beside
    plain = local_pass(a, y, config=config, want_da=True, backend=backend)
    assert plain.z is not None
    generator = torch.Generator().manual_seed(2)
    shortcut = None
    if joined:
        shortcut = torch.randn(plain.z.shape, generator=generator).to(a)
        shortcut = shortcut.contiguous(memory_format=layout if a.dim() == 4
                                       else torch.contiguous_format)
    around = torch.full((shape[0], before + shape[1] + after, *plain.z.shape[2:]), 7.0,
                        dtype=dtype, device=device)
    if a.dim() == 4:
        around = around.contiguous(memory_format=layout)
    out = around[:, before:before + shape[1]] if before or after else around
    made = local_pass(a, y, config=config, want_da=True, shortcut=shortcut, out=out,
                      backend=backend)
    assert made.z is out
    rest = torch.cat([around[:, :before], around[:, before + shape[1]:]], 1)
    assert torch.equal(rest, torch.full_like(rest, 7.0))
    for ours, alone in ((made.g, plain.g), (made.loss, plain.loss), (made.da, plain.da)):
        assert torch.equal(ours, alone)  # type: ignore[arg-type]
    exact, same = (local_pass(a.cpu().to(t), y.cpu(), config=config, backend="reference",
                              shortcut=None if shortcut is None else shortcut.cpu().to(t)).z
                   for t in (torch.float64, dtype))
    assert exact is not None and same is not None
    assert_close(out.cpu(), exact, same, reduction=a[0].numel())


@pytest.mark.parametrize("backend", ["reference", "cpu", *(
    pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda"))])
def test_clock_is_the_step_of_dropout(backend: str) -> None:
    check_clock(backend, "cuda" if backend in ("triton", "cuda") else "cpu", (4, 20, 3, 3))


def check_clock(backend: str, device: str, shape: tuple[int, ...]) -> None:
    a, y, config = given(shape, torch.float32, torch.channels_last, device)
    config = replace(config, dropout=Dropout(0.3, seed=5, layer=2, step=0))
    clock = torch.tensor([9], dtype=torch.int32, device=device)
    ours = local_pass(a, y, config=config, clock=clock, want_da=True, backend=backend)
    config = replace(config, dropout=replace(config.dropout, step=9))
    told = local_pass(a, y, config=config, want_da=True, backend=backend)
    assert torch.equal(ours.z, told.z) and torch.equal(ours.da, told.da)  # type: ignore[arg-type]


def test_map_channels() -> None:
    for layout in LAYOUTS:
        around = torch.empty(2, 30, 4, 5).contiguous(memory_format=layout)
        assert map_channels(around, layout) == 30
        assert map_channels(around[:, 5:15], layout) == 30
        assert map_channels(around[:, :, 1:], layout) is None
        assert map_channels(around[:, ::2], layout) is None
    assert map_channels(torch.empty(4, 50)[:, 10:30], torch.contiguous_format) == 50


def test_refusals() -> None:
    a, y, config = given((4, 20, 3, 3), torch.float32, torch.channels_last, "cpu")
    with pytest.raises(ValueError, match="shortcut expected want_z=True"):
        local_pass(a, y, config=config, shortcut=torch.zeros_like(a), want_z=False)
    with pytest.raises(ValueError, match="another tensor than out"):
        local_pass(a, y, config=config, shortcut=a, out=a)
    with pytest.raises(ValueError, match=r"shortcut must be \(4, 20, 3, 3\)"):
        local_pass(a, y, config=config, shortcut=a[:2])
    with pytest.raises(ValueError, match="clock must be one int32"):
        local_pass(a, y, config=config, clock=torch.zeros(1))
