"""A chain of local layers with heads, and how class scores are read: what the engine trains.

With a label encoding the network is one of positive and negative samples: one goodness a layer, and
class scores by trying all labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from ffengine.data.negatives import KINDS
from ffengine.nn import credit, differentiable
from ffengine.nn.chain import Chain, Wire
from ffengine.nn.checks import one_of, positive
from ffengine.nn.encoding import LabelEncoding
from ffengine.nn.heads import Columns, LinearHead, Receiver
from ffengine.nn.layers import LocalLayer, keep_weights_channels_last
from ffengine.nn.readout import Readout
from ffengine.nn.try_labels import label_goodness
from ffengine.ops.config import Norm
from ffengine.ops.tracing import traced
from ffengine.reference.local_pass import normalise
from ffengine.typed import typed


class LocalNet(Chain):
    """Layers trained by local losses; class scores as `readout` says.

    Args:
        layers: the chain.
        wires: one per layer; plain (Wire()) if absent.
        num_classes: columns of the scores.
        in_shape: (C, H, W) or (features,) of one sample, before any encoding.
        input_norm: of each sample over all its elements, after encoding: "layer" (eps 1e-5, no
            affine), "none", or a Norm of kind layer or length.
        layer_range: first and last layer whose goodness is summed, inclusive.
        encoding: how a label enters the input; the layers then have one goodness.
        negatives: what negatives are drawn where none are given (ffengine.data.negatives).
        propagate: the next layer sees features of the weights before the update ("stale") or
            after it ("updated", FFLib).
        heads: linear classifiers on the features.
        readout: how class scores are read.
    """

    #: (name, options) it was built from, the recipe it trains with, and its schedule; set by
    #: models.create and the builders.
    origin: tuple[str, dict[str, Any]] | None = None
    recipe: Any = None
    schedule: Any = None
    #: A step makes positive and negative rows, without an encoding (unlabelled data, FFRNN).
    makes_pairs = False
    #: BatchNorm uses the statistics of what it is given in evaluation too (CaFo's published way).
    batch_statistics = False
    #: SIP may choose the layer range on validation data.
    selects_range = True

    @typed("network")
    def __init__(self, layers: Sequence[LocalLayer], wires: Sequence[Wire] | None = None, *,
                 num_classes: int, in_shape: tuple[int, ...],
                 input_norm: Literal["layer", "none"] | Norm = "layer",
                 layer_range: tuple[int, int] | None = None,
                 encoding: LabelEncoding | None = None, negatives: str = "random",
                 propagate: Literal["stale", "updated"] = "stale",
                 heads: Sequence[LinearHead] = (), readout: Readout | None = None) -> None:
        super().__init__(layers, wires, num_classes, in_shape, input_norm, encoding)
        positive("network", num_classes=num_classes)
        if isinstance(input_norm, str):
            one_of("network", "input_norm", input_norm, ("layer", "none"))
        one_of("network", "propagate", propagate, ("stale", "updated"))
        one_of("network", "negatives", negatives, KINDS)
        self.negatives, self.propagate = negatives, propagate
        self.heads = nn.ModuleList(heads)
        self.readout = readout or Readout()
        if self.readout.source != "goodness" and not heads:
            raise ValueError(f"[network] a readout by {self.readout.source} expected heads, "
                             "got none")
        self._range = (0, 0)
        # A chain skips its first layer by default, as the published code does.
        last = len(layers) - 1
        self.set_range(*(layer_range or (min(1, last), last)))
        self._check_parts()
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            keep_weights_channels_last)

    def _check_parts(self) -> None:
        if self.propagate == "updated":
            for i in range(len(self.layers)):
                layer = self.layer(i)
                if layer.uses_batch_statistics or layer.dropout or layer.batch_coupling is not None:
                    raise ValueError("[network] propagate=updated expected layers without dropout "
                                     f"and batch statistics, got such a layer {i}")
        if self.negatives == "masked" and self.encoding is not None:
            raise ValueError("[network] masked negatives expected a network without label "
                             f"encoding, got {type(self.encoding).__name__}")
        if len(self.layers) and self.layer(0).pre_norm is not None and self.input_norm != "none":
            raise ValueError("[network] expected one normalisation of the first layer's input, "
                             f"got input_norm={self.input_norm!r} and a pre_norm")
        if self.readout.source == "head" and not 0 <= self.readout.head < len(self.heads):
            raise ValueError(f"[network] a readout by head {self.readout.head} expected "
                             f"{self.readout.head + 1} heads or more, got {len(self.heads)}")
        for head in self.heads:
            assert isinstance(head, LinearHead)
            width = sum(math.prod(self.shapes[i + 1]) for i in head.layers
                        if i < len(self.layers))
            if max(head.layers) >= len(self.layers) or head.weight.shape[1] != width:
                raise ValueError(f"[network] a head on layers {head.layers} expected {width} "
                                 f"features, got {head.weight.shape[1]}")

    def set_range(self, start: int, end: int) -> None:
        """Sum goodness over layers start..end (inclusive); later layers are skipped in forward."""
        if not (isinstance(start, int) and isinstance(end, int)
                and 0 <= start <= end < len(self.layers)):
            raise ValueError(f"[network] layer range must satisfy 0 <= start <= end < "
                             f"{len(self.layers)}, got ({start}, {end})")
        self._range = (start, end)

    @property
    def layer_range(self) -> tuple[int, int]:
        return self._range

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self._range)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.set_range(*(int(v) for v in state))

    def goodness(self, x: torch.Tensor, *, end: int | None = None, backend: str = "auto",
                 training: bool = False) -> list[torch.Tensor]:
        """Goodness (N, K) per class of layers 0..end, inference: no dropout.

        With an encoding every label is tried. `training`: batch statistics as in training.
        """
        end = len(self.layers) - 1 if end is None else end
        if self.encoding is not None:
            return label_goodness(self, x, end, backend)
        return self.run(self.prepare(x), end=end, backend=backend, training=training)

    def head_features(self, head: LinearHead, x: torch.Tensor, *, backend: str = "auto",
                      training: bool = False) -> torch.Tensor:
        """What a head sees of samples x: (N, in_features), by a pass of its own."""
        training = training or self.batch_statistics
        if self.encoding is not None and head.image != "blank":
            x = self.normalise_input(self.encoding.neutral(x), not traced())
        else:
            x = self.blank(x)
        seen = Columns({i: math.prod(self.shapes[i + 1]) for i in head.layers})
        if head.features == "z":
            self.run(x, end=max(head.layers), backend=backend, training=training, features=seen)
        else:
            self.activations(x, max(head.layers), seen, backend)
        return seen.rows

    #: What one loss of a batch asks of every parameter: backpropagation's gradients.
    gradients = credit.backpropagated

    def differentiable_logits(self, x: torch.Tensor, call: differentiable.Call = (
            differentiable.direct), layout: torch.memory_format = torch.preserve_format,
            ) -> torch.Tensor:
        """Logits (N, classes) as plain PyTorch that autograd follows; see differentiable.logits."""
        head = self.heads[0] if len(self.heads) else None
        assert head is None or isinstance(head, LinearHead)
        return differentiable.logits(self, head, x, call, layout)

    def activations(self, x: torch.Tensor, end: int, out: Receiver, backend: str = "auto") -> None:
        """Give h of layers 0..end, before their feature normalisation, of a prepared input."""
        backend = "reference" if traced() else backend
        for i in range(end + 1):
            layer = self.layer(i)
            h, _ = layer.infer(self.transform(i, x), norm=Norm("none"), backend=backend)
            assert h is not None
            out.append(h)
            x = normalise(h, layer.config.offsets(h.shape[1]), layer.config)

    def logits(self, x: torch.Tensor, *, backend: str = "auto") -> list[torch.Tensor]:
        """Logits (N, K) of every head."""
        heads = [h for h in self.heads if isinstance(h, LinearHead)]
        if len({(h.image, h.features) for h in heads}) > 1 or self.encoding is not None:
            return [h(self.head_features(h, x, backend=backend)) for h in heads]
        zs: list[torch.Tensor] = []
        self.run(self.prepare(x), end=max(max(h.layers) for h in heads), backend=backend,
                 features=zs, training=self.batch_statistics)
        return [h(torch.cat([zs[i].flatten(1) for i in h.layers], 1)) for h in heads]

    def scores(self, x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
        """Class scores (N, classes) of samples (N, *in_shape), as `readout` reads them."""
        with torch.no_grad():
            if self.readout.source != "goodness":
                return self.readout.of_logits(self.logits(x, backend=backend))
            start, end = self._range
            return self.readout.of_goodness(self.goodness(x, end=end, backend=backend)[start:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores (N, classes) of samples (N, *in_shape)."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"[network] input expected a floating-point tensor, got {came}")
        return self.scores(x)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for first: it reads Python, of which it knows too little."""
        raise TypeError("[network] torch.jit.script expected a module in its own subset of Python, "
                        f"got {type(self).__name__}; torch.jit.trace(net, x), torch.export and "
                        "torch.compile take it")

    def cut(self, depth: int) -> None:
        """Drop the layers past the first `depth`, and the heads that read them."""
        if not self._range[1] < depth <= len(self.layers):
            raise ValueError(f"[network] a depth expected {self._range[1] + 1} to "
                             f"{len(self.layers)} layers, got {depth}")
        self.layers, self.wires = self.layers[:depth], self.wires[:depth]
        self.heads = nn.ModuleList(
            h for h in self.heads if isinstance(h, LinearHead) and max(h.layers) < depth)
        self.shapes = self.shapes[:depth + 1]

    @typed("network")
    def append(self, layer: LocalLayer, wire: Wire | None = None) -> None:
        """One more layer on top; those below keep what they learned (`Layerwise(start=...)`)."""
        top = len(self.layers) - 1
        self.layers.append(layer)
        self.wires = (*self.wires, wire or Wire())
        try:
            self.shapes = self.infer_shapes()
            self._check_parts()
        except (ValueError, RuntimeError):
            self.layers, self.wires = self.layers[:-1], self.wires[:-1]
            self.shapes = self.shapes[:len(self.layers) + 1]
            raise
        start, end = self._range
        if end == top:  # scores that read the top layer read the new one
            self.set_range(top + 1 if start == end else start, top + 1)

    def _apply(self, fn: Any, recurse: bool = True) -> LocalNet:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_weights_channels_last(self)
        return self
