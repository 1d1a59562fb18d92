"""The machine's rates: what they are made of, and the roofline they give."""

from __future__ import annotations

import pytest
import torch

from ffengine.devices import rates
from ffengine.devices.rates import Rates

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(rates, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setitem(rates.SIDE, "cpu", 64)
    for cached in (rates.copy_rate, rates.product_rate):
        cached.cache_clear()
    yield
    for cached in (rates.copy_rate, rates.product_rate):
        cached.cache_clear()


def test_the_least_of_cold_runs_counts(monkeypatch):
    clock = iter([0, 9, 10, 13, 20, 22, 30, 36, 40, 41, 50, 58, 60, 64, 70, 77])
    monkeypatch.setattr(rates, "_now", lambda device: next(clock))
    calls = []
    assert rates.cold(lambda: calls.append(1), CPU) == 1  # of 3, 2, 6, 1, 8, 4, 7: not the first
    assert len(calls) == rates.RUNS + 1


def test_rates_are_amounts_over_seconds(monkeypatch):
    monkeypatch.setattr(rates, "cold", lambda call, device: (call(), 0.5)[1])
    assert rates.product_rate(3, 5, 7, torch.float32, CPU) == 2 * 3 * 5 * 7 / 0.5
    assert rates.copy_rate(CPU) == 2 * (1 << 20) / 4 / 0.5


def test_products_are_those_of_the_library_that_the_engine_takes(monkeypatch):
    seen = []
    monkeypatch.setattr(rates.product, "linear", lambda x, w: seen.append((x.shape, w.shape)))
    rates.product_seconds(3, 5, 7, torch.float32, CPU)
    assert set(seen) == {((3, 5), (7, 5))}


def test_a_machine_has_a_rate_for_every_dtype_asked_for():
    made = rates.machine_rates([torch.float32, torch.bfloat16], "cpu")
    assert set(made.flops_per_second) == {torch.float32, torch.bfloat16}
    assert all(v > 0 for v in made.flops_per_second.values())
    assert made.bytes_per_second > 0 and 0 < made.launch_seconds < 1


def test_the_roofline_is_the_larger_of_both_times():
    made = Rates(100.0, {torch.float32: 10.0, torch.bfloat16: 1000.0}, 0.0)
    assert made.floor(200, 5, torch.float32) == 2.0
    assert made.floor(200, 50, torch.float32) == 5.0
    assert made.floor(200, 50, torch.bfloat16) == 2.0
