"""Shapes that a small emulated call never reaches: no launch that a device would refuse.

The emulator refuses what hardware does. Here it only checks the launches, so sizes may be any.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import emulate
import pytest
import torch

from ffengine.ops.config import PHASE_STATS as LOCAL_STATS
from ffengine.ops.config import LocalPassConfig, symba
from ffengine.ops.optim import OptimConfig, optim_call
from ffengine.ops.params import (
    PHASE_APPLY,
    PHASE_MIDDLE,
    PHASE_PEER_APPLY,
    PHASE_PEER_STATS,
    PHASE_STATS,
    BatchPassCall,
    BatchPassTensors,
    LinearCall,
    StepCall,
)

NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
DEVICES = pytest.mark.parametrize("device", [emulate.A100, emulate.H100], ids=["a100", "h100"])
MANY = 70_000  # above the 65535 blocks along a grid's y and z


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("settings", [
    {}, {"pool": "max2"}, {"groups": 1, "loss": symba()}], ids=["plain", "pool", "pairs"])
@pytest.mark.parametrize("shape", [
    (MANY, 40, 4, 4), (MANY, 40, 16, 16), (2**23, 10, 2, 2), (4, 40, 4096, 4096),
    (2, 10 * 2**15, 6, 6)],
    ids=str)
def test_local_pass(shape: tuple[int, ...], settings: dict[str, object],
                    layout: torch.memory_format, device: emulate.Device) -> None:
    config = LocalPassConfig(**settings)  # type: ignore[arg-type]
    launches = emulate.planned(device, shape, config, layout).launches
    assert all(one.grid[1:] == (1, 1) for one in launches)
    # half of L2 holds what is swept twice, or a sixteenth of the batch
    assert 1 <= len(launches) <= 16 * 3


@DEVICES
@pytest.mark.parametrize("groups", [1024, 4096, 2**18])
def test_many_groups(groups: int, device: emulate.Device) -> None:
    shape = (64, 2**18, 2, 2)
    for layout in (NCHW, NHWC):
        config = LocalPassConfig(groups=groups)
        found = emulate.planned(device, shape, config, layout, torch.bfloat16, LOCAL_STATS)
        assert found.launches


def test_local_pass_refuses_in_words() -> None:
    with pytest.raises(ValueError, match=r"local_pass\] expected under 2\^30 elements a sample"):
        emulate.planned(emulate.A100, (1, 2**18, 64, 64), LocalPassConfig(groups=2))
    with pytest.raises(ValueError, match="expected at most 2147483647 blocks, got 2147483648"):
        emulate.planned(emulate.A100, (2**31, 256, 1, 1), LocalPassConfig(groups=256), NCHW,
                        phase=LOCAL_STATS)


def batch_pass(phase: int, shape: Sequence[int], channels_last: bool, pool: bool, dtype: int = 0,
               device: emulate.Device = emulate.SMALL_AMPERE,
               norm_first: bool = True) -> list[emulate.Launch]:
    extension = emulate.Extension(device)
    extension.dry = True
    call = BatchPassCall(phase, channels_last, pool, norm_first, True, False)
    extension.batch_pass_cuda([emulate.ANYWHERE] * len(BatchPassTensors._fields), shape, dtype,
                              call, 0)
    return extension.launches


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("phase", [PHASE_STATS, PHASE_APPLY])
@pytest.mark.parametrize("shape", [
    (MANY, 40, 4, 4), (2, 10, 4096, 4096), (2, 2**22, 6, 6), (3, 2**29, 1, 1), (2**24, 7, 3, 3)],
    ids=str)
def test_batch_norm(shape: tuple[int, ...], phase: int, channels_last: bool, pool: bool) -> None:
    for dtype in (0, 1):
        launches = batch_pass(phase, shape, channels_last, pool, dtype)
        assert launches and all(one.grid[1:] == (1, 1) for one in launches)


#: Of CwComp's maps in channels_last, pooled, fp32 (0) and bf16 (1): blocks, threads and shared
#: bytes of sweep 1, blocks and threads of sweep 2. A thread owns 16 bytes of channels; blocks of
#: sweep 1 share a sample's as long as each has 128 bytes of a pixel.
CWCOMP = {
    ((128, 80, 32, 32), 0): ((256, 512, 16588), (256, 512)),
    ((128, 80, 32, 32), 1): ((128, 512, 32972), (256, 512)),
    ((128, 480, 16, 16), 0): ((384, 480, 15408), (256, 480)),
    ((128, 480, 16, 16), 1): ((384, 512, 32868), (256, 480)),
}


@pytest.mark.parametrize(("shape", "dtype"), CWCOMP, ids=str)
def test_cwcomp(shape: tuple[int, ...], dtype: int) -> None:
    """On a device of 132 multiprocessors."""
    sweeps = [batch_pass(phase, shape, True, True, dtype, emulate.H100, norm_first=False)
              for phase in (PHASE_STATS, PHASE_APPLY)]
    (stats,), (apply,) = sweeps
    assert stats.kernel == "batch_stats_nhwc" and apply.kernel == "batch_apply_nhwc"
    assert ((stats.grid[0], stats.threads, stats.shared),
            (apply.grid[0], apply.threads)) == CWCOMP[shape, dtype]


@pytest.mark.parametrize("shape", [(MANY, 40, 4, 4), (3, 2**29, 1, 1)], ids=str)
def test_middle(shape: tuple[int, ...]) -> None:
    extension = emulate.Extension()
    extension.dry = True
    call = BatchPassCall(PHASE_MIDDLE, True, False, True, True, False, groups=4, loss=0)
    extension.batch_pass_cuda([emulate.ANYWHERE] * len(BatchPassTensors._fields), shape, 0, call, 0)
    assert [one.kernel for one in extension.launches] == [
        "middle_channels", "middle_rows", "middle_answers"]
    assert [one.grid for one in extension.launches] == [
        (-(-shape[1] // 32), 1, 1), (shape[0], 1, 1), (-(-shape[1] // 32), 1, 1)]


@pytest.mark.parametrize("phase", [PHASE_PEER_STATS, PHASE_PEER_APPLY])
@pytest.mark.parametrize("shape", [(MANY, 40, 1, 1), (3, 2**29, 1, 1)], ids=str)
def test_peer(shape: tuple[int, ...], phase: int) -> None:
    assert batch_pass(phase, shape, False, False)


def test_batch_pass_refuses_in_words() -> None:
    with pytest.raises(ValueError, match=r"batch_pass\] expected under 2\^30 elements a sample"):
        batch_pass(PHASE_APPLY, (1, 2**18, 64, 64), False, False)
    with pytest.raises(ValueError, match="expected at most 2147483647 blocks"):
        batch_pass(PHASE_APPLY, (2**31, 40, 64, 64), False, False)


def test_linear_step() -> None:
    extension = emulate.Extension()
    extension.dry = True
    call, at = LinearCall(eps=1e-5, chunk=64), emulate.ANYWHERE
    for rows in (MANY * 64, 2**33):
        extension.linear_prepare_cuda([at] * 5, (rows, 20, 30), 1, call, 0)
        extension.linear_finish_cuda([at] * 3, (rows, 5000), 1, call, 0)
        (launch,) = extension.launches
        assert launch.grid == (-(-rows // 64) * 3, 1, 1)  # 625 vectors of eight columns
    with pytest.raises(ValueError, match="expected at most 2147483647 blocks"):
        extension.linear_finish_cuda([at] * 3, (2**40, 5000), 1, call, 0)


def test_optimizer_step() -> None:
    extension = emulate.Extension()
    extension.dry = True
    call, at = StepCall(optim_call(OptimConfig("adam"), 1), 1.0), emulate.ANYWHERE
    tensors = (at, at, at, at, 0, 0, 0, 0)
    for n in (2**32 + 3, 2**40):
        extension.optimizer_step_cuda(tensors, (n,), 0, call, 0)
        assert extension.launches[0].grid == (n // 1024, 1, 1)
    with pytest.raises(ValueError, match="expected at most 2147483647 blocks"):
        extension.optimizer_step_cuda(tensors, (2**42,), 0, call, 0)


@pytest.mark.parametrize(("grid", "block", "shared", "cluster", "why"), [
    ((1, 1, 1), (1, 1, 1), 0, 1, None),
    ((2**31 - 1, 65535, 65535), (1024, 1, 1), 48 << 10, 1, None),
    ((2**31, 1, 1), (1, 1, 1), 0, 1, "grid x above 2147483647"),
    ((1, 65536, 1), (1, 1, 1), 0, 1, "grid y or z above 65535"),
    ((1, 1, 65536), (1, 1, 1), 0, 1, "grid y or z above 65535"),
    ((0, 1, 1), (1, 1, 1), 0, 1, "an empty grid or block"),
    ((1, 1, 1), (32, 33, 1), 0, 1, "more than 1024 threads a block"),
    ((1, 1, 1), (1, 1, 65), 0, 1, "more than 1024 threads a block"),
    ((1, 1, 1), (32, 1, 1), (48 << 10) + 1, 1, "more dynamic shared memory than was allowed"),
    ((16, 1, 1), (32, 1, 1), 0, 16, "more than 8 blocks a cluster"),
    ((12, 1, 1), (32, 1, 1), 0, 8, "a grid that is not whole clusters"),
])
def test_what_hardware_refuses(grid: tuple[int, ...], block: tuple[int, ...], shared: int,
                               cluster: int, why: str | None) -> None:
    refusal = emulate.library("linear").emulated_refusal
    refusal.restype = ctypes.c_char_p
    said = refusal(emulate.integers(*grid, *block, shared, cluster))
    assert (None if said is None else said.decode()) == why


def test_shared_memory_is_asked_for_once_a_device() -> None:
    """The opt-in is no part of a call: a kernel's first one on a device asks for all there is."""
    device = emulate.H100._replace(multiprocessors=131)  # one that no other test has used
    asked = emulate.library("local").emulated_attributes_set
    before = asked()
    for _ in range(3):
        for size in (16, 32):
            shape = (4, 100, size, size)
            assert emulate.planned(device, shape, LocalPassConfig(), NHWC).plans[0].blocks > 0
    assert asked() == before + 1
    emulate.planned(device, (4, 100, 32, 32), LocalPassConfig())
    assert asked() == before + 2  # another kernel
