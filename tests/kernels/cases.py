"""The case list of the Triton local_pass, shared by the interpreter and by GPUs.

A greedy pairwise cover of the settings, plus cases with a reason of their own. Small: the
interpreter handles some 5e4 elements and a hundred programs a second.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass

import torch

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

SEED = 0x1234_5678_9ABC_DEF1
WHOLE = Tile()


def squared_gap(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A researcher's own loss."""
    return (g - torch.nn.functional.one_hot(y, g.shape[1])).square().sum(1)


@dataclass(frozen=True)
class Case:
    """One call; `public` runs it through the op, else it runs between guard bands."""

    id: str
    shape: tuple[int, ...]
    config: LocalPassConfig
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    targets: bool = True
    g0: bool = False
    tile: Tile = WHOLE
    outputs: str = "z+da"
    shift: float = 0.0
    nan: bool = False
    strided: bool = False
    public: bool = False
    shortcut: bool = False
    around: tuple[int, int] = (0, 0)  # channels beside z in the map it is a slice of
    clock: bool = False  # dropout's step comes from memory


FACTORS: dict[str, tuple[str, ...]] = {
    "goodness": ("mean", "sum_sq", "mean_sq"),
    "norm": ("none", "group", "layer", "l2-sample", "rms-sample", "l2-group", "rms-group"),
    "loss": ("ce", "cwc", "pvn", "threshold", "bce", "symba", "sparsemax", "cwg", "margin",
             "custom", "none"),
    "dtype": ("fp32", "bf16", "fp16"),
    "map": ("nchw-4x4", "nchw-5x7", "nhwc-4x4", "nhwc-5x7", "linear"),
    "groups": ("even", "odd", "unequal"),
    "relu": ("masked", "straight_through"),
    "pool": ("none", "max2"),
    "dropout": ("none", "batch", "tile", "pairs"),
    "blend": ("no", "yes"),
    "g0": ("no", "yes"),
    "outputs": ("z+da", "z", "da", "z-over-a"),
}
LOSSES = {
    "ce": ce(), "cwc": cwc(clamp=0.5), "pvn": pvn(0.4), "threshold": threshold(0.5, False),
    "bce": bce(3.0, "sum"), "symba": symba(0.1), "sparsemax": sparsemax(), "cwg": cwg(),
    "margin": margin(0), "custom": squared_gap, "none": ce(),
}
ONE_GROUP = ("threshold", "bce", "symba")
GROUPS = {"even": (12, 3), "odd": (9, 3), "unequal": (9, (0, 1, 6, 9))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUTS = {
    "none": (Dropout(), WHOLE),
    "batch": (Dropout(0.3, SEED, 3, 7), WHOLE),
    "tile": (Dropout(0.3, SEED, 3, 7), Tile(5, 64)),
    "pairs": (Dropout(0.5, SEED, 0, 2**31 + 5), Tile(6, 64, True)),
}


def feasible(pick: dict[str, str]) -> bool:
    """Combinations that the op itself rejects, or that mean nothing."""
    if pick["pool"] == "max2" and (pick["map"] == "linear" or pick["outputs"] == "z-over-a"):
        return False
    if pick["loss"] in ("none", "custom") and pick["outputs"] == "z-over-a":
        return False
    return not (pick["loss"] == "none" and pick["outputs"] == "da")


def pairwise() -> list[dict[str, str]]:
    """Picks that cover every feasible pair of settings (greedy, seeded)."""
    rng = random.Random(0)
    names = list(FACTORS)

    def pairs(pick: dict[str, str]) -> set[tuple[str, str, str, str]]:
        return {(a, pick[a], b, pick[b]) for a, b in itertools.combinations(names, 2)}

    open_pairs = {(a, i, b, j) for a, b in itertools.combinations(names, 2)
                  for i in FACTORS[a] for j in FACTORS[b]}
    chosen: list[dict[str, str]] = []
    idle = 0
    while open_pairs and idle < 20:
        candidates = [c for c in ({n: rng.choice(FACTORS[n]) for n in names} for _ in range(60))
                      if feasible(c)]
        for candidate in candidates:  # aim each at a pair still open
            a, i, b, j = min(open_pairs) if idle else rng.choice(sorted(open_pairs))
            aimed = {**candidate, a: i, b: j}
            candidate.update(aimed if feasible(aimed) else {})
        best = max(candidates, key=lambda c: len(pairs(c) & open_pairs))
        gain = pairs(best) & open_pairs
        idle = 0 if gain else idle + 1
        if gain:
            open_pairs -= gain
            chosen.append(best)
    return chosen


def build(pick: dict[str, str]) -> Case:
    """The case of one pick of settings."""
    channels, groups = GROUPS[pick["groups"]]
    if pick["loss"] in ONE_GROUP:
        groups = 1
    kind, *scope = pick["norm"].split("-")
    norm = Norm("length", 1e-5, kind, scope[0]) if scope else Norm(kind)
    layout, *size = pick["map"].split("-")
    spatial = tuple(int(s) for s in size[0].split("x")) if size else ()
    dropout, tile = DROPOUTS[pick["dropout"]]
    config = LocalPassConfig(
        groups=groups, goodness=pick["goodness"], loss=LOSSES[pick["loss"]], norm=norm,
        relu_gradient=pick["relu"], pool=pick["pool"], blend=0.7 if pick["blend"] == "yes" else 1.0,
        dropout=dropout)
    return Case(
        id="-".join(v for k, v in pick.items() if v not in ("none", "no") or k == "loss"),
        shape=(4 if pick["dropout"] == "pairs" or pick["loss"] == "symba" else 3, channels,
               *spatial),
        config=config, dtype=DTYPES[pick["dtype"]], channels_last=layout == "nhwc",
        targets=pick["loss"] != "none", g0=pick["g0"] == "yes", tile=tile,
        outputs=pick["outputs"], public=pick["loss"] == "custom" or pick["outputs"] == "z-over-a")


def special() -> list[Case]:
    """Cases with a reason each."""
    group = LocalPassConfig(groups=2)
    drop = Dropout(0.4, SEED, 1, 2)
    return [
        Case("many-groups", (1, 130), LocalPassConfig(groups=65, loss=sparsemax())),
        Case("splits-nchw", (2, 16, 24, 24), LocalPassConfig(groups=1, loss=threshold())),
        Case("splits-nhwc", (2, 16, 24, 24), LocalPassConfig(groups=1, loss=threshold()),
             channels_last=True),
        Case("splits-layer-unequal", (2, 16, 24, 24),
             LocalPassConfig(groups=(0, 2, 15, 16), norm=Norm("layer"))),
        Case("splits-length-sum", (1, 16, 24, 24),
             LocalPassConfig(groups=1, goodness="sum_sq", norm=Norm("length", scope="group"),
                             loss=bce(4000.0)), torch.bfloat16),
        Case("wide-group-nhwc", (1, 300, 2, 2), group, channels_last=True),
        Case("one-pixel-nhwc-linear", (3, 6, 1, 1), group, channels_last=True),
        Case("mean-shifted", (2, 16, 8, 8), group, shift=100.0),
        Case("mean-shifted-splits", (1, 16, 24, 24), LocalPassConfig(groups=1, loss=threshold()),
             shift=100.0),
        Case("all-dead", (2, 4, 4, 4), group, shift=-100.0),
        Case("all-dead-pool-straight", (2, 4, 5, 4),
             LocalPassConfig(groups=2, pool="max2", goodness="mean_sq",
                             relu_gradient="straight_through"), shift=-100.0),
        Case("integer-settings", (2, 4), LocalPassConfig(groups=2, loss=pvn(1))),
        Case("one-row", (1, 5), LocalPassConfig(groups=5)),
        Case("spatial-1d", (2, 4, 9), group),
        Case("spatial-3d", (2, 4, 2, 3, 3), group),
        Case("permuted", (2, 4, 3, 5), group, strided=True, public=True),
        Case("permuted-custom", (2, 4, 3, 5), LocalPassConfig(groups=2, loss=squared_gap),
             strided=True, public=True),
        Case("dropout-index-beyond-2**34", (2, 4, 4, 4), LocalPassConfig(groups=2, dropout=drop),
             tile=Tile(3_000_000_000, 6_000_000_000)),
        Case("dropout-quads-nhwc", (2, 8, 4, 8), LocalPassConfig(groups=2, dropout=drop),
             channels_last=True),
        Case("dropout-no-quads", (2, 6, 3, 3), LocalPassConfig(groups=2, dropout=drop)),
        Case("nan-ce", (2, 6, 3, 3), LocalPassConfig(groups=3), nan=True),
        Case("nan-dropout", (2, 8, 4, 4), LocalPassConfig(groups=2, dropout=drop), nan=True),
        Case("nan-cwc-pool", (2, 6, 4, 4),
             LocalPassConfig(groups=3, loss=cwc(), pool="max2", goodness="mean_sq"), nan=True),
        Case("nan-sparsemax-layer", (2, 6, 3, 3),
             LocalPassConfig(groups=3, loss=sparsemax(), norm=Norm("layer")), nan=True),
        Case("nan-symba-length", (2, 6), LocalPassConfig(groups=1, loss=symba(),
                                                         norm=Norm("length")), nan=True),
        Case("empty", (0, 4, 3, 3), group, public=True),
        *rows_of_pixels(), *joins(),
    ]


def rows_of_pixels() -> list[Case]:
    """NHWC: rows of several pixels, their ragged ends, pixels wider than a tile."""
    ten, hundred = LocalPassConfig(groups=10), LocalPassConfig(groups=100)
    drop = Dropout(0.3, SEED, 3, 7)
    nhwc = {"channels_last": True}
    return [
        Case("pixels-100", (2, 100, 4, 6), ten, **nhwc),
        Case("pixels-100-bf16", (2, 100, 4, 6), ten, torch.bfloat16, **nhwc),
        Case("pixels-100-ragged", (2, 100, 3, 7), ten, shift=100.0, **nhwc),
        Case("pixels-100-of-100", (1, 100, 3, 5),
             LocalPassConfig(groups=100, goodness="mean_sq", norm=Norm("layer")), **nhwc),
        Case("pixels-100-splits", (1, 100, 10, 13), hundred, torch.bfloat16, **nhwc),
        Case("pixels-unequal", (2, 20, 7, 5),
             LocalPassConfig(groups=(0, 1, 17, 20), goodness="sum_sq", loss=pvn()), **nhwc),
        Case("pixels-unequal-squares", (2, 100, 3, 3),
             LocalPassConfig(groups=(0, 33, 34, 90, 100), goodness="mean_sq"), torch.float16,
             **nhwc),
        Case("pixels-one-channel", (2, 1, 9, 9), LocalPassConfig(groups=1, loss=threshold()),
             **nhwc),
        Case("pixels-wide", (1, 1300, 1, 2), ten, shift=100.0, **nhwc),
        Case("pixels-wide-one-group", (1, 1100, 2, 1),
             LocalPassConfig(groups=1, loss=threshold(), goodness="mean_sq"), **nhwc),
        Case("pixels-wide-unequal", (1, 1100, 1, 2),
             LocalPassConfig(groups=(0, 500, 501, 1090, 1100)), **nhwc),
        Case("pixels-wide-many-groups", (1, 1200, 1, 1),
             LocalPassConfig(groups=300, loss=cwc()), **nhwc),
        Case("pixels-wide-dropout", (1, 600, 2, 2), LocalPassConfig(groups=10, dropout=drop),
             **nhwc),
        Case("pixels-dropout-no-quads", (2, 20, 3, 5), LocalPassConfig(groups=10, dropout=drop),
             tile=Tile(5, 64), **nhwc),
        Case("pixels-pool", (2, 100, 3, 5),
             LocalPassConfig(groups=10, goodness="mean_sq", pool="max2"), **nhwc),
        Case("pixels-blend", (2, 20, 3, 5), LocalPassConfig(groups=10, blend=0.7), **nhwc),
        Case("pixels-nan", (2, 20, 3, 5), LocalPassConfig(groups=10, goodness="mean_sq"), nan=True,
             **nhwc),
        Case("pixels-length", (2, 20, 3, 5), LocalPassConfig(groups=10, norm=Norm("length")),
             **nhwc),
        Case("pixels-z-over-a", (2, 20, 3, 5), ten, outputs="z-over-a", public=True, **nhwc),
    ]


def joins() -> list[Case]:
    """A shortcut added to z, z a slice of a wider map, dropout's step from memory."""
    ten = LocalPassConfig(groups=10)
    pool = LocalPassConfig(groups=10, pool="max2")
    blend = LocalPassConfig(groups=2, blend=0.7)
    drop = LocalPassConfig(groups=2, dropout=Dropout(0.4, SEED, 1, 2**31 + 9))
    found = []
    for layout, name in ((False, "nchw"), (True, "nhwc")):
        found += [
            Case(f"shortcut-{name}", (2, 20, 3, 5), ten, channels_last=layout, shortcut=True),
            Case(f"slice-{name}", (2, 20, 3, 5), ten, channels_last=layout, around=(8, 4)),
            Case(f"slice-odd-{name}", (2, 20, 3, 5), ten, torch.bfloat16, layout, around=(3, 0)),
            Case(f"slice-pool-{name}", (2, 20, 5, 7), pool, channels_last=layout, around=(0, 12),
                 shortcut=True),
            Case(f"slice-blend-{name}", (2, 8, 4, 4), blend, channels_last=layout,
                 around=(8, 8), shortcut=True),
            Case(f"clock-{name}", (2, 8, 4, 4), drop, channels_last=layout, clock=True),
        ]
    return [*found, Case("shortcut-linear", (3, 20), ten, shortcut=True),
            Case("slice-linear", (3, 20), ten, around=(4, 16)),
            Case("slice-wide", (1, 1300, 1, 2), ten, channels_last=True, around=(4, 4),
                 shortcut=True)]


@functools.cache
def all_cases() -> dict[str, Case]:
    cases = [*map(build, pairwise()), *special()]
    by_id = {case.id: case for case in cases}
    assert len(by_id) == len(cases)
    return by_id
