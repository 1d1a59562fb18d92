"""The opponents of a fair table, in plain PyTorch on the very network the engine trains.

`UnfusedStep` is the papers' step as their code writes it: per layer forward, loss, backward,
optimizer. `BackpropStep` trains the network's twin by backpropagation, with the memory recipes
a practitioner would try first. Both keep their own optimizers from torch.optim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from ffengine.engine import heads, label_channel
from ffengine.engine.batch import Batch
from ffengine.engine.context import StepContext, Turn
from ffengine.engine.inputs import input_rows, rows_of
from ffengine.engine.optim import own_settings
from ffengine.engine.rows import Rows
from ffengine.engine.schedules.cascade import Cascade
from ffengine.engine.schedules.collaborative import Collaborative
from ffengine.engine.schedules.schedule import Overlapping, of
from ffengine.nn import differentiable
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.ops.config import Peer
from ffengine.ops.weight_update import OptimConfig
from ffengine.reference import local_pass as reference
from ffengine.reference.batch_pass import peer_penalty

#: Learning rate at which backpropagation trains these networks well with Adam on the bundled data.
BACKPROP_LR = 1e-3


def torch_optimizer(parameters: list[nn.Parameter], optim: OptimConfig,
                    fused: bool) -> torch.optim.Optimizer:
    """torch.optim's own optimizer with these settings."""
    if optim.kind == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum,
                               weight_decay=optim.weight_decay, nesterov=optim.nesterov,
                               fused=fused)
    kind = torch.optim.AdamW if optim.kind == "adamw" else torch.optim.Adam
    return kind(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps,
                weight_decay=optim.weight_decay, fused=fused)


class _Baseline:
    """What both opponents share: precision, layout, optimizers."""

    def __init__(self, net: LocalNet, dtype: torch.dtype, channels_last: bool) -> None:
        self.net, self.dtype = net, dtype
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        for p in net.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=self.layout)
        self._optimizers: list[torch.optim.Optimizer] = []

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype in (torch.bfloat16, torch.float16):
            device = next(self.net.parameters()).device.type
            return torch.autocast(device, self.dtype)
        return contextlib.nullcontext()

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Parameters and optimizer states, for the meter."""
        states = [t for o in self.optimizers() for s in o.state.values() for t in s.values()
                  if isinstance(t, torch.Tensor) and t.dim()]
        return {"parameter": [p.detach() for p in self.net.parameters()], "state": states}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All of them, whoever's turn it is."""
        return self._optimizers


class UnfusedStep(_Baseline):
    """Layer-local training as the published code does it: autograd a layer, one optimizer each.

    The network's own schedule says whose turn it is; optimizers' states stay once they exist.

    Args:
        epochs: of the recipe, which schedules divide among the layers.
        seed: of drawn negatives.

    Raises:
        ValueError: a schedule whose step is more than layers in turn (recurrent, collaborative,
            a cascade, overlapping updates with every loss at once); the engine's reference
            back-end trains those.
    """

    def __init__(self, net: LocalNet, optim: OptimConfig, dtype: torch.dtype = torch.float32, *,
                 channels_last: bool = False, fused: bool = False, epochs: int = 1,
                 seed: int = 0) -> None:
        super().__init__(net, dtype, channels_last)
        self.schedule = of(net, None)
        self.schedule.begin(net, epochs)
        crossing = isinstance(self.schedule, Overlapping)
        if isinstance(net, RecurrentNet) or isinstance(self.schedule, (Collaborative, Cascade)) or (
                isinstance(self.schedule, Overlapping) and self.schedule.alternate == "both"):
            raise ValueError("[baseline] the unfused step expected layers that train in turn, got "
                             f"{type(self.schedule).__name__}")
        self.seed, self.steps, self.crosses = seed, 0, crossing
        own = own_settings(net, optim)
        named = {id(p): n for n, p in net.named_parameters()}

        def owned(parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
            trained = [p for p in parameters if p.requires_grad]
            if not trained:
                return None
            return torch_optimizer(trained, own.get(named[id(trained[-1])], optim), fused)

        self._of_layers = [owned([*self._before(i), *net.layer(i).parameters()])
                           for i in range(len(net.layers))]
        self._of_heads = [owned(list(head.parameters())) for head in net.heads]
        self._optimizers = [o for o in (*self._of_layers, *self._of_heads) if o is not None]

    def _before(self, i: int) -> list[nn.Parameter]:
        """What a loss at layer i trains before it: the layer there, when it crosses one boundary,
        or the encoding."""
        net = self.net
        if i:
            return list(net.layer(i - 1).parameters()) if self.crosses else []
        return [] if net.encoding is None else list(net.encoding.parameters())

    def step(self, x: torch.Tensor, y: torch.Tensor, *, epoch: int = 0,
             iteration: int = 0) -> torch.Tensor:
        """One batch for those whose turn it is; returns the mean of their losses."""
        net, turn = self.net, self.schedule.turn(epoch, iteration)
        wide = next(net.parameters()).dtype
        ctx = StepContext(net, None, y, rows_of(net, x.shape[0]),  # type: ignore[arg-type]
                          self.seed, self.steps, "reference", turn)
        self.steps += 1
        with torch.no_grad():
            made = input_rows(ctx, Batch(x, y), wide)
        item = made.item
        assert isinstance(item, Batch)
        losses = self._heads_apart(turn, item, wide)
        if turn.depth:
            with torch.no_grad():
                rows = made.of(Rows(0, ctx.batch), wide)
                rows = rows.contiguous(memory_format=self.layout) if rows.dim() == 4 else rows
            losses += self._layers(turn, self._embedded(rows, item, turn), ctx.y)
        return torch.stack(losses).mean() if losses else torch.zeros((), device=x.device)

    def _embedded(self, rows: torch.Tensor, item: Batch, turn: Turn) -> torch.Tensor:
        """The rows, attached to a label embedding that the first layer's loss trains."""
        encoding = label_channel.learned(self.net)
        if encoding is None or 0 not in turn.layers:
            return rows
        assert item.negatives is not None
        labels = torch.cat([encoding.rows(t, rows) for t in (item.y, item.negatives)])
        shown = (labels @ encoding.weight).view(-1, 1, *rows.shape[2:])
        return torch.cat([rows[:, :-1], shown], 1)

    def _layers(self, turn: Turn, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """The pass through the layers, each in turn; then the heads that read it."""
        net, losses, shortcut = self.net, [], None
        seen: dict[int, torch.Tensor] = {}
        own_pass = [h for h in turn.heads if heads.of(net, h).image == "pass"]
        read = {i for h in own_pass for i in heads.of(net, h).layers}
        for i in range(turn.depth):
            trains, training = i in turn.layers, i >= turn.start
            keeps = trains or (self.crosses and i + 1 in turn.layers)
            if trains:
                z, loss = self._trained(i, x, y)
                losses.append(loss)
            else:
                with torch.set_grad_enabled(keeps), self.autocast():
                    z = self.passed(i, x, training)
            with torch.set_grad_enabled(keeps and not trains):
                x, shortcut = net.join(i, z, shortcut)
            if i in read:
                seen[i] = x.detach().flatten(1)
        for h in own_pass:
            parts = [seen[i] for i in heads.of(net, h).layers]
            losses.append(self._train_head(h, torch.cat(parts, 1), y))
        return losses

    def _trained(self, i: int, x: torch.Tensor,
                 y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, cut off; loss) of layer i, stepped."""
        optimizer = self._of_layers[i]
        assert optimizer is not None
        optimizer.zero_grad()
        with self.autocast():
            z, loss = self.turn(i, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if self.net.propagate == "updated":
            with torch.no_grad(), self.autocast():
                z = self.passed(i, x, True)
        return z.detach(), loss.detach()

    def turn(self, i: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, loss) of layer i, differentiable in its parameters."""
        net, layer = self.net, self.net.layer(i)
        h = differentiable.activation(
            layer, net.transform(i, x), net.training,
            straight_through=layer.config.relu_gradient == "straight_through")
        loss = local_loss(differentiable.goodness(layer, h), layer.labels(y), net, i)
        if isinstance(layer.batch_coupling, Peer):
            assert layer.running_mean is not None
            loss = loss + peer_penalty(h, y, layer.batch_coupling, layer.running_mean, True)
        return differentiable.normalise(layer, h), loss

    def passed(self, i: int, x: torch.Tensor, training: bool) -> torch.Tensor:
        """z of layer i, which rests."""
        layer = self.net.layer(i)
        h = differentiable.activation(layer, self.net.transform(i, x), training)
        return differentiable.normalise(layer, h)

    def _heads_apart(self, turn: Turn, item: Batch, dtype: torch.dtype) -> list[torch.Tensor]:
        """Train the heads whose features come from a pass of their own."""
        apart = [h for h in turn.heads
                 if heads.of(self.net, h).image == "neutral" or not turn.depth]
        return [self._train_head(h, self.net.head_features(
            heads.of(self.net, h), item.x.to(dtype), backend="reference"), item.y) for h in apart]

    def _train_head(self, index: int, seen: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        head, optimizer = heads.of(self.net, index), self._of_heads[index]
        assert optimizer is not None
        optimizer.zero_grad()
        logits = head(seen)
        loss, gradient = heads.loss_and_gradient(head, logits.detach(), y)
        logits.backward(gradient)
        optimizer.step()
        return loss

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
    wide = g if g.dtype is torch.float64 else g.float()
    return reference.loss_value(loss, wide, y).sum() * loss.scale(g.shape[0])


class BackpropStep(_Baseline):
    """A twin (`bp/<model>`) by backpropagation: cross-entropy on its logits.

    Args:
        net: the twin; its parameters that require gradients are trained.
        micro_batch: accumulate gradients over pieces of this many samples.
        checkpoint: recompute every layer's inside in the backward pass (a recurrent network's:
            every frame's).
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
        self.micro_batch, self.in_backward = micro_batch, in_backward
        self.call = functools.partial(recompute, use_reentrant=False) if checkpoint else (
            differentiable.direct)
        parameters = [p for p in net.parameters() if p.requires_grad]
        if in_backward:
            self._optimizers = [torch_optimizer([p], optim, fused) for p in parameters]
            for p, optimizer in zip(parameters, self._optimizers, strict=True):
                p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _stepper(optimizer))
        else:
            self._optimizers = [torch_optimizer(parameters, optim, fused)]

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
        return self.net.differentiable_logits(x, self.call, self.layout)

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


def pieces(batch: int) -> dict[int, str]:
    """Micro-batches of a fair table: samples in one -> what the row is called."""
    eighth = -(-batch // 8)
    return {eighth: f"8 micro-batches of {eighth}", 1: "micro-batch 1"}


def backprop_recipes(batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every backpropagation row of a fair table: (name, options of BackpropStep)."""
    yield "bp plain", {}
    yield "bp checkpointed", {"checkpoint": True}
    yield "bp optimizer in backward, checkpointed", {"in_backward": True, "checkpoint": True}
    for size, name in pieces(batch).items():
        yield f"bp {name}", {"micro_batch": size}
        yield f"bp {name}, checkpointed", {"micro_batch": size, "checkpoint": True}
