"""da over a: what linear_step does to its tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffengine.ops import backends
from ffengine.ops.config import Dropout, LocalPassConfig, symba
from ffengine.ops.local_pass import local_pass

CONFIGS = {
    "mean": LocalPassConfig(groups=4),
    "squares": LocalPassConfig(groups=(0, 1, 8), goodness="mean_sq"),
    "dropout": LocalPassConfig(groups=4, dropout=Dropout(0.3, 7),
                               relu_gradient="straight_through"),
    "pairs": LocalPassConfig(groups=1, goodness="mean_sq", loss=symba()),
    "custom": LocalPassConfig(groups=4, loss=lambda g, y: (g * g).sum(1)),
}
BACKENDS = ["reference"] + (["cpu"] if backends.extension() is not None else [])


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 5, 3)], ids=["linear", "map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_over_a_is_beside_a(backend: str, name: str, dtype: torch.dtype,
                            shape: tuple[int, ...]) -> None:
    a, y = torch.randn(shape).to(dtype), torch.tensor([0, 1, 0, 1, 1, 0])
    settings: dict[str, Any] = {"config": CONFIGS[name], "want_z": False, "want_da": True,
                                "backend": backend}
    beside = local_pass(a, y, **settings)
    over = local_pass(a, y, da_out=a, **settings)
    assert over.da is not None and over.da.data_ptr() == a.data_ptr()
    for one, other in zip(over[:5], beside[:5], strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def test_errors_are_one_line() -> None:
    a, y, config = torch.randn(4, 8, 4, 4), torch.zeros(4, dtype=torch.int64), CONFIGS["mean"]
    good: dict[str, Any] = {"config": config, "want_z": False, "want_da": True, "da_out": a}
    for changes in ({"want_da": False}, {"want_z": True}, {"da_out": a[:3]},
                    {"da_out": a.double()}, {"da_out": a.transpose(2, 3)},
                    {"config": LocalPassConfig(groups=4, pool="max2")}):
        with pytest.raises(ValueError, match=r"^\[local_pass\] da_out.*$"):
            local_pass(a, y, **{**good, **changes})
    with pytest.raises(ValueError, match=r"^\[local_pass\] da_out.*$"):
        local_pass(a, None, **good)
