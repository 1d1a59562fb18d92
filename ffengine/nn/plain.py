"""Networks in plain PyTorch under one linear classifier: opponents, not trained layer by layer.

The classifier is the network's one layer, so that data, trainer, checkpoints and evaluation take it
as any other network; what stands before it has no local loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ffengine.nn.differentiable import Call, direct
from ffengine.nn.layers import LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.ops.config import LocalPassConfig, Norm


class PlainNet(LocalNet):
    """Base of such networks, which say what `features` are; scores are the classifier's logits.

    Args:
        width: features that the classifier sees.
    """

    def __init__(self, width: int, *, num_classes: int, in_shape: tuple[int, ...],
                 bias: bool = True) -> None:
        classifier = LocalLinear(width, num_classes, init="torch", bias=bias,
                                 config=LocalPassConfig(groups=num_classes, norm=Norm("none")))
        super().__init__([classifier], num_classes=num_classes, in_shape=in_shape,
                         input_norm="none", layer_range=(0, 0))

    def infer_shapes(self) -> list[tuple[int, ...]]:
        """Of what `prepare` gives, and of the scores."""
        return [(self.layer(0).in_size,), (self.num_classes,)]

    def features(self, x: torch.Tensor, training: bool, call: Call = direct) -> torch.Tensor:
        """(N, width) of samples (N, *in_shape)."""
        raise TypeError(f"[{type(self).__name__}] expected a network with features")

    def prepare(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The classifier's input; running statistics normalise."""
        return self.features(self.entering(x), False)

    def entering(self, x: torch.Tensor) -> torch.Tensor:
        """The samples in the weights' dtype; ValueError for another shape."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(f"[network] expected input (N, {', '.join(map(str, self.in_shape))}), "
                             f"got {tuple(x.shape)}")
        return x.to(self.layer(0).weight.dtype)

    def scores(self, x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
        with torch.no_grad():
            return self.classify(self.prepare(x))

    def differentiable_logits(self, x: torch.Tensor, call: Call = direct,
                              layout: torch.memory_format = torch.preserve_format) -> torch.Tensor:
        if layout is not torch.preserve_format:
            x = x.contiguous(memory_format=layout)
        return self.classify(self.features(x, self.training, call))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of features (N, width)."""
        classifier = self.layer(0)
        return F.linear(features, classifier.weight, classifier.bias)
