"""Cases of linear_step, each with the reason it is here, and their check against fp64.

Every back-end takes the same ones: ordinary, in Triton's interpreter, emulated CUDA, a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ffengine.ops import config as c
from ffengine.ops.linear_step import linear_step
from ffengine.ops.optim import OptimConfig, OptimState, Parameter
from tests.tolerances import assert_close

SGD0 = OptimConfig("sgd", lr=0.0)
NONE = c.Norm("none")
L2, RMS = c.Norm("length", eps=1e-4, length="l2"), c.Norm("length", eps=1e-8)
DROP = c.Dropout(0.25, seed=2**63 + 5, layer=2, step=9)


def own(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A researcher's loss."""
    return F.softplus(2 - g.gather(1, y[:, None])[:, 0]) + 0.1 * (g * g).sum(1)


@dataclass(frozen=True)
class Case:
    id: str
    config: c.LocalPassConfig
    shape: tuple[int, int, int] = (37, 70, 36)  # N, in, out: tails of every vector width
    norm: c.Norm = NONE
    bias: bool = True
    g0: bool = False
    strided: bool = False
    tiles: tuple[int | None, ...] = (None, 8)
    #: In 16 bits a sign near 0 may flip where sums are cut otherwise; squares stay close.
    dtypes: tuple[torch.dtype, ...] = field(
        default=(torch.float32, torch.bfloat16, torch.float16))


def one(goodness: Any = "mean_sq", **settings: Any) -> c.LocalPassConfig:
    return c.LocalPassConfig(**{"groups": 1, "goodness": goodness, "loss": c.threshold(0.5),
                                **settings})


def groups(goodness: Any = "mean", **settings: Any) -> c.LocalPassConfig:
    return c.LocalPassConfig(**{"groups": 4, "goodness": goodness, **settings})


F32 = (torch.float32,)
CASES = [
    Case("plain", one(), bias=False, norm=L2),  # the layer of Hinton's network
    Case("bias", one(), (130, 70, 36), L2, tiles=(None, 1, 7, 64)),
    Case("rms", one("sum_sq", loss=c.bce(36)), (130, 70, 36), RMS, dtypes=F32),
    Case("no-norm", groups()),
    Case("unequal", groups(groups=(0, 3, 4, 36), loss=c.cwc()), g0=True),
    Case("dropout", groups(dropout=DROP, loss=c.pvn()), tiles=(None, 5)),
    Case("straight-through", groups(relu_gradient="straight_through", dropout=DROP)),
    Case("sums", groups("sum_sq", loss=c.cwg()), norm=L2, dtypes=F32),
    Case("custom", groups("mean_sq", loss=own), norm=L2, g0=True, dtypes=F32),
    Case("pairs", one(loss=c.symba()), (38, 70, 36), L2, tiles=(None, 1, 2, 10, 11)),
    Case("pairs-g0", one(loss=c.symba()), (6, 20, 9), g0=True, tiles=(None, 4)),
    Case("halves", one(loss=c.threshold(0.5, reduction="sum"))),
    Case("one-row", groups(), (1, 33, 8)),
    Case("no-rows", groups(), (0, 33, 8), L2),
    Case("strided", one(), strided=True, norm=L2),
    Case("wide-rows", one(), (9, 5000, 12), L2, dtypes=F32, tiles=(4,)),  # two blocks of squares
    Case("many-groups", groups(groups=36), dtypes=F32),
]

#: A few small ones for slow back-ends (Triton's interpreter, emulated CUDA): (case, dtype, tile).
SMALL = {f"linear-step-{case.id}-{str(dtype)[6:]}": (case, dtype, rows) for case, dtype, rows in (
    (Case("fold", one(), (7, 20, 12), L2), torch.float32, 4),
    (Case("fold-vectors", groups("mean_sq"), (5, 64, 48), RMS, bias=False), torch.float32, None),
    (Case("fold-wide", one(), (3, 2100, 600), L2), torch.float32, None),
    (Case("copy", one(), (6, 24, 16), L2), torch.bfloat16, None),
    (Case("copy-tails", one(), (6, 21, 9), RMS), torch.float16, 4),
    (Case("bias-only", one(), (66, 5, 8)), torch.float32, None),  # one row past a chunk's sums
    (Case("dropout", groups(dropout=DROP), (5, 5, 8)), torch.float16, 3),
    (Case("pairs", one(loss=c.symba()), (6, 20, 9), L2), torch.float32, 4),
    (Case("custom", groups("mean_sq", loss=own), (5, 8, 12), g0=True), torch.float32, 3),
)}

#: The interpreter truncates what it stores in bf16, twice the error of rounding.
INTERPRETED = {name: small for name, small in SMALL.items() if small[1] is not torch.bfloat16}


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Tensors of a case, from a seed; x rounded to `dtype`."""
    n, features, out = case.shape
    rng = torch.Generator().manual_seed(len(case.id))
    x = torch.randn(n, features, generator=rng) + 0.3
    k = len(case.config.offsets(out)) - 1
    binary = isinstance(case.config.loss, c.Loss) and case.config.loss.binary
    y = torch.randint(0, 2 if binary else k, (n,), generator=rng)
    scale = 1.0 if case.norm is L2 else features**-0.5
    drawn = {
        "x": x.to(dtype).to(device), "y": y.to(device),
        "weight": (torch.randn(out, features, generator=rng) * scale).to(device),
        "bias": (torch.randn(out, generator=rng) * 0.3).to(device) if case.bias else None,
        "g0": (torch.randn(n, k, generator=rng) * 0.1).to(device) if case.g0 else None}
    if case.strided:
        drawn["x"] = drawn["x"].t().contiguous().t()
    return drawn


def outcome(case: Case, data: dict[str, Any], kind: torch.dtype, tile_rows: int | None,
            backend: str, optim: OptimConfig = SGD0) -> dict[str, torch.Tensor]:
    """g, loss, coef and both gradients, computed in `kind`; inputs must come out as they were."""
    wide = torch.float64 if kind is torch.float64 else torch.float32
    weight = data["weight"].to(wide, copy=True)
    bias = None if data["bias"] is None else data["bias"].to(wide, copy=True)
    x = data["x"].to(kind)
    before = x.clone(), data["y"].clone()
    grads = [torch.full_like(p, float("nan")) for p in (weight, bias) if p is not None]
    states = [OptimState.create(p, optim) for p in (weight, bias) if p is not None]
    found = linear_step(
        Parameter(weight, states[0], None, grads[0]), x, data["y"], config=case.config,
        optim=optim, bias=None if bias is None else Parameter(bias, states[1], None, grads[1]),
        input_norm=case.norm, g0=None if data["g0"] is None else data["g0"].to(wide),
        tile_rows=tile_rows, backend=backend)
    torch.testing.assert_close((x, data["y"]), before, rtol=0, atol=0, equal_nan=True)
    assert all(s.step == 1 for s in states)
    return {**found._asdict(), **dict(zip(("dW", "db"), grads, strict=False))}


def check(case: Case, dtype: torch.dtype, tile_rows: int | None, backend: str,
          device: str = "cpu") -> None:
    """The rule, on every result."""
    data = draw(case, dtype, device)
    exact = outcome(case, data, torch.float64, None, "reference")
    same = outcome(case, data, dtype, None, "reference")
    if device != "cpu" or backend not in ("cpu", "reference"):
        same["dW"] = same["dW"].to(dtype).float()  # as a GPU's library hands it to weight_update
    got = outcome(case, data, dtype, tile_rows, backend)
    n, features, out = case.shape
    for name, kernel in got.items():
        length = n if name in ("dW", "db") else features + out
        assert_close(kernel, exact[name], same[name], reduction=max(length, 1),
                     what=f"{case.id} {name}")
