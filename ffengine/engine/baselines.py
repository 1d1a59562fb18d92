"""The opponents of a fair table, in plain PyTorch on the very network the engine trains.

`UnfusedStep` is the papers' step as their code writes it: per layer forward, loss, backward,
optimizer. `BackpropStep` trains the same architecture by backpropagation, with the memory recipes
a practitioner would try first. Both keep their own optimizers from torch.optim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from ffengine.nn.network import LocalNet
from ffengine.ops.weight_update import OptimConfig
from ffengine.reference import local_pass as reference

#: Learning rate at which backpropagation trains these networks well with Adam on the bundled data.
BACKPROP_LR = 1e-3


def torch_optimizer(parameters: list[nn.Parameter], optim: OptimConfig,
                    fused: bool) -> torch.optim.Optimizer:
    """torch.optim's own optimizer with these settings."""
    if optim.kind == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum,
                               weight_decay=optim.weight_decay, nesterov=optim.nesterov)
    kind = torch.optim.AdamW if optim.kind == "adamw" else torch.optim.Adam
    return kind(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps,
                weight_decay=optim.weight_decay, fused=fused)


class _Baseline:
    """What both opponents share: precision, layout, one differentiable layer."""

    def __init__(self, net: LocalNet, dtype: torch.dtype, channels_last: bool) -> None:
        self.net, self.dtype = net, dtype
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        for p in net.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=self.layout)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype in (torch.bfloat16, torch.float16):
            device = next(self.net.parameters()).device.type
            return torch.autocast(device, self.dtype)
        return contextlib.nullcontext()

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net.prepare(x)
        return x.contiguous(memory_format=self.layout) if x.dim() == 4 else x

    def hidden(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """h of layer i, differentiable in its weight and in x."""
        layer = self.net.layer(i)
        x = self.net.transform(i, x)
        if layer.geometry is None:
            a = F.linear(x, layer.weight, layer.bias)
        else:
            a = F.conv2d(x, layer.weight, layer.bias, layer.geometry.stride,
                         layer.geometry.padding)
        h = F.relu(a, inplace=True)
        h = F.dropout(h, layer.dropout, self.net.training) if layer.dropout else h
        return F.max_pool2d(h, 2) if layer.config.pool == "max2" else h

    def goodness(self, i: int, h: torch.Tensor) -> torch.Tensor:
        config = self.net.layer(i).config
        if isinstance(config.groups, int) and config.goodness == "mean":
            return h.reshape(h.shape[0], config.groups, -1).mean(2)
        return reference.goodness(h, config.offsets(h.shape[1]), config.goodness)

    def normalise(self, i: int, h: torch.Tensor) -> torch.Tensor:
        config = self.net.layer(i).config
        if isinstance(config.groups, int) and config.norm.kind == "group":
            return F.group_norm(h, config.groups, eps=config.norm.eps)
        return reference.normalise(h, config.offsets(h.shape[1]), config)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Parameters and optimizer states, for the meter."""
        states = [t for o in self.optimizers() for s in o.state.values() for t in s.values()
                  if isinstance(t, torch.Tensor) and t.dim()]
        return {"parameter": [p.detach() for p in self.net.parameters()], "state": states}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        raise TypeError(f"[baseline] {type(self).__name__} has no optimizers")


class UnfusedStep(_Baseline):
    """Layer-local training as the published code does it: autograd a layer, one optimizer each."""

    def __init__(self, net: LocalNet, optim: OptimConfig, dtype: torch.dtype = torch.float32, *,
                 channels_last: bool = False, fused: bool = False) -> None:
        super().__init__(net, dtype, channels_last)
        self._optimizers = [torch_optimizer(list(layer.parameters()), optim, fused)
                            for layer in net.layers]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self._optimizers

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One batch; returns the mean over layers of the local losses."""
        net, total = self.net, torch.zeros((), device=x.device)
        x, shortcut = self.prepare(x), None
        for i, optimizer in enumerate(self._optimizers):
            optimizer.zero_grad()
            with self.autocast():
                z, loss = self.turn(i, x.detach(), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total = total + loss.detach()
            with torch.no_grad():
                x, shortcut = net.join(i, z.detach(), shortcut)
        return total / len(self._optimizers)

    def turn(self, i: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, loss) of layer i, differentiable in its weight."""
        h = self.hidden(i, x)
        return self.normalise(i, h), local_loss(self.goodness(i, h), y, self.net, i)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores (N, classes), as the network's own forward."""
        scores: torch.Tensor = self.net(x)
        return scores


def local_loss(g: torch.Tensor, y: torch.Tensor, net: LocalNet, i: int) -> torch.Tensor:
    """The layer's loss on its goodness, differentiable, averaged as its config says."""
    loss = net.layer(i).config.loss
    if callable(loss):
        return loss(g, y).mean()
    if loss.name == "ce":
        return F.cross_entropy(g, y)
    return reference.loss_value(loss, g.float(), y).sum() * loss.scale(g.shape[0])


class BackpropStep(_Baseline):
    """The same architecture by backpropagation: cross-entropy on the last layer's goodness.

    Args:
        micro_batch: accumulate gradients over pieces of this many samples.
        checkpoint: recompute every layer's inside in the backward pass.
        in_backward: step each weight as soon as its gradient is there, then drop the gradient
            (one piece a batch only).
    """

    def __init__(self, net: LocalNet, optim: OptimConfig, dtype: torch.dtype = torch.float32, *,
                 micro_batch: int | None = None, checkpoint: bool = False,
                 in_backward: bool = False, channels_last: bool = False,
                 fused: bool = True) -> None:
        super().__init__(net, dtype, channels_last)
        if in_backward and micro_batch is not None:
            raise ValueError("[backprop] an optimizer in backward expected one piece a batch, "
                             f"got micro_batch={micro_batch}")
        self.micro_batch, self.checkpoint = micro_batch, checkpoint
        parameters = list(net.parameters())
        if in_backward:
            self._optimizers = [torch_optimizer([p], optim, fused) for p in parameters]
            for p, optimizer in zip(parameters, self._optimizers, strict=True):
                p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _stepper(optimizer))
        else:
            self._optimizers = [torch_optimizer(parameters, optim, fused)]
        self.in_backward = in_backward

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self._optimizers

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One batch; returns its cross-entropy."""
        n = x.shape[0]
        size = self.micro_batch or n
        total = torch.zeros((), device=x.device)
        for start in range(0, n, size):
            piece, target = x[start:start + size], y[start:start + size]
            with self.autocast():
                loss = F.cross_entropy(self.forward(piece), target) * (piece.shape[0] / n)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        if not self.in_backward:
            self._optimizers[0].step()
            self._optimizers[0].zero_grad()
        return total

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes), differentiable."""
        x, shortcut = self.prepare(x), None
        last = len(self.net.layers) - 1
        for i in range(last):
            if self.checkpoint:
                z = recompute(self._features, i, x, use_reentrant=False)
            else:
                z = self._features(i, x)
            x, shortcut = self.net.join(i, z, shortcut)
        return self.goodness(last, self.hidden(last, x))

    def _features(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return self.normalise(i, self.hidden(i, x))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores (N, classes)."""
        was_training = self.net.training
        self.net.eval()
        with torch.no_grad():
            out = self.forward(x)
        self.net.train(was_training)
        return out


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
    def step(p: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()
    return step



def backprop_recipes(batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every backpropagation row of a fair table: (name, options of BackpropStep)."""
    eighth = max(1, batch // 8)
    yield "bp plain", {}
    yield "bp checkpointed", {"checkpoint": True}
    yield "bp optimizer in backward, checkpointed", {"in_backward": True, "checkpoint": True}
    yield f"bp 8 micro-batches of {eighth}", {"micro_batch": eighth}
    yield f"bp 8 micro-batches of {eighth}, checkpointed", {"micro_batch": eighth,
                                                            "checkpoint": True}
    yield "bp micro-batch 1, checkpointed", {"micro_batch": 1, "checkpoint": True}
