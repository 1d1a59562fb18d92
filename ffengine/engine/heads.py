"""How linear heads train: cross-entropy on features, one fused gradient-and-step a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ffengine.engine.batch import whole
from ffengine.nn.heads import LinearHead
from ffengine.ops.weight_update import weight_update
from ffengine.reference.local_pass import sparsemax, sparsemax_loss

if TYPE_CHECKING:
    from ffengine.engine.batch import Batch
    from ffengine.engine.context import StepContext
    from ffengine.nn.network import LocalNet

Results = dict[int, tuple[torch.Tensor, torch.Tensor]]


def of(net: LocalNet, index: int) -> LinearHead:
    """Head `index`, typed."""
    head = net.heads[index]
    assert isinstance(head, LinearHead)
    return head


def train_neutral(ctx: StepContext, item: Batch | torch.Tensor, dtype: torch.dtype) -> Results:
    """Train the heads whose features come from a pass of their own: (mean loss, logits) each."""
    turn = ctx.whose()
    own = [h for h in turn.heads if of(ctx.net, h).image == "neutral" or not turn.depth]
    if not own or isinstance(item, torch.Tensor):
        return {}
    done: Results = {}
    for h in own:
        features = item.features
        if features is None:
            features = ctx.net.head_features(of(ctx.net, h), item.x.to(dtype),
                                             backend=ctx.backend)
        done[h] = train_head(ctx, h, features.flatten(1), item.y)
    return done


def train_on_pass(ctx: StepContext) -> Results:
    """Train the heads that read this pass's features."""
    turn = ctx.whose()
    done: Results = {}
    for h in turn.heads if turn.depth else ():
        head = of(ctx.net, h)
        if head.image == "pass":
            parts = [whole([t.flatten(1) for t in ctx.features[i]]) for i in head.layers]
            done[h] = train_head(ctx, h, whole(parts, 1), ctx.y)
    return done


def train_head(ctx: StepContext, index: int, features: torch.Tensor,
               y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, logits (N, K)) before the step."""
    head, opt = of(ctx.net, index), ctx.optimizer
    logits = head(features.detach()).detach()
    loss, dlogits = loss_and_gradient(head, logits, y)
    total, last, share = ctx.adding(head.weight)
    weight_update(
        head.weight.detach(), features.to(head.weight.dtype).contiguous(), dlogits,
        optim=opt.config(head.weight), state=opt.state_of(head.weight),
        accumulate=total, bias_accumulate=ctx.adding(head.bias).total, finish=last,
        da_scale=1.0 / share,
        grad_out=ctx.grad_of(f"heads.{index}", "weight"), backend=ctx.backend,
        bias=None if head.bias is None else head.bias.detach(),
        bias_state=opt.state_of(head.bias),
        bias_grad_out=ctx.grad_of(f"heads.{index}", "bias"))
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
