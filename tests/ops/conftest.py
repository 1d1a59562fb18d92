"""Tests of the ops may choose an instruction set or a number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ffengine.ops import backends

EXTENSION = backends.extension()


@pytest.fixture(params=[] if EXTENSION is None else EXTENSION.isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this machine and build have, in use; put back afterwards."""
    assert EXTENSION is not None
    EXTENSION.set_isa(request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    yield
    if EXTENSION is not None:
        EXTENSION.set_isa("auto")
        EXTENSION.set_num_threads(0)
