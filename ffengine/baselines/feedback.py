"""Feedback alignment and its direct forms: fixed random matrices B in place of transposed weights.

With e = dL/dlogits (softmax or sigmoid minus target) and f' the activation's slope, layer l learns
dL/dW_l = da_l x_l' from

    fa     da_l = B_{l+1}' da_{l+1} * f'(a_l)     Lillicrap et al. 2016, "Random synaptic feedback
                                                  weights support error backpropagation"
    dfa    da_l = B_l' e * f'(a_l)                Nøkland 2016
    drtp   da_l = B_l' y* * f'(a_l)               Frenkel et al. 2021: the one-hot target itself

and the classifier always from e. Every term is the mean over the batch. DRTP's published code adds
up B' y* over a batch, but averages e: under Adam the same. B ~ U(+-sqrt(6 / fan_in)), as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ffengine.baselines.hidden import Hidden, HiddenNet, he_uniform
from ffengine.nn.checks import one_of
from ffengine.nn.credit import Credit, cast

Rule = Literal["fa", "dfa", "drtp"]


def sigmoid_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of all outputs: dL/dlogits = (sigmoid - one-hot) / N."""
    target = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(y)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ce": F.cross_entropy, "bce": sigmoid_loss}


class FeedbackNet(HiddenNet):
    """Hidden layers, without norms, that learn from random feedback.

    Args:
        rule: fa | dfa | drtp.
        loss: of the output, ce | bce (sigmoid).

    Attributes:
        feedback_0, ...: B, fixed; of the shape of the weight above (fa), or (classes, *h's shape).
    """

    def __init__(self, hidden: Sequence[Hidden], *, rule: Rule, loss: str = "ce",
                 **rest: Any) -> None:
        one_of("baselines", "rule", rule, ("fa", "dfa", "drtp"))
        one_of("baselines", "loss", loss, tuple(LOSSES))
        super().__init__(hidden, **rest)
        self.rule, self.loss = rule, loss
        above = [*(layer.weight for layer in hidden[1:]), self.layer(0).weight]
        for i, (layer, weight) in enumerate(zip(hidden, above, strict=True)):
            shape = weight.shape if rule == "fa" else (self.num_classes, *layer.h_shape)
            self.register_buffer(f"feedback_{i}", he_uniform(*shape))

    def gradients(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Credit:
        classifier, chain = self.layer(0), self.chain()
        with cast(x, dtype):
            states, z = [], x
            for layer in chain:  # a graph a layer: nothing but B joins them
                a = layer.preactivation(z.detach())
                h = layer.activate(a)
                z = layer.finish(h, True)
                states.append((a, h, z))
            logits = self.classify(self.read(z.detach()))
            loss = LOSSES[self.loss](logits.to(x.dtype), y)
        top = {f"layers.0.{n}": p for n, p in classifier.named_parameters()}
        error, *grads = torch.autograd.grad(loss, [logits, *top.values()])
        found = dict(zip(top, grads, strict=True))
        signal = error.to(x.dtype)
        sent = signal if self.rule == "dfa" else F.one_hot(y, self.num_classes).to(x.dtype) / len(y)
        for i in reversed(range(len(chain))):
            trained, (a, h, z) = chain[i].trained(), states[i]
            if not trained:
                continue
            at, arrived = (z, self._through(i, signal, z)) if self.rule == "fa" else (
                h, (sent @ self._feedback(i).flatten(1)).view_as(h))
            da, *grads = torch.autograd.grad(at, [a, *trained.values()], arrived.to(at.dtype))
            signal = da.to(x.dtype)
            found |= {f"hidden.{i}.{n}": g for n, g in zip(trained, grads, strict=True)}
        return loss, logits, found

    def _feedback(self, i: int) -> torch.Tensor:
        return self.get_buffer(f"feedback_{i}")

    def _through(self, i: int, signal: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """dL/dz of layer i by B, from dL/da of the layer above."""
        if signal.dim() == 4:
            return F.conv_transpose2d(signal, self._feedback(i),
                                      padding=self.chain()[i + 1].padding)
        return (signal @ self._feedback(i)).view_as(z)
