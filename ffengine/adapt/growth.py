"""Neuron growth and degeneration (support neurons, sec. 3.5 and 3.6).

    weak = growing(network_accuracy, Growth())           # classes whose sets are to grow
    bigger, edit = grow(net, layer, weak[0], train, Growth())
    smaller, edit = degenerate(net, layer, train, Degeneration(lowest=2))

Growth: d' new neurons at the end of a class's set, drawn or cloned from the one that responds most
to the class; then they alone train, on the class's samples that the layer gets wrong and as many of
other classes, to maximise  L = sum over mis of g* - sum over dif of g*,  g* their goodness.
Degeneration: neurons that respond least to their own class go; the last of a set stays.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.adapt.checks import layer_of, offsets_of
from ffengine.adapt.edits import add_units, remove_units
from ffengine.adapt.record import Edit
from ffengine.adapt.responses import Survey, below, survey
from ffengine.data.seeding import generator
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.schedule import Schedule
from ffengine.engine.trainer import Trainer
from ffengine.nn.checks import one_of
from ffengine.nn.layers import LocalLayer
from ffengine.nn.maps import Samples
from ffengine.nn.network import LocalNet
from ffengine.nn.wiring import OWN
from ffengine.ops.config import BatchNorm, Norm, margin


@dataclass(frozen=True)
class Growth:
    """How sets grow.

    threshold: classes of an accuracy below it grow; None: the weakest class alone.
    neurons: d', new neurons of a set.
    init: "clone" of the neuron with the highest mean response to the class, or "random".
    epochs, lr: of the new neurons' training; None: the paper's, 5 at 1e-4 (linear layers), 40 at
        1e-5 (convolutions). 0 epochs train nothing (the paper's net_clone).
    batch_size: of it, which the paper does not give; None: all samples at once (linear layers: so
        net_train stays as near net_clone as in tables 3 and 6), 128 (convolutions).
    optimizer: of it. seed: of what is drawn.
    """

    threshold: float | None = None
    neurons: int = 1
    init: Literal["clone", "random"] = "clone"
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    optimizer: str = "adam"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("growth", "init", self.init, ("clone", "random"))
        small = self.batch_size is not None and self.batch_size < 1
        if self.neurons < 1 or small or (self.epochs or 0) < 0 or (self.lr or 0) < 0:
            raise ValueError("[growth] expected 1 neuron or more, a batch size of 1 or more, "
                             f"epochs and lr of 0 or more, got neurons={self.neurons} batch_size="
                             f"{self.batch_size} epochs={self.epochs} lr={self.lr}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError("[growth] threshold expected an accuracy in [0, 1], got "
                             f"{self.threshold}")


@dataclass(frozen=True)
class Degeneration:
    """Which neurons go, by their mean response to the samples of their own set's classes.

    One of: threshold: those that respond at most so much; fraction: those that respond at most this
    share of their set's maximum (app. D.3.2); lowest: so many, the least responding of the layer.
    """

    threshold: float | None = None
    fraction: float | None = None
    lowest: int | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.threshold, self.fraction, self.lowest) if v is not None]
        if len(given) != 1 or given[0] < 0:
            raise ValueError("[degeneration] expected one of threshold, fraction and lowest, 0 or "
                             f"more, got {self}")


def growing(accuracy: Sequence[float | None], options: Growth) -> list[int]:
    """Classes whose sets are to grow, the weakest first, of each class's accuracy (None: unknown).
    """
    known = sorted((a, k) for k, a in enumerate(accuracy) if a is not None)
    if options.threshold is None:
        return [k for _, k in known[:1]]
    return [k for a, k in known if a < options.threshold]


def grow(net: LocalNet, layer: int, label: int, train: Samples, options: Growth, *,
         backend: str = "auto") -> tuple[LocalNet, Edit]:
    """The network with new neurons at the end of a class's set; nothing else of it changes.

    Args:
        label: the class.
        train: batches (x, y), the same ones whenever iterated; read twice, only wrong samples of
            the class and as many others are kept.

    Raises:
        ValueError: no such layer or class, a layer without a set for each class, a loss that needs
            equal groups.
    """
    layer = layer_of(net, layer)
    if not 0 <= label < net.num_classes:
        raise ValueError(f"[growth] expected a class of 0..{net.num_classes - 1}, got {label}")
    seen = survey(net, layer, train, backend)
    group, offsets = int(seen.groups[label]), offsets_of(net, layer)
    like = None
    if options.init == "clone":
        own = seen.responses[label, offsets[group]:offsets[group + 1]]
        like = offsets[group] + int(own.argmax())
    def add(values: dict[str, torch.Tensor] | None = None) -> tuple[LocalNet, Edit]:
        return add_units(net, layer, group=group, count=options.neurons, like=like,
                         values=values, seed=options.seed)

    bigger, edit = add()
    held, units = bigger.layer(layer), edit.new(layer)
    settle(bigger, layer, units, train, backend)
    x, y = chosen(net, layer, label, train, seen, options.seed, backend)
    if options.epochs != 0 and len(y):
        train_units(held, units, x, y, options, backend)
        settle(bigger, layer, units, train, backend)
    return add({name: part.detach() for name, part in own_parts(held, units).items()})


def own_parts(layer: LocalLayer, units: list[int]) -> dict[str, torch.Tensor]:
    """Copies of the own tensors of some of a layer's units, by name."""
    return {name: getattr(layer, name).detach()[units] for name in OWN
            if getattr(layer, name) is not None}


def settle(net: LocalNet, layer: int, units: list[int], train: Samples, backend: str) -> None:
    """Give new units the running statistics of all samples, where the layer has a BatchNorm."""
    held, count = net.layer(layer), 0
    if not isinstance(held.batch_coupling, BatchNorm):
        return
    assert held.running_mean is not None and held.running_var is not None
    total = square = held.running_mean.new_zeros(len(units), dtype=torch.float64)
    with torch.no_grad():
        for x, _ in train:
            u = held.enter(below(net, layer, x.to(held.weight.device), backend), False)[0]
            h = held.preactivation(u)[:, units].relu()
            if held.config.pool == "max2" and held.batch_coupling.order == "pool_norm":
                h = F.max_pool2d(h, 2)
            rows = h.double().transpose(0, 1).flatten(1)
            total, square = total + rows.sum(1), square + rows.square().sum(1)
            count += rows.shape[1]
    mean = total / count
    held.running_mean[units] = mean.to(held.running_mean)
    held.running_var[units] = ((square / count - mean * mean) * count / (count - 1)).to(
        held.running_var)


def chosen(net: LocalNet, layer: int, label: int, train: Samples, seen: Survey, seed: int,
           backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the layer's weight sees, 1 or 0): X_mis of the class, and as many samples of other
    classes, drawn."""
    wrong = ((seen.labels == label) & ~seen.right).nonzero().flatten()
    others = (seen.labels != label).nonzero().flatten()
    order = torch.randperm(len(others), device="cpu",
                           generator=generator("growth", seed, label))
    picked = torch.cat([wrong, others[order[:len(wrong)]]])
    mine = torch.zeros(len(seen.labels), dtype=torch.bool)
    mine[picked] = True
    held, device = net.layer(layer), net.layer(layer).weight.device
    rows, labels, start = [], [], 0
    with torch.no_grad():
        for x, y in train:
            here = mine[start:start + len(y)]
            start += len(y)
            if bool(here.any()):
                u = below(net, layer, x[here.to(x.device)].to(device), backend)
                u, made = held.enter(u, False)
                if held.pre_norm is not None and held.pre_norm.folded and made is not None:
                    u = held.pre_norm.affine(made.x_hat)
                rows.append(u)
                labels.append((y[here.to(y.device)] == label).long().cpu())
    if not rows:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    return torch.cat(rows), torch.cat(labels)


def train_units(layer: LocalLayer, units: list[int], x: torch.Tensor, y: torch.Tensor,
                options: Growth, backend: str) -> None:
    """Train some of a layer's units, and nothing else, on what its weight sees."""
    linear = layer.geometry is None
    epochs = options.epochs if options.epochs is not None else (5 if linear else 40)
    lr = options.lr if options.lr is not None else (1e-4 if linear else 1e-5)
    size = min(options.batch_size or (len(y) if linear else 128), len(y))
    sprout = alone(layer, units)
    net = LocalNet([sprout], num_classes=2, in_shape=tuple(x.shape[1:]), input_norm="none",
                   layer_range=(0, 0))
    trainer = Trainer(
        net, recipe=Recipe(optimizer=options.optimizer, lr=lr, epochs=epochs, batch_size=size),
        backend=backend, seed=options.seed, schedule=Schedule(), progress=False,
        precision="fp64" if x.dtype is torch.float64 else "fp32")
    x, y = x.to(trainer.dtype), y.to(x.device)
    for epoch in range(epochs):
        order = torch.randperm(len(y), device="cpu",
                               generator=generator("growth order", options.seed, epoch))
        for at in torch.split(order.to(x.device), size):
            trainer.step(x[at], y[at], epoch=epoch)
    for name, part in own_parts(sprout, list(range(len(units)))).items():
        with torch.no_grad():
            getattr(layer, name)[units] = part.to(getattr(layer, name).dtype)


def alone(layer: LocalLayer, units: list[int]) -> LocalLayer:
    """A layer of some of its units, one group under growth's loss, without an input norm; batch
    norm by running statistics, which are of all samples and not of the few that it trains on."""
    made = copy.deepcopy(layer)
    for name, part in own_parts(layer, units).items():
        setattr(made, name, nn.Parameter(part) if name in made._parameters else part)
    made.config = replace(layer.config, groups=1, norm=Norm("none"), loss=margin(0))
    made.pre_norm, made.label_map, made.dropout, made.optim = None, None, 0.0, {}
    if isinstance(made.batch_coupling, BatchNorm):
        made.batch_coupling = replace(made.batch_coupling, use_running=True)
    return made


def degenerate(net: LocalNet, layer: int, train: Samples, options: Degeneration, *,
               backend: str = "auto") -> tuple[LocalNet, Edit | None]:
    """The network without the neurons that respond least to their own class; (net, None) if none
    has to go.

    Args:
        train: batches (x, y), read once.

    Raises:
        ValueError: no such layer, a layer without a set for each class, more neurons asked for than
            can go, a loss that needs equal groups.
    """
    layer = layer_of(net, layer)
    seen = survey(net, layer, train, backend)
    offsets = offsets_of(net, layer)
    units = weak_units(seen.own(offsets), offsets, options)
    return remove_units(net, layer, units) if units else (net, None)


def weak_units(responses: torch.Tensor, offsets: tuple[int, ...],
               options: Degeneration) -> list[int]:
    """Units to remove, of each one's response (C,); the last, most responding, of a set stays."""
    best = {s + int(responses[s:e].argmax()) for s, e in pairwise(offsets)}
    free = [u for u in responses.argsort(stable=True).tolist() if u not in best]
    if options.lowest is not None:
        if options.lowest > len(free):
            raise ValueError(f"[degeneration] expected at most {len(free)} neurons, so that every "
                             f"set keeps one, got {options.lowest}")
        return free[:options.lowest]
    if options.threshold is not None:
        return [u for u in free if responses[u] <= options.threshold]
    limit = torch.cat([responses[s:e].max().expand(e - s) for s, e in pairwise(offsets)])
    return [u for u in free if responses[u] <= (options.fraction or 0.0) * limit[u]]
