"""The CUDA kernels' own source of linear_step, emulated on the CPU, against the fp64 reference."""

from __future__ import annotations

import emulate
import pytest

from ffengine.ops import linear_tile
from tests.linear_step_cases import SMALL, check


@pytest.mark.parametrize("name", SMALL)
def test_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, dtype, rows = SMALL[name]
    extension = emulate.install(monkeypatch)
    check(case, dtype, rows, "cuda")
    assert ("linear_prepare" in extension.calls) == (case.norm.kind != "none")
    folds = linear_tile.folds(dtype, case.norm)
    assert ("linear_finish" in extension.calls) == (case.bias or folds)
    assert {"local_pass", "optimizer_step"} <= set(extension.calls)
