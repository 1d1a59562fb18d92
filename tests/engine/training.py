"""A network and data small enough to train in a second, for the trainer's tests."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

import ffengine as ff

OPTIONS = {"in_channels": 1, "image_size": 8, "widths": (10, 20, 20, 20)}


def network(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return ff.models.create("deeperforward/tinycnn", **{**OPTIONS, **options})


def trainer(seed: int = 0, net: Any = None, **options: Any) -> ff.Trainer:
    settings = {"epochs": 4, "backend": "reference", "seed": seed, "progress": False,
                "sip": False, **options}
    return grouped(network(seed) if net is None else net, **settings)


def grouped(net: Any, *, sip: bool = True, recipe: ff.Recipe | None = None,
       **flat: Any) -> ff.Trainer:
    """A trainer of options that need not be grouped."""
    def taken(kind: Any) -> dict[str, Any]:
        names = {f.name for f in fields(kind)} - {"lr", "epochs", "batch_size"}
        return {name: flat.pop(name) for name in names & flat.keys()}

    recipe = recipe or net.recipe or ff.Recipe()
    if "lr_min" in flat:  # no ratio to another rate
        recipe = replace(recipe, lr=flat.get("lr", recipe.lr))
    recipe = replace(recipe, **taken(ff.Recipe))
    made = ff.Trainer(net, recipe=recipe, memory=ff.Memory(**taken(ff.Memory)), **flat)
    made.sip = made.sip and sip
    return made


def loaders(batch_size: int = 16) -> list[Any]:
    """(train, valid, test) of 40, 8 and 16 images; the last training batch is smaller."""
    splits = ff.data.load("synthetic", shape=(1, 8, 8), train=40, valid=8, test=16)
    return [ff.data.loader(splits.train, batch_size=batch_size, shuffle=True),
            ff.data.loader(splits.valid, batch_size=batch_size),
            ff.data.loader(splits.test, batch_size=batch_size)]


def batch(n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(n, 1, 8, 8, generator=generator).to(dtype),
            torch.randint(10, (n,), generator=generator))


def weights(net: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same(ours: torch.Tensor, slow: torch.Tensor, what: Any = "") -> None:
    """fp64 against a transcription: rounding, after a few steps of Adam."""
    ours, slow = ours.detach(), slow.detach()
    assert ours.dtype is slow.dtype is torch.float64 and ours.shape == slow.shape, what
    limit = 1e-10 * max(1.0, slow.abs().max().item())
    assert (ours - slow).abs().max() <= limit, what
