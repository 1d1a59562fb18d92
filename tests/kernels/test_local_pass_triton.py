"""The Triton local_pass against the fp64 reference: interpreted here, compiled where a GPU is."""

from __future__ import annotations

import itertools

import pytest

from tests.kernels.cases import FACTORS, all_cases, feasible, pairwise
from tests.kernels.check import check, check_rows_alone

IDS = list(all_cases())


ALONE = ["rows-alone-nchw", "rows-alone-nhwc"]


@pytest.mark.parametrize("case", [*IDS, *ALONE])
def test_interpreted(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.gpu
@pytest.mark.parametrize("case", IDS)
def test_compiled(case: str) -> None:
    check(all_cases()[case], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_alone_compiled(channels_last: bool) -> None:
    check_rows_alone(channels_last, "cuda")


def test_cases_cover_every_pair_of_settings() -> None:
    picks = pairwise()
    missing = []
    for (a, left), (b, right) in itertools.combinations(FACTORS.items(), 2):
        for i, j in itertools.product(left, right):
            plain = {n: v[0] for n, v in FACTORS.items()} | {"map": "nchw-4x4", a: i, b: j}
            if feasible(plain) and not any(p[a] == i and p[b] == j for p in picks):
                missing.append((a, i, b, j))
    assert not missing
