"""What a sweep declares is what it holds: outputs aside, statistics and the kernel's scratch."""

from __future__ import annotations

import pytest
import torch

from ffengine.engine.memory.meter import allocator_events
from ffengine.ops.config import Dropout, LocalPassConfig
from ffengine.ops.local_pass import bytes_moved, extra_bytes, local_pass
from ffengine.ops.memory_accounting import listening

SHAPE = (6, 40, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("config", [
    LocalPassConfig(), LocalPassConfig(dropout=Dropout(0.2)), LocalPassConfig(pool="max2"),
    LocalPassConfig(groups=(0, 7, 40))], ids=["plain", "dropout", "pool", "unequal"])
def test_declared_bytes_are_the_bytes_held(config: LocalPassConfig, layout: torch.memory_format,
                                           dtype: torch.dtype) -> None:
    a = torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout)
    y = torch.zeros(SHAPE[0], dtype=torch.int64)
    local_pass(a, y, config=config, want_da=True, backend="cpu")
    declared: list[int] = []
    with listening(declared.append), allocator_events() as events:
        r = local_pass(a, y, config=config, want_da=True, backend="cpu")
    outputs = sum(t.untyped_storage().nbytes() for t in r[:5] if t is not None)
    held = events.peak - outputs + max(declared)
    assert held == extra_bytes(SHAPE, dtype, config, channels_last=layout is torch.channels_last)


def test_bytes_moved_counts_every_large_tensor_once() -> None:
    config, maps = LocalPassConfig(), 4 * 6 * 40 * 64
    small = 4 * 6 * (2 * 10 + 1)
    assert bytes_moved(SHAPE, torch.float32, config) == 3 * maps + small
    assert bytes_moved(SHAPE, torch.float32, config, want_da=False) == 2 * maps + small
    pooled = LocalPassConfig(pool="max2")
    assert bytes_moved(SHAPE, torch.float32, pooled) == 2 * maps + maps // 4 + small
