"""Compiled, not run: what the Triton kernels of batch_pass cost, without a GPU."""

from __future__ import annotations

import pytest

from tests.kernels.test_aot_triton import MOST_REGISTERS, Compiled
from tests.kernels.worker import Worker

WIDE = ("batch-nhwc-fp32", "batch-nhwc-bf16", "batch-nchw-bf16", "batch-linear-fp32")
MIDDLES = ("middle", "middle-alone", "middle-unequal", "middle-many")
ALL = (*WIDE, "batch-pool-nhwc-fp32", "batch-first-nhwc-bf16", "batch-first-nchw-fp32",
       "batch-peer", *MIDDLES)
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled(triton_cache: str) -> Compiled:
    workers = {
        arch: Worker("bench.aot", str(arch), *ALL, TRITON_CACHE_DIR=triton_cache)
        for arch in ARCHITECTURES
    }
    return {arch: worker.result() for arch, worker in workers.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills(arch: int, compiled: Compiled) -> None:
    rows = compiled[arch]
    assert {r["kernel"] for r in rows} == {"batch_stats_kernel", "batch_apply_kernel",
                                           "peer_stats_kernel", "peer_apply_kernel",
                                           "batch_middle_kernel"}
    table = "\n".join(f"{r['variant']} {r['kernel']} {r['registers']} {r['spills']}" for r in rows)
    assert not any(r["spills"] for r in rows), table
    assert max(r["registers"] for r in rows) <= MOST_REGISTERS, table


@pytest.mark.parametrize("variant", WIDE)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_maps_move_16_bytes_at_once(arch: int, variant: str, compiled: Compiled) -> None:
    rows = [r for r in compiled[arch] if r["variant"] == variant]
    assert len(rows) == 2
    for row in rows:
        assert row["loads_16"], row
    assert rows[1]["stores_16"], rows[1]
