"""The CUDA kernels' own source of batch_pass, emulated on the CPU, against the fp64 reference."""

from __future__ import annotations

import ctypes

import emulate
import pytest

from ffengine.ops import batch_pass as op
from tests.batch_pass_cases import cases


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate.build(tmp_path_factory.mktemp("emulated"), ("batch_pass.cu",),
                         "batch_entry.cpp")


@pytest.mark.parametrize("case", [name for name in cases() if "peer" not in name])
def test_two_sweeps(case: str, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.backends, "resolve", lambda *_: "cuda")
    monkeypatch.setattr(op, "run", lambda _, t, call: emulate.run_batch(library, t, call))
    cases()[case].check("auto", "cpu")


@pytest.mark.parametrize("case", [name for name in cases() if "peer" in name])
def test_peer(case: str, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two kernels; the rest is local_pass, which has its own emulation."""
    monkeypatch.setattr(op, "run", lambda _, t, call: emulate.run_batch(library, t, call))
    cases()[case].check("cpu", "cpu")
