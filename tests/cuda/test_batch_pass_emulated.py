"""The CUDA kernels' own source of batch_pass, emulated on the CPU, against the fp64 reference."""

from __future__ import annotations

import emulate
import pytest

from tests.batch_pass_cases import cases


@pytest.mark.parametrize("case", cases())
def test_small(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = emulate.install(monkeypatch)
    cases()[case].check("cuda", "cpu")
    assert "batch_pass" in extension.calls
