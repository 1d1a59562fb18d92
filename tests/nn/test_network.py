"""Wiring of local layers: shapes, errors, ranges, what a state dict holds."""

from __future__ import annotations

import pytest
import torch

from ffengine.nn import LocalConv2d, LocalLinear, LocalNet, Wire
from ffengine.ops.config import LocalPassConfig

FIVE = LocalPassConfig(groups=5)


def conv(channels_in: int, channels_out: int, **options: int) -> LocalConv2d:
    return LocalConv2d(channels_in, channels_out, 3, config=FIVE, **options)


def net(*layers: LocalConv2d, wires: list[Wire] | None = None, size: int = 8) -> LocalNet:
    return LocalNet(layers, wires, num_classes=5, in_shape=(3, size, size))


def test_shapes_follow_the_wires() -> None:
    wires = [Wire(branch=True), Wire(join="concat", branch=True, branch_pool=True),
             Wire(), Wire(join="concat")]
    made = net(conv(3, 5), conv(5, 10), conv(15, 5, stride=2), conv(5, 5), wires=wires)
    assert made.shapes == [(3, 8, 8), (5, 8, 8), (15, 8, 8), (5, 4, 4), (20, 4, 4)]
    assert [made.shortcut_live_after(i) for i in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(("wires", "said"), [
    ([Wire()], "one wire a layer"),
    ([Wire(join="add"), Wire()], "layer 0 joins a shortcut, but none is live"),
    ([Wire(branch=True), Wire(join="add")], r"layer 1 adds a shortcut of \(5, 8, 8\)"),
    ([Wire(branch=True, branch_pool=True), Wire(join="concat")], "layer 1 joins a shortcut"),
])
def test_wiring_errors(wires: list[Wire], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[network\] .*{said}"):
        net(conv(3, 5), conv(5, 10), wires=wires)


def test_an_input_too_small_is_named() -> None:
    with pytest.raises(ValueError, match=r"^\[network\] input \(3, 1, 1\) is too small: layer 0"):
        net(conv(3, 5), wires=[Wire(pool_before=True)], size=1)


def test_input_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"expected input \(N, 3, 8, 8\), got \(2, 3, 9, 9\)"):
        net(conv(3, 5))(torch.zeros(2, 3, 9, 9))


@pytest.mark.parametrize("bad", [(-1, 0), (1, 0), (0, 2)])
def test_ranges(bad: tuple[int, int]) -> None:
    made = net(conv(3, 5), conv(5, 5))
    assert made.layer_range == (1, 1)
    with pytest.raises(ValueError, match=r"^\[network\] layer range"):
        made.set_range(*bad)


def test_scores_sum_the_range() -> None:
    made, x = net(conv(3, 5), conv(5, 5), conv(5, 5)), torch.randn(4, 3, 8, 8)
    goodness = made.goodness(x)
    for start, end in ((0, 0), (0, 2), (1, 2)):
        made.set_range(start, end)
        assert torch.equal(made(x), torch.stack(goodness[start:end + 1]).sum(0))


def test_state_dict_holds_layers_and_range() -> None:
    one, two = (net(conv(3, 5), conv(5, 5, bias=True)) for _ in range(2))
    one.set_range(0, 0)
    state = one.state_dict()
    assert {"layers.0.weight", "layers.1.weight", "layers.1.bias"} < set(state)
    two.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    assert two.layer_range == (0, 0)
    assert torch.equal(one(x), two(x))


def test_conv_weights_stay_channels_last() -> None:
    made = net(conv(3, 5), conv(5, 5))
    made.load_state_dict({k: v.contiguous() for k, v in made.state_dict().items()})
    made.double().float()
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last)
               for layer in made.layers)


def test_linear_layers_flatten_maps() -> None:
    made = LocalNet([conv(3, 5), LocalLinear(5 * 64, 10, config=FIVE)], num_classes=5,
                    in_shape=(3, 8, 8))
    assert made(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_no_input_norm() -> None:
    x = torch.randn(2, 3, 8, 8)
    made = LocalNet([conv(3, 5)], num_classes=5, in_shape=(3, 8, 8), input_norm="none")
    assert made.prepare(x) is x


def test_layers_validate_groups_and_dropout() -> None:
    with pytest.raises(ValueError, match=r"^\[local_pass\] channels must be a multiple of the 5"):
        conv(3, 7)
    with pytest.raises(ValueError, match=r"^\[dropout\] p must lie"):
        conv(3, 5, dropout=1.0)
