"""Tests of the ops may choose an instruction set or a number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ffengine.ops import backends


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    yield
    ext = backends.extension()
    if ext is not None:
        ext.set_isa("auto")
        ext.set_num_threads(0)
