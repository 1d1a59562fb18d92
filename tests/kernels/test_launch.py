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
    rows = -(-windows // made.row_pixels)
    length = rows if change.get("channels_last") else widest * windows
    assert (made.apply_splits - 1) * made.span < length <= made.apply_splits * made.span
    assert made.splits <= made.apply_splits
    for block in (made.block_outer, made.block_inner, made.block_k, made.rows, made.block_g,
                  made.block_b, made.block_s):
        assert block & (block - 1) == 0
    assert made.block_k >= groups
    if change.get("channels_last"):
        assert made.row_pixels * channels <= made.block_inner * made.chunks
        assert made.chunks == 1 or made.row_pixels == 1
        assert made.block_b >= min(widest * made.row_pixels, made.block_inner)


@pytest.mark.parametrize(("itemsize", "dropout", "elements"), [
    (4, False, 2048), (2, False, 4096), (4, True, 1024), (2, True, 2048),
])
def test_tile_follows_the_element_size(itemsize: int, dropout: bool, elements: int) -> None:
    made = plan(640, 64, 64, 10, itemsize=itemsize, dropout=dropout)
    assert made.block_inner == elements
    assert made.span == 8 * elements if dropout and itemsize == 4 else 4 * elements
    rows = plan(640, 64, 64, 10, itemsize=itemsize, dropout=dropout, channels_last=True)
    assert rows.block_inner * rows.block_outer == elements


@pytest.mark.parametrize(("tiles", "swept"), [
    (1, 1), (8, 1), (9, 2), (26, 4), (32, 4), (100, 4), (128, 4), (129, 5), (10_000, 313),
])
def test_programs_a_sample_are_some_and_never_many(tiles: int, swept: int) -> None:
    assert launch.tiles_per_split(tiles) == swept
    assert -(-tiles // swept) <= launch.MAX_SPLITS


@pytest.mark.parametrize(("channels", "side", "itemsize", "pixels", "block", "idle"), [
    (100, 32, 2, 10, 1024, 0.03), (200, 16, 2, 5, 1024, 0.03), (400, 8, 2, 1, 512, 0.22),
    (800, 4, 2, 1, 1024, 0.22), (100, 32, 4, 5, 512, 0.03), (200, 16, 4, 5, 1024, 0.03),
    (1300, 8, 4, 1, 512, 0.16), (3, 32, 2, 40, 128, 0.07),
])
def test_rows_of_pixels_fill_vectors_and_threads(channels: int, side: int, itemsize: int,
                                                 pixels: int, block: int, idle: float) -> None:
    """ResNet-17's maps, a pixel wider than a tile, an image."""
    made = plan(channels, side, side, 1, itemsize=itemsize, channels_last=True)
    assert (made.row_pixels, made.block_inner) == (pixels, block)
    assert made.row_pixels * channels * itemsize % 16 == 0
    assert 1 - made.row_pixels * channels / (made.block_inner * made.chunks) <= idle


def test_a_grid_is_one_dimension_of_31_bits() -> None:
    assert launch.grid("local_pass", 3, 70_000, 10) == (2_100_000,)
    with pytest.raises(ValueError, match=r"\[local_pass\] expected at most 2\^31 - 1 programs, "
                       r"got 2147483648: give the batch in smaller tiles"):
        launch.grid("local_pass", 2, 2**30)


def test_offsets_in_a_sample_are_32_bits() -> None:
    with pytest.raises(ValueError, match=r"expected under 2\^30 elements a sample, got 1073741824"):
        plan(1024, 1024, 1024, 1)


@pytest.mark.parametrize(("shape", "change", "align"), [
    ((100, 32, 32, 10), {}, 16), ((100, 3, 3, 10), {}, 2), ((2000, 1, 1, 10), {}, 8),
    ((100, 32, 32, 10), {"channels_last": True}, 4), ((100, 3, 3, 10), {"channels_last": True}, 4),
    ((100, 32, 32, 10), {"channels_last": True, "itemsize": 2}, 8),
    ((100, 32, 32, 10), {"channels_last": True, "pool": True}, 4),
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
    assert launch.scratch_bytes(128, 10, plan(100, 8, 8, 10), True) == 0
    large = plan(128, 32, 32, 1)
    assert large.splits == 16
    assert launch.scratch_bytes(128, 1, large, False) == 128 * 16 * 8
    assert launch.scratch_bytes(128, 1, large, True) == 128 * 16 * 12
    wide = plan(1300, 8, 8, 10, channels_last=True)
    assert wide.parts == wide.splits * 3
