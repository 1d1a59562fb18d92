"""What the instructions of backpropagation do; see instructions.py for how they are written."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from ffengine.engine import affine
from ffengine.engine.instructions import Made, Place, Tensors
from ffengine.engine.program import Instruction


def backpropagate(at: Place, line: Instruction, given: Tensors) -> Made:
    """The cross-entropy of the scores, and the gradient of every parameter, end to end."""
    ctx, net, item = at.ctx, at.ctx.net, given["batch"]
    if at.dtype is torch.float16:
        raise ValueError("[schedule] backpropagation expected precision fp64, fp32 or bf16, got "
                         "fp16: it takes no loss scale")
    net.train()
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if at.dtype is torch.bfloat16:
        cast = torch.autocast(item.x.device.type, at.dtype)
    with torch.enable_grad(), cast:
        wide = torch.promote_types(named[0][1].dtype, torch.float32)
        logits = net.differentiable_logits(item.x.to(wide))
        loss = F.cross_entropy(logits.to(wide), item.y)
    torch.clear_autocast_cache()  # of weights; inside another autocast they would live on
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    ctx.loss_sum[line.index], ctx.scores = loss.detach(), logits.detach()
    return ([(n, p, g) for (n, p), g in zip(named, gradients, strict=True) if g is not None],)


def update_all(at: Place, line: Instruction, given: Tensors) -> Made:
    """Steps every parameter."""
    for name, parameter, gradient in given["gradients"]:
        affine.step(at.ctx, "net", name, parameter, gradient)
    return ()
