"""Cases of local_pass for the CUDA kernels, each with the reason it is here, and their check.

The same cases go to the device (test_local_pass_cuda.py) and to the same kernels emulated on the
CPU (test_local_pass_emulated.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import assert_close

from ffengine.ops.config import (
    Dropout,
    LocalPassConfig,
    Loss,
    Norm,
    Tile,
    bce,
    cwc,
    cwg,
    margin,
    pvn,
    sparsemax,
    symba,
    threshold,
)
from ffengine.ops.local_pass import LocalPassOutput
from ffengine.reference import local_pass as reference

HALF_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    id: str
    shape: tuple[int, ...]
    config: LocalPassConfig
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    layouts: tuple[str, ...] = ("nchw", "nhwc")
    shift: float = 0.0  # mean of the pre-activations: large ones break E[x²] - E[x]²
    g0: bool = False
    out_is_a: bool = False
    offset: int = 0  # elements the tensor starts past a 16-byte boundary
    tile: Tile = field(default_factory=Tile)


def group(**settings: Any) -> LocalPassConfig:
    return LocalPassConfig(**{"groups": 2, **settings})


ALL = (torch.float32, *HALF_TYPES)
DROP = Dropout(0.3, seed=12345678901, layer=3, step=7)
CASES = [
    Case("plain", (3, 8, 4, 4), group(), ALL),
    Case("long-runs", (2, 8, 32, 32), group(), ALL, shift=3.0),
    Case("odd-pixels", (2, 6, 5, 7), group(groups=3), ALL),
    Case("one-group-a-channel", (2, 12, 3, 3), group(groups=12)),
    Case("row-of-two-pixels", (2, 20, 8, 8), group(groups=5, loss=cwc()), ALL),
    Case("unequal-groups", (3, 10, 4, 4), group(groups=(0, 1, 7, 10)), ALL),
    Case("linear", (5, 40), group(groups=4), ALL, ("nchw",)),
    Case("linear-odd", (3, 35), group(groups=5), ALL, ("nchw",)),
    Case("linear-many-groups", (2, 600), group(groups=300, loss=sparsemax()), ALL, ("nchw",)),
    Case("linear-wide", (2, 5000), group(groups=1, loss=threshold(2.0)), ALL, ("nchw",)),
    Case("wide-pixels", (2, 4200, 1, 3), group(groups=3)),
    Case("many-groups-nhwc", (1, 1500, 2, 2), group(groups=1500)),
    Case("misaligned", (3, 8, 4, 4), group(), ALL, offset=1),
    Case("one-pixel-over", (2, 8, 1, 257), group(), ALL),
    Case("mean-shifted", (2, 16, 8, 8), group(groups=4), shift=1000.0),
    Case("sum-of-squares", (4, 8, 4, 4), group(groups=1, goodness="sum_sq", loss=bce(8.0))),
    Case("mean-of-squares", (4, 8, 4, 4), group(goodness="mean_sq", loss=pvn()), ALL),
    Case("cwg", (4, 12, 4, 4), group(groups=3, goodness="mean_sq", loss=cwg())),
    Case("margin", (4, 12, 4, 4), group(groups=3, loss=margin(1))),
    Case("sparsemax", (4, 40, 2, 2), group(groups=10, loss=sparsemax())),
    Case("symba", (6, 8, 4, 4), group(groups=1, goodness="mean_sq", loss=symba()), ALL),
    Case("threshold-minimise", (4, 8, 4, 4), group(groups=1, loss=threshold(1.0, maximize=False))),
    Case("g0", (3, 8, 4, 4), group(), g0=True),
    Case("in-place", (3, 8, 4, 6), group(), ALL, out_is_a=True),
    Case("layer-norm", (3, 8, 4, 4), group(norm=Norm("layer")), ALL),
    Case("no-norm", (3, 8, 4, 4), group(norm=Norm("none")), ALL),
    Case("rms-sample", (3, 8, 4, 4), group(norm=Norm("length", eps=1e-4))),
    Case("l2-group", (3, 8, 4, 4), group(norm=Norm("length", length="l2", scope="group"))),
    Case("straight-through", (3, 8, 4, 4), group(relu_gradient="straight_through"), ALL),
    Case("dropout", (3, 8, 4, 4), group(dropout=DROP), ALL),
    Case("dropout-odd", (3, 6, 5, 7), group(dropout=DROP), ALL),
    Case("dropout-two-pixels", (2, 20, 8, 8), group(dropout=DROP), ALL),
    Case("dropout-linear", (3, 36), group(dropout=DROP), ALL, ("nchw",)),
    Case("dropout-straight", (3, 8, 4, 4),
         group(dropout=DROP, relu_gradient="straight_through"), ALL),
    Case("dropout-tile", (2, 8, 4, 4), group(dropout=DROP), tile=Tile(5, 16)),
    Case("dropout-pair-tile", (4, 8, 4, 4), group(groups=1, loss=symba(), dropout=DROP),
         tile=Tile(3, 16, paired=True)),
    Case("pool", (3, 8, 6, 4), group(pool="max2", goodness="mean_sq"), ALL),
    Case("pool-odd", (3, 8, 5, 7), group(pool="max2"), ALL),
    Case("pool-dropout", (2, 8, 7, 6), group(pool="max2", dropout=DROP)),
    Case("blend", (3, 32), group(blend=0.7, goodness="mean_sq"), ALL, ("nchw",)),
    Case("blend-pool", (3, 8, 5, 6), group(blend=0.7, pool="max2")),
]
#: Big enough (8 KB a sample) for the one-read kernel.
CLUSTER_CASES = [
    Case("one-block", (3, 20, 16, 16), group(groups=10), ALL),
    Case("several-blocks", (2, 40, 32, 32), group(groups=10), ALL, shift=3.0),
    Case("ragged-slabs", (2, 36, 18, 22), group(groups=3), ALL),
    Case("two-pixel-rows", (2, 100, 16, 16), group(groups=10), ALL),
    Case("unequal", (2, 48, 16, 16), group(groups=(0, 5, 8, 48)), ALL),
    Case("dropout", (2, 40, 16, 16), group(groups=10, dropout=DROP), ALL),
    Case("in-place", (2, 40, 16, 16), group(groups=10), ALL, out_is_a=True),
    Case("layer", (2, 40, 16, 16), group(groups=4, norm=Norm("layer"), loss=cwc()), ALL),
    Case("squares", (2, 40, 16, 16), group(groups=4, goodness="mean_sq", loss=pvn()), ALL),
    Case("one-group", (2, 40, 16, 16), group(groups=1, loss=threshold(2.0)), ALL),
    Case("many-groups", (2, 256, 8, 8), group(groups=128), ALL),
    Case("wide-pixels", (2, 2400, 2, 2), group(groups=10), ALL),
    Case("linear", (3, 4800), group(groups=10), ALL, ("nchw",)),
    Case("straight-through", (2, 40, 16, 16), group(relu_gradient="straight_through"), ALL),
]


def expand(cases: list[Case]) -> list[Any]:
    """(case, dtype, layout) with a readable id."""
    import pytest

    return [pytest.param(c, d, lay, id=f"{c.id}-{str(d).removeprefix('torch.')}-{lay}")
            for c in cases for d in c.dtypes for lay in c.layouts]


def tensors(case: Case, dtype: torch.dtype, layout: str, device: str) -> dict[str, Any]:
    """a, y, g0, h_prev of a case, from a fixed seed."""
    gen = torch.Generator().manual_seed(11)
    n, c = case.shape[:2]
    k = len(case.config.offsets(c)) - 1
    a = torch.randn(case.shape, generator=gen) * 1.5 + case.shift
    h = torch.rand(pooled_shape(case), generator=gen)
    loss = case.config.loss
    y = torch.randint(2 if isinstance(loss, Loss) and loss.binary else k, (n,), generator=gen)
    g0 = torch.randn((n, k), generator=gen).to(device) if case.g0 else None
    return {
        "a": place(a.to(dtype), case.offset, layout, device),
        "y": y.to(device),
        "g0": g0,
        "h_prev": place(h.to(dtype), 0, layout, device) if case.config.blend != 1 else None,
    }


def place(t: torch.Tensor, offset: int, layout: str, device: str) -> torch.Tensor:
    """`t` on the device in this layout, `offset` elements into its storage, NaN all round."""
    nhwc = layout == "nhwc" and t.dim() == 4
    flat = (t.permute(0, 2, 3, 1) if nhwc else t).contiguous()
    guard = 64
    room = torch.full((t.numel() + 2 * guard,), float("nan"), dtype=t.dtype, device=device)
    room[guard + offset:guard + offset + t.numel()] = flat.view(-1).to(device)
    inside = room[guard + offset:guard + offset + t.numel()].view(flat.shape)
    return inside.permute(0, 3, 1, 2) if nhwc else inside


def pooled_shape(case: Case) -> tuple[int, ...]:
    if case.config.pool == "none":
        return case.shape
    return (*case.shape[:2], case.shape[2] // 2, case.shape[3] // 2)


def check(case: Case, dtype: torch.dtype, layout: str, device: str,
          run: Callable[..., LocalPassOutput]) -> None:
    """Runs a case and holds every result to the tolerance rule; inputs must survive."""
    given = tensors(case, dtype, layout, device)
    a, y, g0, h_prev = (given[name] for name in ("a", "y", "g0", "h_prev"))
    before = a.clone()
    out = run(a, y, config=case.config, g0=g0, h_prev=h_prev, want_da=True, tile=case.tile,
              **({"out": a} if case.out_is_a else {}))
    if not case.out_is_a:
        assert torch.equal(a, before), "input changed"

    def expected(wide: bool) -> tuple[Any, ...]:
        cast = torch.float64 if wide else dtype
        return reference.local_pass(
            before.to(cast).cpu(), y.cpu(), config=case.config,
            g0=None if g0 is None else g0.cpu(),
            h_prev=None if h_prev is None else h_prev.to(cast).cpu(),
            want_da=True, tile=case.tile, da_scale=out.da_scale)

    reduction = max(1, before[0].numel())
    for name, kernel, exact, same in zip(
            ("z", "g", "loss", "coef", "da"), out[:5], expected(True), expected(False),
            strict=True):
        assert_close(kernel.cpu(), exact, same, reduction=reduction, what=name)
