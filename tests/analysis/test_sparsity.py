"""Sparsity measures: known vectors, invariances, the paper's table, one-line errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ffengine.analysis.sparsity import KINDS, sparsity, statistics

#: In the order of FFLib's files.
AUTHORS = ("hoyer", "l1", "l2", "gini")


def one_hot(n: int) -> torch.Tensor:
    x = torch.zeros(n, dtype=torch.float64)
    x[n // 3] = -3.0
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 7, 64])
def test_the_ends_of_the_scale(kind: str, n: int) -> None:
    even = {"l2": 0.5}.get(kind, 0.0)
    alone = {"gini": 1 - 1 / n}.get(kind, 1.0)
    assert sparsity(torch.full((n,), -0.5), kind) == pytest.approx(even, abs=1e-12)
    assert sparsity(one_hot(n), kind) == pytest.approx(alone, abs=1e-12)


def test_by_hand() -> None:
    x = torch.tensor([[3.0, -1.0], [0.0, 0.0]])
    p, q = 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25), 0.9 * math.log2(0.9) + (
        0.1 * math.log2(0.1))
    assert sparsity(x, "hoyer") == pytest.approx(2 - 4 / math.sqrt(10))
    assert sparsity(x, "l1") == pytest.approx(1 + p / 2)
    assert sparsity(x, "l2") == pytest.approx(1 + q / 4)
    assert sparsity(x, "gini") == pytest.approx(1 - 2 * (0.25 * 1.5 + 0.75 * 0.5) / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_sign_and_order_do_not_matter(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 5, generator=generator, dtype=torch.float64)
    moved = -7.5 * x.flatten()[torch.randperm(65, generator=generator)]
    assert sparsity(moved, kind) == pytest.approx(sparsity(x, kind), rel=1e-12)
    assert sparsity(x, kind) < sparsity(x**3, kind)


def test_a_zero_is_a_limit_or_as_published() -> None:
    x = torch.tensor([1.0, 2.0, 0.0])
    for kind in ("l1", "l2"):
        assert math.isnan(sparsity(x, kind, "nan"))
        assert not math.isnan(sparsity(x, kind))
        assert sparsity(x[:2], kind, "nan") == sparsity(x[:2], kind)
    assert not math.isnan(sparsity(x, "hoyer", "nan"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_zeros_has_no_sparsity(kind: str) -> None:
    assert math.isnan(sparsity(torch.zeros(4), kind))


def test_statistics_are_unbiased() -> None:
    low, high, mean, deviation = statistics(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert (low, high, mean) == (1.0, 6.0, 3.0)
    assert deviation == pytest.approx(math.sqrt(14 / 3))


def test_inputs_are_untouched() -> None:
    x = torch.tensor([3.0, -1.0, 2.0], dtype=torch.bfloat16)
    kept = x.clone()
    for kind in KINDS:
        sparsity(x, kind)
    assert torch.equal(x, kept)


def test_errors_are_one_line() -> None:
    for call, kind in ((lambda: sparsity(torch.zeros(1), "hoyer"), ValueError),
                       (lambda: sparsity(torch.arange(3), "gini"), TypeError),
                       (lambda: sparsity([1.0, 2.0], "l1"), TypeError),
                       (lambda: sparsity(torch.ones(3), "l3"), ValueError),
                       (lambda: sparsity(torch.ones(3), "l1", "drop"), ValueError),
                       (lambda: statistics(torch.zeros(0)), ValueError)):
        with pytest.raises(kind, match=r"^\[sparsity\] [^\n]*got [^\n]*$"):
            call()


def test_measures_are_the_authors_to_twelve_digits() -> None:
    """FFLib's own numbers of eleven vectors; NaN where it has 0 log 0."""
    with np.load(Path(__file__).parents[1] / "golden" / "fflib_sparsity.npz") as golden:
        config = json.loads(str(golden["config"]))
        for name, wanted, told in zip(config["vectors"], golden["values"], golden["stats"],
                                      strict=True):
            x = torch.from_numpy(golden[f"v.{name}"])
            np.testing.assert_allclose([sparsity(x, kind, "nan") for kind in AUTHORS], wanted,
                                       rtol=0, atol=1e-12, equal_nan=True, err_msg=name)
            np.testing.assert_allclose(statistics(x), told, rtol=1e-12, atol=1e-12, err_msg=name)
    assert config["sparsity_types"] == ["HOYER", "L1_NEG_ENTROPY", "L2_NEG_ENTROPY", "GINI"]
