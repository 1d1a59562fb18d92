"""The Triton batch_pass against the fp64 reference: interpreted here, compiled where a GPU is."""

from __future__ import annotations

import pytest

from tests.batch_pass_cases import cases


@pytest.mark.parametrize("case", cases())
def test_interpreted(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases())
def test_compiled(case: str) -> None:
    cases()[case].check("triton", "cuda")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shape", [(20, 32, 32), (480, 16, 16), (100, 1, 1), (7, 3, 5)])
def test_launch_covers_the_map(shape: tuple[int, int, int], pool: bool,
                               channels_last: bool) -> None:
    from ffengine.kernels.batch_pass import plan_launch

    channels, height, width = shape
    launch = plan_launch(channels, height, width, channels_last=channels_last, pool=pool,
                         itemsize=4)
    positions = -(-height // 2) * -(-width // 2) if pool else height * width
    assert launch.span * launch.splits >= positions > launch.span * (launch.splits - 1)
    assert launch.block_c * launch.block_q <= (512 if pool else 2048)
    inner = channels if channels_last or height * width == 1 else height * width
    assert pool or inner % launch.align == 0
