"""Suite-wide rules: allocations start as NaN, GPU tests skip without a GPU, few threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # it lists torch's functions once, and must not find the poisoned ones below

# one OpenMP barrier on a busy machine can wait a scheduler quantum: 20 ms for a cross_entropy of
# twelve numbers; tests that are about threads ask for them
torch.set_num_threads(1)
# it lists torch's factories once, too: a poisoned one would make real tensors in its place
with torch.device("meta"):
    torch.empty(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What an op promises holds on every instruction set, so all its tests are marked `isa`; a
    rehearsal of bench/gpu.sh is a stage of its own (.ci/run) and comes only when asked for."""
    if "rehearsal" not in config.getoption("markexpr"):
        apart = [item for item in items if item.get_closest_marker("rehearsal")]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in apart]
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.path.parent.name == "ops":
            item.add_marker("isa")
        # keywords hold the names of folders too
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured costs go into a folder of the test run."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FFENGINE_CACHE"] = str(folder)
    return folder


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = allocate(*args, **kwargs)
        if t.device.type == "meta" or type(t) is not torch.Tensor:
            return t
        with torch.no_grad():
            if t.is_floating_point():
                t.fill_(float("nan"))
            elif not t.is_complex() and t.dtype is not torch.bool:
                t.fill_(torch.iinfo(t.dtype).min)
        return t

    return poison


@pytest.fixture(autouse=True)
def nan_poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel reads before writing it shows up as NaN."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    yield
