"""Cases of batch_pass for every back-end, and their check against the fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ffengine.ops.batch_pass import BatchPassOutput, batch_pass
from ffengine.ops.config import (
    BatchNorm,
    LocalPassConfig,
    Loss,
    Norm,
    Peer,
    bce,
    cwc,
    pvn,
    sparsemax,
    symba,
    threshold,
)
from ffengine.reference import batch_pass as reference
from tests.tolerances import assert_close

NCHW, CL = torch.contiguous_format, torch.channels_last
#: Elements of NaN before and after a: a stray read shows, and alignment stays as it would be.
BAND = 128
CWCOMP = BatchNorm()


@dataclass
class Inputs:
    """The tensors of one call, drawn from a fixed seed."""

    a: torch.Tensor
    y: torch.Tensor | None
    vectors: dict[str, torch.Tensor]

    def to(self, dtype: torch.dtype) -> Inputs:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return Inputs(self.a.to(dtype).cpu(), None if self.y is None else self.y.cpu(),
                      {k: v.to(wide).cpu() for k, v in self.vectors.items()})


def settings(**given: Any) -> LocalPassConfig:
    """A config for BatchNorm: four groups, no norm."""
    return LocalPassConfig(**{"groups": 4, "norm": Norm("none"), **given})


def peer_settings(**given: Any) -> LocalPassConfig:
    """Löwe et al.'s layer."""
    return LocalPassConfig(**{"groups": 1, "goodness": "sum_sq", "loss": bce(20.0),
                              "norm": Norm("length", eps=1e-8), **given})


def draw(shape: tuple[int, ...], config: LocalPassConfig, coupling: BatchNorm | Peer, *,
         dtype: torch.dtype = torch.float32, layout: torch.memory_format = NCHW,
         shift: float = 0.0, affine: bool = True, device: str = "cpu") -> Inputs:
    """Gammas of both signs and, where there are three channels, one of 0."""
    rng = torch.Generator().manual_seed(sum(shape) + 7)
    channels = shape[1]
    a = (torch.randn(shape, generator=rng) + shift).to(dtype).to(device)
    a = between_bands(a.contiguous(memory_format=layout) if len(shape) == 4 else a)
    binary = isinstance(config.loss, Loss) and config.loss.binary
    groups = len(config.offsets(channels)) - 1
    y = torch.randint(2 if binary else groups, shape[:1], generator=rng)
    vectors = {"running_mean": torch.rand(channels, generator=rng)}
    if isinstance(coupling, BatchNorm):
        vectors["running_var"] = torch.rand(channels, generator=rng) + 0.5
        if affine:
            vectors["gamma"] = torch.randn(channels, generator=rng)
            vectors["gamma"][2:3] = 0.0
            vectors["beta"] = torch.randn(channels, generator=rng)
    return Inputs(a, y.to(device), {k: v.to(device) for k, v in vectors.items()})


def between_bands(like: torch.Tensor) -> torch.Tensor:
    """The same values and strides amid NaN."""
    store = torch.full((like.numel() + 2 * BAND,), float("nan"), dtype=like.dtype,
                       device=like.device)
    return store.as_strided(like.shape, like.stride(), BAND).copy_(like)


def check(given: Inputs, config: LocalPassConfig, coupling: BatchNorm | Peer, backend: str, *,
          training: bool = True, run: Any = batch_pass, want_da: bool = True,
          ) -> BatchPassOutput:
    """Run and hold every result and the new running statistics to the rule."""
    exact, same = given.to(torch.float64), given.to(given.a.dtype)
    before = given.a.clone(), {k: v.clone() for k, v in given.vectors.items()}
    out: BatchPassOutput = run(given.a, given.y, config=config, coupling=coupling,
                               training=training, want_da=want_da, backend=backend, **given.vectors)
    assert torch.equal(given.a.nan_to_num(), before[0].nan_to_num()), "an input changed"
    for name in ("gamma", "beta") if training else given.vectors:
        if name in given.vectors:
            assert torch.equal(given.vectors[name], before[1][name]), f"{name} changed"
    results = [reference.batch_pass(
        i.a, i.y, config=config, coupling=coupling, training=training, want_da=want_da,
        da_scale=out.da_scale, **i.vectors) for i in (exact, same)]
    trios = {name: [getattr(r, name) for r in (out, *results)]
             for name in ("z", "g", "loss", "coef", "da", "dgamma", "dbeta", "penalty")}
    trios |= {name: [i.vectors[name] for i in (given, exact, same)]
              for name in ("running_mean", "running_var") if name in given.vectors}
    for name, (got, want, rough) in trios.items():
        assert (got is None) == (want is None), name
        if want is not None:
            nan = want.isnan()
            assert torch.equal(got.isnan().cpu(), nan), f"{name}: NaN at other places"
            clean = (t.cpu().masked_fill(nan, 0.0) for t in (got, want, rough))
            # through the statistics every gradient depends on every row's whole sample
            assert_close(*clean, reduction=max(given.a.numel(), 1), what=name)
    return out


@dataclass(frozen=True)
class Case:
    """One call; small, for back-ends that are interpreted or emulated."""

    id: str
    shape: tuple[int, ...]
    config: LocalPassConfig
    coupling: BatchNorm | Peer = CWCOMP
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = NCHW
    shift: float = 0.0
    affine: bool = True
    training: bool = True
    nan: bool = False

    def check(self, backend: str, device: str, run: Any = batch_pass) -> None:
        given = draw(self.shape, self.config, self.coupling, dtype=self.dtype, layout=self.layout,
                     shift=self.shift, affine=self.affine, device=device)
        if self.nan:
            given.a[1, 0] = float("nan")
        check(given, self.config, self.coupling, backend, training=self.training, run=run)


def cases() -> dict[str, Case]:
    """Each with the reason it is here; layouts and orders crossed where a kernel branches."""
    pool, straight = {"pool": "max2"}, {"relu_gradient": "straight_through"}
    half, brain = torch.float16, torch.bfloat16
    after = BatchNorm(order="norm_pool")
    found = [
        Case("linear", (5, 20), settings(goodness="mean_sq", loss=cwc())),
        Case("linear-odd-bf16", (3, 35), settings(groups=5, **straight), dtype=brain),
        Case("linear-no-affine", (2, 17), settings(groups=1, loss=threshold()), affine=False),
        Case("1d", (2, 8, 9), settings()),
        Case("symba", (4, 8, 3, 3), settings(groups=1, goodness="mean_sq", loss=symba())),
        Case("mean-shifted", (2, 4, 8, 8), settings(), shift=100.0),
        Case("evaluation", (2, 8, 4, 4), settings(), training=False),
        Case("running", (2, 8, 4, 4), settings(goodness="sum_sq", loss=sparsemax()),
             BatchNorm(use_running=True)),
        # more than one program does between the sweeps
        Case("wide", (3, 1400), settings(groups=7, goodness="mean_sq", loss=cwc())),
        Case("wide-unequal", (45, 100, 1, 2), settings(groups=(0, 1, 60, 100)), layout=CL),
        Case("wide-symba", (6, 750), settings(groups=1, goodness="sum_sq", loss=symba()),
             affine=False),
        Case("wide-running", (3, 1400), settings(groups=1400), training=False),
        Case("peer", (5, 20), peer_settings(), Peer()),
        Case("peer-wide-bf16", (9, 70), peer_settings(), Peer(0.5, 0.3), brain),
        Case("peer-without-weight", (5, 20), peer_settings(), Peer(0.0)),
        Case("peer-straight", (4, 20), peer_settings(norm=Norm("none"), **straight), Peer()),
    ]
    for layout, name in ((NCHW, "nchw"), (CL, "nhwc")):
        found += [
            Case(f"plain-{name}", (3, 20, 4, 4), settings(goodness="mean_sq"), layout=layout),
            Case(f"mean-bf16-{name}", (2, 16, 5, 7), settings(), dtype=brain, layout=layout),
            Case(f"long-{name}", (2, 3, 33, 31), settings(groups=1, loss=threshold(0.5)),
                 layout=layout),
            Case(f"unequal-fp16-{name}", (2, 20, 4, 6),
                 settings(groups=(0, 1, 17, 20), goodness="sum_sq", loss=pvn()), dtype=half,
                 layout=layout),
            Case(f"nan-{name}", (2, 8, 3, 3), settings(), layout=layout, nan=True),
        ]
        for coupling in (CWCOMP, after):
            found += [
                Case(f"{coupling.order}-even-{name}", (2, 20, 6, 4),
                     settings(goodness="mean_sq", **pool), coupling, layout=layout),
                Case(f"{coupling.order}-odd-{name}", (2, 8, 5, 7), settings(**pool, **straight),
                     coupling, layout=layout),
                Case(f"{coupling.order}-bf16-{name}", (2, 16, 4, 3),
                     settings(goodness="sum_sq", **pool), coupling, brain, layout),
                Case(f"{coupling.order}-running-{name}", (2, 8, 5, 4), settings(**pool), coupling,
                     layout=layout, training=False),
            ]
    by_id = {f"batch-{case.id}": case for case in found}
    assert len(by_id) == len(found)
    return by_id
