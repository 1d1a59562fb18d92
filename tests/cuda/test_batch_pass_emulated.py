"""The CUDA kernels' own source of batch_pass, emulated on the CPU, against the fp64 reference."""

from __future__ import annotations

import emulate
import pytest
from test_batch_pass_cuda import CASES


@pytest.mark.parametrize("case", CASES)
def test_small(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = emulate.install(monkeypatch)
    CASES[case].check("cuda", "cpu")
    assert "batch_pass" in extension.calls
