"""x W^T by either library: which one, the same numbers, what it holds."""

from __future__ import annotations

import pytest
import torch

from ffengine.engine.memory.meter import MemoryMeter
from ffengine.ops import product
from tests.tolerances import assert_close


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def lags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor on which MKL lags, or not."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN product")
    monkeypatch.setattr(product, "mkl_lags", lambda: request.param)
    return bool(request.param)


def test_choice(lags: bool) -> None:
    best = "onednn" if lags else "torch"
    large = (128, (2000, 784))
    assert product.choose(*large, torch.float32, "cpu") == best
    assert product.choose(*large, torch.bfloat16, "cpu") == "torch"
    assert product.choose(*large, torch.float32, "cuda") == "torch"
    assert product.choose(1, (2000, 784), torch.float32, "cpu") == "torch"  # a vector
    assert product.choose(8, (10, 100), torch.float32, "cpu") == "torch"  # a call costs more


@pytest.mark.parametrize("vendor", ["GenuineIntel", "", "AuthenticAMD"])
def test_intel_keeps_its_own(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "vendor", lambda: vendor)
    product.mkl_lags.cache_clear()
    try:
        there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        assert product.mkl_lags() == (there and vendor == "AuthenticAMD")
    finally:
        product.mkl_lags.cache_clear()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [3, 300, 600])
def test_products(rows: int, bias: bool, lags: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, 900, generator=rng), torch.randn(400, 900, generator=rng)
    b = torch.randn(400, generator=rng) if bias else None
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    same = torch.nn.functional.linear(x, w, b)
    into = torch.empty(rows, 400)
    with torch.no_grad():
        product.linear_into(into, x, w, b)
        assert_close(product.linear(x, w, b), exact, same, reduction=900)
    assert_close(into, exact, same, reduction=900)


def test_what_it_holds(lags: bool) -> None:
    x, w, out = torch.randn(1000, 900), torch.randn(400, 900), torch.empty(1000, 400)
    product.linear_into(out, x, w)
    with torch.no_grad(), MemoryMeter(feature=[x, w, out]) as meter:
        product.linear_into(out, x, w)
    told = product.extra_bytes(1000, (400, 900), torch.float32, "cpu")
    held = meter.report.peak_bytes - 4 * (x.numel() + w.numel() + out.numel())
    assert told == (256 * 400 * 4 if lags else 0)
    assert held <= told + 600_000  # what the library packs: 0.3 MB


def test_gradients_flow_where_they_are_recorded(lags: bool) -> None:
    x, w = torch.randn(64, 300), torch.randn(200, 300, requires_grad=True)
    product.linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(200, 300))
