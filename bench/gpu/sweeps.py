"""local_pass on cold data against a copy of the same bytes, by every back-end in turn.

Every row is checked against the fp64 reference on the very call that is timed; one that fails, or
does not run, says so and carries no speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from bench.gpu import clock
from bench.gpu.records import Row
from bench.gpu.scale import Scale
from bench.gpu.session import Session
from bench.gpu.work import Job, failed, worker
from ffengine.ops.config import Dropout, LocalPassConfig, Tile
from ffengine.ops.local_pass import LocalPassOutput, bytes_moved, local_pass
from ffengine.reference.local_pass import local_pass as reference
from tests.tolerances import assert_close

#: Rows at either end of the timed batch that are checked: the reference takes ten times the memory.
CHECKED_ROWS = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
#: Of a result's norm that it may be off; a rounding to 16 bits is a fifth of it.
NORM_SHARE = 0.01
RESULTS = ("z", "g", "loss", "coef", "da")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int,
           device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """a and y of a call, drawn from a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    a = torch.randn(shape, generator=generator, device=device).to(dtype)
    a = a.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else a
    return a, torch.randint(10, shape[:1], generator=generator, device=device)


def check(out: LocalPassOutput, a: torch.Tensor, y: torch.Tensor, config: LocalPassConfig) -> None:
    """The first and the last rows of a call's results against the reference; nothing is NaN."""
    n = a.shape[0]
    few = min(CHECKED_ROWS, n)
    for start in dict.fromkeys((0, n - few)):
        rows = slice(start, start + few)
        wide, same = (reference(a[rows].to(dtype), y[rows], config=config, want_da=True,
                                tile=Tile(start, n), da_scale=out.da_scale)
                      for dtype in (torch.float64, a.dtype))
        for name, kernel, exact, low in zip(RESULTS, out[:5], wide, same, strict=True):
            assert_close(kernel[rows], exact, low, reduction=a[0].numel(), what=name)
            near(kernel[rows], exact, name)
    for name, kernel in zip(RESULTS, out[:5], strict=True):
        assert not kernel.isnan().any(), f"{name} holds NaN"


def near(ours: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """To 1 % in norm: in 16 bits, over long sums, the rule by the largest element allows more."""
    error, size = (float(t.norm()) for t in (ours.double() - exact, exact))
    assert error <= NORM_SHARE * size, f"{what}: off by {error:.1e} of {size:.1e} in norm"


def group(session: Session, stage: str, kind: str, layout: str, p: float) -> Iterator[Row]:
    """A row a back-end of one call: rates where the check is green, else the reason."""
    scale, shape = session.scale, session.scale.sweeps[stage]
    config = LocalPassConfig(groups=10, dropout=Dropout(p, seed=1, layer=2, step=3))
    dtype = DTYPES[kind]
    total = bytes_moved(shape, dtype, config, want_z=True, want_da=True)
    count = clock.sets_for(total, scale)
    sets = [inputs(shape, dtype, layout, seed, session.device) for seed in range(count)]
    outs = [torch.empty_like(a) for a, _ in sets]
    what = {"shape": shape, "stage": stage, "dtype": kind, "layout": layout, "dropout": p,
            "bytes": total, "sets": count}
    sides, rows = {"copy": copies(total, count, session)}, dict[str, Row]()
    for backend in scale.backends:
        rows[backend] = {"name": title(stage, kind, layout, p, backend), "backend": backend, **what}
        try:
            a, y = sets[0]
            check(local_pass(a, y, config=config, want_da=True, backend=backend), a, y, config)
            calls = [lambda s=s, o=o, b=backend: local_pass(
                s[0], s[1], config=config, out=o, want_da=True, backend=b)
                for s, o in zip(sets, outs, strict=True)]
            sides[backend] = clock.reading(calls, session.device, scale.sweep_replays)
        except Exception as reason:  # of this back-end: the other one is measured all the same
            rows[backend] |= failed(reason)
    times = clock.rounds(sides, scale.rounds)
    for backend, row in rows.items():
        yield row if backend not in times else {**row, **rates(row, times[backend], times["copy"])}


def copies(total: int, count: int, session: Session) -> clock.Reading:
    """Device-to-device copies that read and write `total` bytes in all."""
    pairs = [[torch.empty(max(total // 2, 1), dtype=torch.uint8, device=session.device).random_()
              for _ in range(2)] for _ in range(count)]
    calls = [lambda p=p: p[0].copy_(p[1]) for p in pairs]
    return clock.reading(calls, session.device, session.scale.sweep_replays)


def rates(row: Row, ours: list[float], copy: list[float]) -> dict[str, Any]:
    """Seconds, bytes a second and the share of a copy's, of the same rounds."""
    seconds = clock.spread(ours)
    rate, best = (row["bytes"] / clock.spread(t)["median"] / 1e9 for t in (ours, copy))
    return {"seconds": seconds, "rounds": ours, "gb_per_s": rate, "copy_gb_per_s": best,
            "percent_of_copy": 100 * rate / best,
            "text": f"{1e6 * seconds['median']:.1f} us, {rate:.0f} GB/s, "
                    f"{100 * rate / best:.1f} % of copy"}


def title(stage: str, kind: str, layout: str, p: float, backend: str) -> str:
    return f"{stage} {kind} {layout} {backend}{f' dropout {p}' if p else ''}"


def combinations(scale: Scale) -> Iterator[tuple[str, str, str, float]]:
    """(stage, dtype, layout, dropout), the case that matters most first."""
    for layout in ("nhwc", "nchw"):
        for p in (0.0, 0.2):
            for kind in scale.sweep_dtypes:
                for stage in scale.sweeps:
                    yield stage, kind, layout, p


def jobs(session: Session, args: argparse.Namespace) -> Iterator[Job]:
    for combination in combinations(session.scale):
        yield title(*combination, "all"), rows_of(session, *combination)


def rows_of(session: Session, *combination: Any) -> Any:
    def rows() -> Iterable[Row]:
        yield from group(session, *combination)
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(worker(__doc__, jobs))
