"""A step computes by its trainer's settings, whatever its caller has switched on around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from models.every import NAMES, batch, network, state, trainer

#: Of the twins, those whose plain backpropagation gives the same result every time.
STEPPED = [n for n in NAMES if not n.startswith("bp/deeperforward")]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode, "no_grad": torch.no_grad,
    "default_dtype": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("name", STEPPED)
def test_a_step_takes_over_nothing_of_its_callers(name: str) -> None:
    net = network(name)

    def stepped(around: Any) -> list[torch.Tensor]:
        made = copy.deepcopy(net)
        t, (x, y) = trainer(made), batch(made)
        t.plan_for(8)
        with around:
            for epoch in (0, 1):  # what a step makes to last is met by the next one
                t.step(x.clone(), y.clone(), epoch=epoch)  # made in inference mode, too
        t.step(x, y)
        return [*state(made).values(), *t.optimizer.state_tensors()]

    alone = stepped(nullcontext())
    for what, around in AROUND.items():
        mine = stepped(around())
        assert len(mine) == len(alone) and all(map(torch.equal, mine, alone)), what
