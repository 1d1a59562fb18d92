"""The CUDA kernels' own source, emulated on the CPU, against the fp64 reference.

It says nothing of speed or of races that only hardware shows; it holds the index arithmetic, the
merges, the barriers' placement and every formula to the rule on machines without a GPU.
"""

from __future__ import annotations

from typing import Any

import emulate
import pytest
import torch
from local_pass_cuda_cases import CASES, CLUSTER_CASES, DROP, Case, check, expand
from test_local_pass_cuda import RESNET17 as STAGES

from ffengine.ops import local_pass as op
from ffengine.ops.config import Dropout, LocalPassConfig, symba
from ffengine.ops.local_pass import LocalPassOutput, local_pass
from tests.ops import test_local_pass_join as join

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def run(*args: Any, **kwargs: Any) -> LocalPassOutput:
    return local_pass(*args, **kwargs, backend="cuda")


@pytest.mark.parametrize(("case", "dtype", "layout"), expand(CASES))
def test_two_sweeps(case: Case, dtype: torch.dtype, layout: str,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    extension = emulate.install(monkeypatch)
    check(case, dtype, layout, "cpu", run)
    assert extension.plans[0].blocks == 0


@pytest.mark.parametrize(("case", "dtype", "layout"), expand(CLUSTER_CASES))
def test_one_read(case: Case, dtype: torch.dtype, layout: str,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    extension = emulate.install(monkeypatch, emulate.SMALL_HOPPER)
    check(case, dtype, layout, "cpu", run)
    assert extension.plans[0].blocks > 0, "the case was meant for the cluster kernel"


@pytest.mark.parametrize("device", [emulate.A100, emulate.H100], ids=["two-sweeps", "one-read"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("groups", "p"), [(10, 0.0), (10, 0.2), (100, 0.0)], ids=str)
@pytest.mark.parametrize("shape", [(2, *shape[1:]) for shape in STAGES], ids=str)
def test_resnet17_small(shape: tuple[int, ...], groups: int, p: float, layout: str,
                        device: emulate.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples of every stage, on the blocks that a real device gets."""
    emulate.install(monkeypatch, device)
    config = LocalPassConfig(groups=groups, dropout=Dropout(p, seed=3, layer=1, step=2))
    check(Case("resnet17", shape, config), torch.bfloat16, layout, "cpu", run)


def test_unknown_label_is_nan_not_a_stray_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, shape in ((emulate.A100, (2, 8, 4, 4)), (emulate.H100, (2, 40, 16, 16))):
        emulate.install(monkeypatch, device)
        monkeypatch.setattr(op, "check_targets", lambda *_: None)  # a GPU's labels are not read
        out = run(torch.randn(shape), torch.tensor([1, 99]), config=LocalPassConfig(groups=2),
                  want_da=True)
        assert out.loss is not None and out.loss[1].isnan() and not out.loss[0].isnan()


LAYOUTS = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
JOINED = pytest.mark.parametrize("joined", [False, True], ids=["alone", "shortcut"])


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("name", join.SHAPES)
@pytest.mark.parametrize("beside", [(0, 0), (12, 12)], ids=["dense", "slice"])
@JOINED
def test_join(name: str, joined: bool, beside: tuple[int, int], dtype: torch.dtype,
              layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate.install(monkeypatch)
    drawn = join.given(join.SHAPES[name], dtype, layout, "cpu")
    join.check_join("cuda", "cpu", drawn, layout, joined, beside)


@LAYOUTS
@JOINED
@pytest.mark.parametrize(("channels", "dtype", "beside", "vector"), [
    (100, torch.float32, (100, 0), 4),
    (100, torch.bfloat16, (0, 0), 8),
    (100, torch.bfloat16, (100, 0), 4),  # ResNet-17's first concatenation: 8 bytes at a time
    (200, torch.bfloat16, (0, 200), 8),
    (200, torch.float16, (200, 0), 8),
    (40, torch.bfloat16, (0, 4), 4),
], ids=str)
def test_join_read_once(channels: int, dtype: torch.dtype, beside: tuple[int, int], vector: int,
                        joined: bool, layout: torch.memory_format,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    extension = emulate.install(monkeypatch, emulate.SMALL_HOPPER)
    drawn = join.given((2, channels, 16, 16), dtype, layout, "cpu")
    join.check_join("cuda", "cpu", drawn, layout, joined, beside)
    assert all(plan.blocks > 0 for plan in extension.plans)
    assert extension.plans[1].vector == (vector if layout is NHWC else 16 // dtype.itemsize)


def test_join_of_odd_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that are not whole vectors apart: z element by element, by two sweeps."""
    extension = emulate.install(monkeypatch)
    drawn = join.given((2, 100, 16, 16), torch.bfloat16, NHWC, "cpu")
    join.check_join("cuda", "cpu", drawn, NHWC, True, (1, 2))
    extension.device = emulate.H100
    a, y, config = drawn
    around = torch.empty((2, 103, 16, 16), dtype=a.dtype).contiguous(memory_format=NHWC)
    run(a, y, config=config, out=around[:, 1:101])
    assert extension.plans[-1].blocks == 0


@pytest.mark.parametrize("device", [emulate.SMALL_AMPERE, emulate.SMALL_HOPPER],
                         ids=["two-sweeps", "one-read"])
@pytest.mark.parametrize("shape", [(4, 20, 3, 3), (2, 40, 16, 16), (3, 40)], ids=str)
def test_clock(shape: tuple[int, ...], device: emulate.Device,
               monkeypatch: pytest.MonkeyPatch) -> None:
    emulate.install(monkeypatch, device)
    join.check_clock("cuda", "cpu", shape)


def test_nan_reaches_every_result(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate.install(monkeypatch)
    case = next(c for c in CASES if c.id == "plain")
    a = torch.randn(case.shape)
    a[1, 2, 1, 1] = float("nan")
    out = run(a, torch.zeros(3, dtype=torch.int64), config=case.config, want_da=True)
    assert out.z is not None and out.loss is not None
    assert out.g[1, 0].isnan() and out.loss[1].isnan() and out.z[1, 2, 1, 1].isnan()
    assert not out.g[0].isnan().any() and not out.loss[2].isnan()


@pytest.mark.parametrize("device", [emulate.SMALL_AMPERE, emulate.SMALL_HOPPER],
                         ids=["ampere", "hopper"])
@pytest.mark.parametrize("shape", [(3, 8), (3, 2048)], ids=["short", "long"])
def test_da_over_a(shape: tuple[int, ...], device: emulate.Device,
                   monkeypatch: pytest.MonkeyPatch) -> None:
    emulate.install(monkeypatch, device)
    a, y = torch.randn(shape), torch.tensor([0, 1, 0])
    settings: dict[str, Any] = {"config": LocalPassConfig(groups=2, goodness="mean_sq"),
                                "want_z": False, "want_da": True}
    beside = run(a, y, **settings)
    over = run(a, y, da_out=a, **settings)
    assert beside.da is not None and over.da is a
    for one, other in zip(over[1:5], beside[1:5], strict=True):
        assert torch.equal(one, other)


KB = 1024
#: (shape, dtype): of the one-read kernel blocks a sample, bytes a slab, vectors side by side, row
#: lanes, shared bytes a block with 10 and with 100 groups; on H100.
RESNET17 = {
    ((128, 100, 32, 32), torch.float32): (8, 51200, 25, 5, 56096, 58608),
    ((128, 200, 16, 16), torch.float32): (8, 25600, 50, 2, 30496, 33008),
    ((128, 400, 8, 8), torch.float32): (8, 12800, 100, 1, 17696, 20208),
    ((128, 800, 4, 4), torch.float32): (4, 12800, 128, 1, 17696, 20208),
    ((128, 100, 32, 32), torch.bfloat16): (8, 25600, 25, 5, 34592, 37104),
    ((128, 200, 16, 16), torch.bfloat16): (8, 12800, 25, 5, 21792, 24304),
    ((128, 400, 8, 8), torch.bfloat16): (4, 12800, 50, 2, 21792, 24304),
    ((128, 800, 4, 4), torch.bfloat16): (2, 12800, 100, 1, 21792, 24304),
}


@pytest.mark.parametrize("groups", [10, 100])
@pytest.mark.parametrize(("shape", "dtype"), RESNET17, ids=str)
def test_resnet17(shape: tuple[int, ...], dtype: torch.dtype, groups: int) -> None:
    """Every layer is read once in 16-byte vectors, by slabs that leave room for three blocks or
    more a multiprocessor."""
    found = emulate.planned(emulate.H100, shape, LocalPassConfig(groups=groups), NHWC, dtype)
    blocks, slab, width, lanes, *shared = RESNET17[shape, dtype]
    (plan,) = found.plans
    assert plan == emulate.Plan(blocks, 16 // dtype.itemsize, slab // dtype.itemsize, slab,
                                shared[groups == 100], width, lanes)
    assert found.launches == [
        emulate.Launch("one_read", (128 * blocks, 1, 1), 128, plan.shared_bytes, blocks)]
    assert 228 * KB // (plan.shared_bytes + KB) >= 3  # a kilobyte a block is the system's
    assert slab <= 16 * KB or blocks == 8


#: (shape, dtype): of the two sweeps rounds over samples that L2 holds, then blocks and threads of
#: the first round's gather and apply; on A100.
TWO_SWEEPS = {
    ((128, 100, 32, 32), torch.float32): (3, (129, 512), (559, 512)),
    ((128, 200, 16, 16), torch.float32): (2, (256, 512), (448, 512)),
    ((128, 400, 8, 8), torch.float32): (1, (256, 512), (512, 512)),
    ((128, 800, 4, 4), torch.float32): (1, (256, 416), (256, 416)),
    ((128, 100, 32, 32), torch.bfloat16): (2, (64, 512), (448, 512)),
    ((128, 200, 16, 16), torch.bfloat16): (1, (256, 512), (512, 512)),
    ((128, 400, 8, 8), torch.bfloat16): (1, (256, 416), (256, 512)),
    ((128, 800, 4, 4), torch.bfloat16): (1, (256, 224), (128, 416)),
}


@pytest.mark.parametrize("groups", [10, 100])
@pytest.mark.parametrize(("shape", "dtype"), TWO_SWEEPS, ids=str)
def test_resnet17_without_clusters(shape: tuple[int, ...], dtype: torch.dtype,
                                   groups: int) -> None:
    found = emulate.planned(emulate.A100, shape, LocalPassConfig(groups=groups), NHWC, dtype)
    assert found.plans[0].blocks == 0
    rounds, *sizes = TWO_SWEEPS[shape, dtype]
    assert [one.kernel for one in found.launches] == [
        "gather_nhwc", "finalise", "apply_nhwc"] * rounds
    assert [(one.grid[0], one.threads) for one in found.launches[:3:2]] == sizes


@pytest.mark.parametrize(("shape", "settings", "device"), [
    ((2, 100, 32, 32), {}, emulate.A100),  # no clusters before Hopper
    ((2, 100, 32, 32), {}, emulate.RTX5090),  # shared memory of 99 KB a block
    ((2, 100, 32, 32), {"pool": "max2"}, emulate.H100),
    ((2, 100, 32, 32), {"groups": 1, "loss": symba()}, emulate.H100),
    ((2, 100, 32, 32), {"dropout": DROP, "relu_gradient": "straight_through"}, emulate.H100),
    ((2, 400, 64, 64), {}, emulate.H100),  # 6.5 MB a sample
    ((2, 10, 7, 5), {}, emulate.H100),  # samples that are not whole vectors
    ((2, 20, 4, 4), {}, emulate.H100),  # 1280 bytes a sample
])
def test_two_sweeps_are_planned(shape: tuple[int, ...], settings: dict[str, Any],
                                device: emulate.Device) -> None:
    assert emulate.planned(device, shape, LocalPassConfig(**settings)).plans[0].blocks == 0
