"""The launch choice: a pure function of shape and dtype."""

from __future__ import annotations

import inspect

import pytest
from ffengine.kernels import launch


def plan(channels: int, height: int, width: int, groups: int, **change: object) -> launch.Launch:
    settings = {"equal": True, "channels_last": False, "pool": False, "itemsize": 4,
                "dropout": False, **change}
    return launch.plan_launch(channels, height, width, groups, **settings)


def test_batch_is_no_argument() -> None:
    names = set(inspect.signature(launch.plan_launch).parameters)
    assert not names & {"n", "N", "batch", "rows"}


@pytest.mark.parametrize("change", [
    {}, {"dropout": True}, {"pool": True}, {"itemsize": 2}, {"channels_last": True},
    {"channels_last": True, "pool": True, "dropout": True}, {"equal": False},
])
@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1), (10, 1, 1, 10), (2000, 1, 1, 10), (100, 32, 32, 10), (1000, 7, 9, 1000),
    (128, 33, 31, 1), (4096, 2, 2, 7),
])
def test_splits_cover_a_group_exactly(shape: tuple[int, ...], change: dict[str, object]) -> None:
    channels, height, width, groups = shape
    if channels % groups and change.get("equal", True):
        groups = 1
    made = plan(channels, height, width, groups, **change)
    assert made.span * (made.splits - 1) < max(made.span * made.splits, 1)
    windows = -(-height // 2) * -(-width // 2) if change.get("pool") else height * width
    widest = channels // groups if change.get("equal", True) else channels - groups + 1
    length = windows if change.get("channels_last") else widest * windows
    assert (made.apply_splits - 1) * made.span < length <= made.apply_splits * made.span
    assert made.splits <= made.apply_splits
    for block in (made.block_outer, made.block_inner, made.block_k, made.rows):
        assert block & (block - 1) == 0
    assert made.block_k >= groups


@pytest.mark.parametrize(("itemsize", "dropout", "elements"), [
    (4, False, 2048), (2, False, 4096), (4, True, 1024), (2, True, 2048),
])
def test_tile_follows_the_element_size(itemsize: int, dropout: bool, elements: int) -> None:
    made = plan(640, 64, 64, 10, itemsize=itemsize, dropout=dropout)
    assert made.block_inner == elements and made.span == 4 * elements


@pytest.mark.parametrize(("shape", "change", "align"), [
    ((100, 32, 32, 10), {}, 16), ((100, 3, 3, 10), {}, 2), ((2000, 1, 1, 10), {}, 8),
    ((100, 32, 32, 10), {"channels_last": True}, 2),
    ((160, 3, 3, 10), {"channels_last": True}, 16),
    ((16, 8, 8, 3), {"equal": False}, 16), ((16, 3, 8, 3), {"equal": False}, 8),
])
def test_alignment(shape: tuple[int, ...], change: dict[str, object], align: int) -> None:
    assert plan(*shape, **change).align == align


@pytest.mark.parametrize(("shape", "change", "quads"), [
    ((100, 32, 32, 10), {}, True), ((90, 3, 3, 10), {}, False),
    ((100, 32, 32, 10), {"channels_last": True}, True),
    ((100, 3, 3, 10), {"channels_last": True}, False), ((100, 32, 32, 10), {"pool": True}, False),
    ((3, 1, 1, 1), {}, False),
])
def test_dropout_draws_four_words_at_once(shape: tuple[int, ...], change: dict[str, object],
                                          quads: bool) -> None:
    assert plan(*shape, dropout=True, **change).quads is quads


def test_scratch_is_for_split_groups_only() -> None:
    assert launch.scratch_bytes(128, 10, plan(100, 16, 16, 10)) == 0
    large = plan(128, 32, 32, 1)
    assert large.splits == 16
    assert launch.scratch_bytes(128, 1, large) == 128 * 16 * 12
