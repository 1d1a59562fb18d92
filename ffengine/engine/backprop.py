"""Backpropagation as a schedule: the twin of a network, trained end to end by cross-entropy."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from ffengine.engine import affine, label_channel
from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.plan import Plan
from ffengine.engine.schedule import Schedule
from ffengine.nn.network import LocalNet


class Backprop(Schedule):
    """Every batch trains all parameters on one loss, the cross-entropy of the scores."""

    recurrent = True

    planned = False
    adds_up = False

    def begin(self, net: LocalNet, epochs: int) -> None:
        if label_channel.learned(net) is not None:
            raise ValueError("[schedule] backpropagation expected a network whose label channel is "
                             "fixed, as its twin's is, got a learned one")
        super().begin(net, epochs)

    def train(self, ctx: StepContext, item: Batch, plan: Plan, dtype: torch.dtype) -> BatchReport:
        net = ctx.net
        if dtype is torch.float16:
            raise ValueError("[schedule] backpropagation expected precision fp64, fp32 or bf16, "
                             "got fp16: it takes no loss scale")
        net.train()
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if dtype is torch.bfloat16:
            cast = torch.autocast(item.x.device.type, dtype)
        with torch.enable_grad(), cast:
            wide = torch.promote_types(named[0][1].dtype, torch.float32)
            logits = net.differentiable_logits(item.x.to(wide))
            loss = F.cross_entropy(logits.to(wide), item.y)
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        for (name, p), gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                affine.step(ctx, "net", name, p, gradient)
        ctx.optimizer.mark_stepped()
        last = len(net.layers) - 1
        ctx.loss_sum[last] = loss.detach()
        report = ctx.report()
        report.scores = logits.detach()
        return report
