"""What `Trainer(seed=)` is the seed of, and what it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.every import batch, network, state, trainer

import ffengine as ff


def trained(name: str, drawn: int, layers: tuple[int, ...] | None = None,
            **settings: Any) -> list[torch.Tensor]:
    """Weights and states after two steps, with torch's generator at `drawn` meanwhile."""
    net = network(name, **({} if layers is None else {"layers": layers}))
    made = trainer(net, **settings)
    torch.manual_seed(drawn)
    for _ in range(2):
        made.step(*batch(net))
    return [*state(net).values(), *made.optimizer.state_tensors()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("name, settings", [
    ("deeperforward/tinycnn", {}),  # dropout
    ("fflib/ffnn", {}),  # negatives
    ("fflib/ffrnn", {}),  # negatives and hidden states
    ("sn/mlp", {"weights": "bf16", "precision": "bf16", "layers": (200, 200)})])  # roundings
def test_all_that_training_draws_is_the_seeds(name: str, settings: dict[str, Any]) -> None:
    found = trained(name, 1, seed=3, **settings)
    assert equal(found, trained(name, 2, seed=3, **settings))
    assert not equal(found, trained(name, 1, seed=4, **settings))


def test_first_weights_are_torchs() -> None:
    """Before the network is made; the trainer's seed comes too late for them."""
    one, same, other = (network("sn/mlp", seed=seed) for seed in (0, 0, 1))
    assert equal(list(state(one).values()), list(state(same).values()))
    assert not equal(list(state(one).values()), list(state(other).values()))
    before = state(one)
    ff.Trainer(one, seed=7, progress=False)
    assert equal(list(before.values()), list(state(one).values()))
