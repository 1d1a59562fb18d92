"""The other methods that tables of local learning print, on the networks those tables give them.

By defaults the support-neuron paper's MNIST network (784-100-100), which it trains every method on;
its CIFAR networks are options of a recipe, as are Trifecta's and PEPITA's own. What the methods do
stands in ffengine/baselines; DeeperForward, CaFo and CFSE are the engine's, on that paper's layers.
Where it is silent: CaFo's predictor is cross-entropy's; DeeperForward is read at its last layer,
without dropout, as that paper's own (its SIP and dropout are options, and give one point more);
early layers of CIFAR-100 tell super-classes, as its own do, where 60 channels are to make 100 sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ffengine.baselines.blockwise import BlockwiseNet
from ffengine.baselines.feedback import FeedbackNet, Rule
from ffengine.baselines.hidden import Activation, check_pools, stack
from ffengine.baselines.pepita import PepitaNet
from ffengine.data.superclasses import SuperClasses, by_name, given
from ffengine.engine.schedules.backprop import Backprop
from ffengine.engine.schedules.schedule import Together
from ffengine.models.cafo import cascade
from ffengine.models.registry import Recipe, register
from ffengine.models.sn import PAPER, SCALE
from ffengine.nn import LocalConv2d, LocalLinear, LocalNet
from ffengine.nn.checks import one_of
from ffengine.nn.layers import LocalLayer
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm, ce, cwc

Widths = tuple[int, ...]
Supers = str | tuple[int, ...] | None
#: Pixels in [0, 1], as PEPITA's code.
UNIT = {"*": "off", "digits": "set"}
SMALL: dict[str, Any] = {"epochs": 30, "lr": 1e-3}


def trained_by_one_loss(net: LocalNet) -> LocalNet:
    """The network with the schedule that asks it for its gradients."""
    net.schedule, net.selects_range = Backprop(), False
    return net


def feedback(rule: Rule, num_classes: int, image: tuple[int, int, int], channels: Widths,
             layers: Widths, activation: Activation, loss: str) -> FeedbackNet:
    """Convolutions 3x3, each with a pool, and linear layers, trained by random feedback."""
    hidden = stack(image, channels, layers, range(1, len(channels) + 1), activation=activation)
    net = FeedbackNet(hidden, rule=rule, loss=loss, num_classes=num_classes, in_shape=image)
    trained_by_one_loss(net)
    return net


@register("baselines/fa", paper="Lillicrap 2016", local=False, digits={**SMALL, "lr": 3e-4},
          recipe=Recipe(optimizer="adam", lr=1e-3, epochs=100, batch_size=512),
          digits_options={"layers": (200, 200)})
def fa(num_classes: int = 10, in_channels: int = 1, image_size: int = 28, channels: Widths = (),
       layers: Widths = (2048,) * 6, activation: Activation = "relu",
       loss: Literal["ce", "bce"] = "ce") -> LocalNet:
    """Feedback alignment on Trifecta's six layers of 2048."""
    return feedback("fa", num_classes, (in_channels, image_size, image_size), channels, layers,
                    activation, loss)


@register("baselines/dfa", paper="Nøkland 2016", local=False, recipe=PAPER, digits=SMALL,
          scale=SCALE)
def dfa(num_classes: int = 10, in_channels: int = 1, image_size: int = 28, channels: Widths = (),
        layers: Widths = (100, 100), activation: Activation = "tanh",
        loss: Literal["ce", "bce"] = "bce") -> LocalNet:
    """Direct feedback alignment; tanh and sigmoid outputs as in its paper."""
    return feedback("dfa", num_classes, (in_channels, image_size, image_size), channels, layers,
                    activation, loss)


@register("baselines/drtp", paper="Frenkel 2021", local=False, recipe=PAPER, digits=SMALL,
          scale=SCALE)
def drtp(num_classes: int = 10, in_channels: int = 1, image_size: int = 28, channels: Widths = (),
         layers: Widths = (100, 100), activation: Activation = "tanh",
         loss: Literal["ce", "bce"] = "bce", frozen: bool = False) -> LocalNet:
    """Direct random target projection. frozen: convolutions stay random."""
    net = feedback("drtp", num_classes, (in_channels, image_size, image_size), channels, layers,
                   activation, loss)
    for layer in net.chain():
        layer.requires_grad_(not (frozen and layer.kernel))
    return net


@register("baselines/pepita", paper="PEPITA", local=False, scale=UNIT,
          recipe=Recipe(optimizer="sgd", momentum=0.9, lr=0.1, epochs=100, batch_size=64,
                        lr_drops=((60, 0.1),)),
          digits={"epochs": 60, "lr_drops": ((40, 0.1),)})
def pepita(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
           channels: Widths = (), layers: Widths = (1024,), kernel: int = 5, dropout: float = 0.1,
           projection: float = 0.05) -> LocalNet:
    """784-1024-10; or convolutions without padding, each with a pool."""
    image = (in_channels, image_size, image_size)
    hidden = stack(image, channels, layers, range(1, len(channels) + 1), kernel=kernel, padding=0,
                   bias=False, init="he")
    return trained_by_one_loss(PepitaNet(hidden, dropout=dropout, projection=projection,
                                         num_classes=num_classes, in_shape=image))


@register("baselines/blockwise", paper="BWBPF", local=False, recipe=PAPER, digits=SMALL,
          scale=SCALE)
def blockwise(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
              channels: Widths = (), pools: Widths = (), layers: Widths = (100, 100),
              block: int = 1, isolated: bool = True) -> LocalNet:
    """Block(conv3x3, relu, BatchNorm, pool) or linear-relu, a classifier on every one."""
    image = (in_channels, image_size, image_size)
    return trained_by_one_loss(BlockwiseNet(
        stack(image, channels, layers, pools, norm=True), block=block, isolated=isolated,
        num_classes=num_classes, in_shape=image))


@register("baselines/ffconv", paper="FFconv", local=False, recipe=PAPER, scale=SCALE,
          digits={"epochs": 10, "lr": 1e-3})
def ffconv(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
           channels: Widths = (20, 80, 240, 480), pools: Widths = (2, 4),
           layers: Widths = (20,), isolated: bool = False) -> LocalNet:
    """The same with the blocks' scores added up, losses averaged, and gradients through all."""
    image = (in_channels, image_size, image_size)
    return trained_by_one_loss(BlockwiseNet(
        stack(image, channels, layers, pools, norm=True), isolated=isolated, vote=True,
        num_classes=num_classes, in_shape=image))


@dataclass(frozen=True)
class Spec:
    """One layer to build; `groups`: class sets of its channels or units."""

    index: int
    ins: int
    width: int
    conv: bool
    pool: Literal["none", "max2"]
    groups: int


def chain(build: Callable[[Spec], LocalLayer], image: tuple[int, ...], channels: Widths,
          pools: Widths, layers: Widths, num_classes: int, superclasses: Supers = None,
          on_supers: int = 0) -> tuple[list[LocalLayer], int]:
    """(the layers, how many of the first ones tell super-classes); `pools` are counted from 1."""
    if not channels and not layers:
        raise ValueError("[baselines] expected one layer or more, got none")
    check_pools(pools, len(channels))
    supers = super_classes(superclasses, num_classes)
    early = 0 if supers is None else min(on_supers, len(channels) + len(layers) - 1)
    shape, made = image, []
    for i, width in enumerate([*channels, *layers]):
        told = supers if i < early else None
        shape = shape if i < len(channels) else (math.prod(shape),)
        made.append(build(Spec(i, shape[0], width, i < len(channels),
                               "max2" if i + 1 in pools else "none",
                               num_classes if told is None else told.num_super)))
        if told is not None:
            made[-1].relabel(told.map)
        shape = made[-1].z_shape(shape)
    return made, early


def super_classes(word: Supers, num_classes: int) -> SuperClasses | None:
    """Of the early layers: a name, the super-class of every class, or none."""
    if word is None:
        return None
    supers = by_name(word) if isinstance(word, str) else given(word, num_classes)
    if supers.num_classes != num_classes:
        raise ValueError(f"[baselines] superclasses expected one for each of the {num_classes} "
                         f"classes, got a map of {supers.num_classes}")
    return supers


@register("baselines/deeperforward", paper="DeeperForward", recipe=PAPER, scale=SCALE,
          digits={"epochs": 40, "lr": 3e-3})
def deeperforward(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
                  channels: Widths = (), pools: Widths = (), layers: Widths = (100, 100),
                  dropout: float = 0.0, readout: Literal["last", "sip"] = "last",
                  superclasses: Supers = None, on_supers: int = 4) -> LocalNet:
    """relu, pool, mean goodness, cross-entropy, GroupNorm."""
    one_of("baselines", "readout", readout, ("last", "sip"))

    def build(spec: Spec) -> LocalLayer:
        config = LocalPassConfig(groups=spec.groups, loss=ce(), pool=spec.pool)
        if spec.conv:
            return LocalConv2d(spec.ins, spec.width, 3, dropout=dropout, config=config)
        return LocalLinear(spec.ins, spec.width, bias=False, dropout=dropout, config=config)

    image = (in_channels, image_size, image_size)
    made, early = chain(build, image, channels, pools, layers, num_classes, superclasses, on_supers)
    if early and readout == "sip":
        raise ValueError("[baselines] readout=sip expected layers that all tell classes, got "
                         f"{early} on super-classes")
    last = len(made) - 1
    net = LocalNet(made, num_classes=num_classes, in_shape=image, layer_range=(last, last))
    net.schedule, net.selects_range = Together(), readout == "sip"
    return net


@register("baselines/cafo", paper="CaFo", recipe=PAPER, digits={"epochs": 30, "lr": 3e-3},
          scale=SCALE)
def cafo_blocks(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
                channels: Widths = (), pools: Widths = (), layers: Widths = (100, 100),
                predictor: Literal["mse", "ce", "sl", "bp"] = "ce") -> LocalNet:
    """Those layers as they are drawn (relu, BatchNorm, pool; or linear-relu), predictors on all."""
    def build(spec: Spec) -> LocalLayer:
        config = LocalPassConfig(groups=1, goodness="mean_sq", norm=Norm("none"), pool=spec.pool)
        if spec.conv:
            return LocalConv2d(spec.ins, spec.width, 3, bias=True, config=config, init="torch",
                               batch_coupling=BatchNorm(order="norm_pool"))
        return LocalLinear(spec.ins, spec.width, config=config, init="torch")

    image = (in_channels, image_size, image_size)
    made, _ = chain(build, image, channels, pools, layers, num_classes)
    return cascade(made, num_classes, image, predictor)


@register("baselines/cfse", paper="CwComp", recipe=PAPER, digits={"epochs": 8}, scale=SCALE)
def cfse_blocks(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
                channels: Widths = (20, 80, 240, 480), pools: Widths = (2, 4),
                grouped: bool = True, superclasses: Supers = None,
                on_supers: int = 4) -> LocalNet:
    """Those blocks, every other one grouped by class, under CwC; scores are sums over layers."""
    def build(spec: Spec) -> LocalLayer:
        config = LocalPassConfig(groups=spec.groups, goodness="mean_sq", loss=cwc(),
                                 norm=Norm("none"), pool=spec.pool)
        return LocalConv2d(spec.ins, spec.width, 3, bias=True, config=config, init="torch",
                           groups=spec.groups if grouped and spec.index % 2 else 1,
                           batch_coupling=BatchNorm(order="norm_pool"))

    image = (in_channels, image_size, image_size)
    made, early = chain(build, image, channels, pools, (), num_classes, superclasses, on_supers)
    net = LocalNet(made, num_classes=num_classes, in_shape=image, input_norm="none",
                   layer_range=(early, len(made) - 1))
    net.schedule, net.selects_range = Together(), False
    return net
