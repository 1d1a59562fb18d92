"""Small profiles with made-up machine rates, for the profile's tests."""

from __future__ import annotations

from typing import Any

import torch

import ffengine as ff
from ffengine.devices import rates
from ffengine.profile import record

SMALL = {"in_channels": 1, "image_size": 8, "widths": (10, 20, 20, 20)}
COPY_RATE, PRODUCT_RATE = 1e9, 1e10


def fix_rates(monkeypatch: Any) -> None:
    """Round rates instead of measured ones: tests need no clock."""
    monkeypatch.setattr(rates, "copy_rate", lambda device: COPY_RATE)
    monkeypatch.setattr(rates, "product_rate", lambda *shape: PRODUCT_RATE)
    monkeypatch.setattr(rates, "launch_seconds", lambda device: 1e-6)


def trainer(name: str = "deeperforward/tinycnn", batch: int = 8, *, cuts: Any = None,
            tile: Any = None, backend: str = "auto", budget: str | None = None,
            **options: Any) -> ff.Trainer:
    """A trainer of a small network; with `cuts` and `tile` its plan is that."""
    torch.manual_seed(0)
    made = SMALL if name == "deeperforward/tinycnn" else {}
    net = ff.models.create(name, **{**made, **options})
    plan = None
    if cuts is not None:
        plan = ff.Trainer(net, batch_size=batch, backend=backend,
                          progress=False).planning.planner(batch).fixed(cuts, tile)
    return ff.Trainer(net, batch_size=batch, backend=backend, memory=ff.Memory(plan=plan),
                      memory_budget=budget, progress=False)


def profiled(made: ff.Trainer, batch: int = 8, **options: Any) -> Any:
    return record.profile(made, batch=batch, steps=2, model="small", **options)
