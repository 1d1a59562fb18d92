"""Compiled, not run: what the Triton kernels cost on four architectures, without a GPU.

The worker records the launches of real calls, so specialisation and options are theirs.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.worker import Worker

#: Tiles and layouts with the most registers; everything on the two most common architectures.
PIXELS = ("pixels-100-bf16", "pixels-200-bf16", "pixels-400-bf16", "pixels-800-bf16",
          "pixels-100-of-100-bf16", "pixels-100-dropout-bf16", "pixels-200-pool-bf16",
          "pixels-100-squares-bf16", "pixels-100-joined-bf16", "pixels-200-joined-bf16",
          "runs-joined-bf16")
PIXELS_32 = ("pixels-100-fp32", "pixels-200-fp32", "pixels-400-fp32", "pixels-800-fp32",
             "pixels-100-of-100-fp32", "pixels-800-dropout-fp32")
CORE = (*PIXELS, "group-bf16", "dropout-fp32", "dropout-nhwc-bf16", "pool-sum-fp32", "adamw",
        "adamw-from-memory", "states-8bit-from-memory", "linear-step-fp32", "linear-step-bf16",
        "states-8bit", "states-8bit-bf16-weight", "states-bf16-bf16-weight")
ALL = (*CORE, *PIXELS_32, "group-fp32", "group-nhwc-fp32", "dropout-pool-nhwc-fp32",
       "length-linear-fp16", "blend-linear-fp32", "unequal-k1000-fp32", "sgd", "states-bf16",
       "states-fp32-bf16-weight")
COMPILED = {80: ALL, 87: CORE, 90: ALL, 100: CORE}
#: 65536 registers over 2048 threads: up to 128 still leave a quarter of an SM's threads resident.
MOST_REGISTERS = 128
#: Neighbouring NCHW windows are two elements apart; every other variant moves 16 bytes at once.
#: Of 100 16-bit channels a pixel is 200 bytes, and dropout draws by single pixels.
NARROW = ("pool-sum-fp32", "pixels-100-dropout-bf16")
#: Scalars of a (sample, group): its statistics, coefficient and offsets, in NHWC those of each of a
#: thread's eight columns; g, sums and moments. Of a row of linear_step: its scale. Of 8-bit states:
#: two scales, and the codes of m and v, one access each: eight at once, as many as a thread has.
#: From memory: a step's numbers. A slice behind 100 16-bit channels begins 200 bytes further.
SMALL_LOADS = {"stats_kernel": 2, "apply_kernel": 5, "rows_apply_kernel": 24,
               "linear_finish_kernel": 4, "adamw-from-memory": 3, "states-8bit": 4,
               "states-8bit-bf16-weight": 4, "states-8bit-from-memory": 8}
SMALL_STORES = {"stats_kernel": 3, "rows_stats_kernel": 3, "linear_prepare_kernel": 1,
                "states-8bit": 4, "states-8bit-bf16-weight": 4, "states-8bit-from-memory": 4,
                "pixels-100-joined-bf16": 8}

Rows = list[dict[str, Any]]
Compiled = dict[int, Rows]


@pytest.fixture(scope="module")
def compiled(triton_cache: str) -> Compiled:
    """Architecture -> resource usage of its variants' kernels, two processes at a time."""
    found = {}
    for pair in ((80, 100), (90, 87)):
        workers = {
            arch: Worker("bench.aot", str(arch), *COMPILED[arch], TRITON_CACHE_DIR=triton_cache)
            for arch in pair
        }
        found |= {arch: worker.result() for arch, worker in workers.items()}
    return found


@pytest.mark.parametrize("arch", COMPILED)
def test_no_spills(arch: int, compiled: Compiled) -> None:
    rows = compiled[arch]
    assert {r["kernel"] for r in rows} == {"stats_kernel", "finish_kernel", "apply_kernel",
                                           "rows_stats_kernel", "rows_apply_kernel",
                                           "optimizer_kernel", "linear_prepare_kernel",
                                           "linear_finish_kernel"}
    spilled = [(r["variant"], r["kernel"], r["spills"]) for r in rows if r["spills"]]
    assert not spilled
    table = "\n".join(f"{r['variant']} {r['kernel']} {r['registers']}" for r in rows)
    assert max(r["registers"] for r in rows) <= MOST_REGISTERS, table


@pytest.mark.parametrize(("arch", "variant"), [
    (arch, variant) for arch, names in COMPILED.items() for variant in names
    if variant not in NARROW])
def test_widest_loads_and_stores(arch: int, variant: str, compiled: Compiled) -> None:
    rows = [r for r in compiled[arch]
            if r["variant"] == variant and r["kernel"] != "finish_kernel"]
    assert rows
    for row in rows:
        assert row["loads_16"] > 0, row
        for table, way in ((SMALL_LOADS, "loads"), (SMALL_STORES, "stores")):
            allowed = table.get(variant, table.get(row["kernel"], 0))
            assert row[way] - row[f"{way}_16"] <= allowed, row


def test_batch_seed_and_step_compile_nothing_anew(triton_cache: str) -> None:
    forms = Worker("bench.aot", "90", "--batches", TRITON_CACHE_DIR=triton_cache).result()
    assert forms == {"stats_kernel": 1, "finish_kernel": 1, "apply_kernel": 1,
                     "optimizer_kernel": 2, "linear_prepare_kernel": 1,
                     "linear_finish_kernel": 1}  # of the optimizer: fp32, and 8-bit states
