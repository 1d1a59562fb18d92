"""What the instructions of backpropagation do; see instructions.py for how they are written."""

from __future__ import annotations

import torch

from ffengine.engine import affine
from ffengine.engine.instructions import Made, Place, Tensors
from ffengine.engine.program import Instruction


def backpropagate(at: Place, line: Instruction, given: Tensors) -> Made:
    """The loss of the scores, and the gradient of every parameter as the network has it."""
    ctx, net, item = at.ctx, at.ctx.net, given["batch"]
    if at.dtype is torch.float16:
        raise ValueError("[schedule] backpropagation expected precision fp64, fp32 or bf16, got "
                         "fp16: it takes no loss scale")
    net.train()
    named = dict(net.named_parameters())
    wide = torch.promote_types(next(iter(named.values())).dtype, torch.float32)
    with torch.enable_grad():
        loss, logits, gradients = net.gradients(item.x.to(wide), item.y, at.dtype)
    ctx.loss_sum[line.index], ctx.scores = loss.detach(), logits.detach()
    return ([(name, named[name], gradient) for name, gradient in gradients.items()],)


def update_all(at: Place, line: Instruction, given: Tensors) -> Made:
    """Steps every parameter."""
    for name, parameter, gradient in given["gradients"]:
        affine.step(at.ctx, "net", name, parameter, gradient)
    return ()
