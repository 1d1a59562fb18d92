"""How linear heads train: cross-entropy on features, one fused gradient-and-step a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ffengine.engine import affine
from ffengine.engine.batch import Batch
from ffengine.engine.context import StepContext
from ffengine.nn.heads import LinearHead
from ffengine.nn.network import LocalNet
from ffengine.ops.weight_update import weight_update
from ffengine.reference.local_pass import sparsemax, sparsemax_loss


def of(net: LocalNet, index: int) -> LinearHead:
    """Head `index`, typed."""
    head = net.heads[index]
    assert isinstance(head, LinearHead)
    return head


def train_on_own_pass(ctx: StepContext, index: int, item: Batch,
                      dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Train a head on features of a pass of its own: (mean loss, logits)."""
    return train_head(ctx, index, own_features(ctx, index, item, dtype), item.y)


def own_features(ctx: StepContext, index: int, item: Batch, dtype: torch.dtype) -> torch.Tensor:
    """What a head with a pass of its own sees of a batch, (N, features): kept ones, or made now."""
    features = item.features
    if features is None:
        features = ctx.net.head_features(of(ctx.net, index), item.x.to(dtype), backend=ctx.backend)
    return features.flatten(1)


def train_head(ctx: StepContext, index: int, features: torch.Tensor,
               y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, logits (N, K)) before the step."""
    head = of(ctx.net, index)
    logits = head(features.detach()).detach()
    loss, dlogits = loss_and_gradient(head, logits, y)
    (total, last, share), of_bias = ctx.adding(head.weight), ctx.adding(head.bias).total
    where = f"heads.{index}"
    weight = ctx.parameter(where, "weight", head.weight, accumulate=total)
    bias = ctx.parameter(where, "bias", head.bias, accumulate=of_bias)
    if weight is None:
        affine.update_bias(ctx, head.bias, bias, dlogits, last, 1.0 / share)
        return loss, logits
    weight_update(weight, features.to(head.weight.dtype).contiguous(), dlogits,
                  optim=ctx.optimizer.config(head.weight), bias=bias, finish=last,
                  da_scale=1.0 / share, backend=ctx.backend)
    return loss, logits


def loss_and_gradient(head: LinearHead, logits: torch.Tensor,
                      y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, dL/dlogits) of the head's loss."""
    n = max(logits.shape[0], 1)
    target = F.one_hot(y, head.num_classes).to(logits.dtype)
    if head.loss == "ce":
        return F.cross_entropy(logits, y), (logits.softmax(1) - target) / n
    if head.loss == "sparsemax":
        return sparsemax_loss(logits, y).mean(), (sparsemax(logits) - target) / n
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        loss = F.cross_entropy(leaf.softmax(1), y)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
