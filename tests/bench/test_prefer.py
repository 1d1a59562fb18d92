"""`auto` prefers what was measured on a device; the package's table is what the results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import prefer
from bench.gpu import records
from ffengine import env
from ffengine.ops import backends, preferences


def row(backend: str, plan: str, seconds: float, precision: str = "bf16",
        check: str = "ok") -> dict[str, Any]:
    return {"name": f"{precision} ours, {backend}, {plan}", "backend": backend, "check": check,
            "precision": precision, "model": "deeperforward/resnet17", "batch": 128,
            "seconds": {"median": seconds, "min": seconds, "max": seconds}}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A GPU's run, and a rehearsal whose numbers are no GPU's."""
    for kind, folder in (("gpu", "h100"), ("rehearsal", "here")):
        (tmp_path / folder).mkdir()
        file = records.Records(tmp_path / folder / "step.jsonl", {
            "kind": kind, "gpu": "NVIDIA H100", "commit": "0123456789abcdef"})
        for each in (row("triton", "one tile", 0.004), row("cuda", "one tile", 0.003),
                     row("cuda", "default plan", 0.0035), row("triton", "one tile", 0.0045),
                     row("triton", "default plan", 0.002, check="failed"),
                     row("cuda", "one tile", 0.01, "fp32")):
            file.add("step", **each)
    return tmp_path


def test_the_packages_table_is_what_the_results_say() -> None:
    assert json.loads(preferences.FILE.read_text()) == prefer.collect()


def test_the_fastest_green_row_of_each(results: Path) -> None:
    """The last row of a name counts; a precision in which one was not measured ranks nothing."""
    assert prefer.collect(results) == {"NVIDIA H100": {"bf16": {
        "seconds": {"triton": 0.0045, "cuda": 0.003},
        "of": "deeperforward/resnet17, batch 128, 0123456789ab"}}}


def test_auto_takes_it_and_says_why(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "_rows", lambda: prefer.collect(results))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    order, why = backends.auto_order("cuda", torch.bfloat16)
    assert order == ("cuda", "triton", "reference") and "cuda 3.00 ms, triton 4.50 ms" in why
    assert backends.auto_order("cuda", torch.float32)[0] == ("triton", "cuda", "reference")
    backends._auto.cache_clear()
    try:
        assert backends.resolve("local_pass", "auto", "cuda", torch.bfloat16) == "cuda"
        assert backends.resolve("local_pass", "auto", "cuda", torch.float32) == "triton"
    finally:
        backends._auto.cache_clear()


def test_env_says_why() -> None:
    report = env.env_report()
    assert set(report["auto_order"]) == set(env.DTYPES)
    assert "no measured row of this device ranks them otherwise" in env.env_text(report)
