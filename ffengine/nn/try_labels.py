"""Try all labels: goodness of every label in batched passes of bounded memory.

The first layer is linear in its encoded input, and an encoded input is base(x) + mark(k) on
disjoint elements, so A x is computed once an image and A mark(k) once a label. What normalises the
input only scales and shifts that sum:

    a[n, k] = alpha[n, k] (A w base(x_n) + A w mark(k)) + beta[n, k] A w 1 + A b 1 + bias

with (w, b) the affine map of the norm, alpha and beta of a sample: 1 and 0 for BatchNorm in
evaluation, 1 / (length + eps) and 0 for length normalisation, rstd and -rstd mean for LayerNorm.
"""

from __future__ import annotations

import functools
import math

import torch

from ffengine.nn.chain import Chain
from ffengine.nn.layers import as_laid_out
from ffengine.nn.norms import input_scale
from ffengine.ops.tracing import traced

#: Bytes of one layer's maps in flight: a chunk of images times all labels.
CHUNK_BYTES = 8 << 20


def label_goodness(net: Chain, x: torch.Tensor, end: int,
                   backend: str = "auto") -> list[torch.Tensor]:
    """Goodness (N, K) of layers 0..end for every label, of samples x (N, *in_shape)."""
    encoding = net.encoding
    assert encoding is not None
    count = encoding.num_classes
    # the overlay's value is of the whole batch, whatever the chunks
    eye = torch.eye(count, dtype=x.dtype, device=x.device) * encoding.scale(x)
    marks = encoding.mark(eye)
    if traced():
        return _of_rows(net, x, marks, end, backend)
    widest = max(math.prod(shape) for shape in (*net.shapes, *(
        net.layer(i).out_shape(net.input_of(i, net.shapes[i])) for i in range(end + 1))))
    widest *= x.element_size()
    rows = max(1, CHUNK_BYTES // (count * widest))
    parts = [_of_rows(net, x[start:start + rows], marks, end, backend)
             for start in range(0, max(x.shape[0], 1), rows)]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _of_rows(net: Chain, x: torch.Tensor, marks: torch.Tensor, end: int,
             backend: str) -> list[torch.Tensor]:
    """Goodness (N, K) per layer; rows of the pass are (image, label), labels fastest."""
    assert net.encoding is not None
    a = first_preactivation(net, net.encoding.base(x), marks)
    goodness = net.run(a=a, end=end, backend=backend)
    return [g.view(-1, marks.shape[0]) for g in goodness]


def first_preactivation(net: Chain, base: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """a (N K, O, ...) of the first layer for images base (N, ...) with every mark (K, ...)."""
    layer = net.layer(0)
    alpha, beta, w, b = None, None, None, None
    if layer.pre_norm is None:  # the image's norm comes before what stands before the layer
        alpha, beta, w, b = _normalisation(net, base, marks)
    base, marks = net.transform(0, base), net.transform(0, marks)
    if layer.pre_norm is not None:
        alpha, beta, w, b = _normalisation(net, base, marks)
    rows, columns = base.shape[0], marks.shape[0]
    bias = None if layer.bias is None else layer.bias.detach().to(base.dtype)
    weight = layer.weight.detach().to(base.dtype)

    def applied(part: torch.Tensor) -> torch.Tensor:
        part = part if w is None else part * w
        return layer.apply_weight(as_laid_out(part), weight, None)

    assert net.encoding is not None
    place = net.encoding.columns
    image = applied(base)
    if place is not None and w is None:  # the label's columns of the weight are all it meets
        label = marks[:, place] @ weight[:, place].t()
    else:
        label = applied(marks)
    a = image.unsqueeze(1) + label.unsqueeze(0)
    ones = [1] * (image.dim() - 1)
    if alpha is not None:
        a.mul_(alpha.view(rows, columns, *ones))
    if beta is not None:
        a.addcmul_(beta.view(rows, columns, *ones), applied(torch.ones_like(marks[:1])))
    if b is not None:
        shift = b.expand(1, *base.shape[1:])
        a.add_(layer.apply_weight(as_laid_out(shift), weight, None))
    if bias is not None:
        a.add_(bias.view(-1, *ones[1:]))
    return as_laid_out(a.flatten(0, 1))


Scales = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _normalisation(net: Chain, base: torch.Tensor, marks: torch.Tensor) -> Scales:
    """(alpha (N, K), beta (N, K), w, b): the input's norms as scale and shift; None: not there."""
    norm, dtype = net.layer(0).pre_norm, base.dtype
    if norm is None:
        if net.input_norm == "none":
            return None, None, None, None
        scaled = functools.partial(input_scale, net.input_norm)
        return (*_moments(base, marks, scaled), None, None)
    if norm.folded:
        assert norm.running_mean is not None and norm.running_var is not None
        w = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        b = norm.bias.detach() - w * norm.running_mean
        like = (-1, *[1] * (base.dim() - 2))
        return None, None, w.to(dtype).view(like), b.to(dtype).view(like)

    def scale(mean: torch.Tensor, square: torch.Tensor,
              width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if norm.kind == "layer-no-mean":
            return (square + norm.eps).rsqrt(), None
        rstd = (square - mean * mean + norm.eps).rsqrt()
        return rstd, -rstd * mean

    w, b = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    return (*_moments(base, marks, scale), w, b)


def _moments(base: torch.Tensor, marks: torch.Tensor,
             scale: object) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A sample norm's (alpha, beta) from the mean and mean square of base + mark."""
    # in fp64, because the variance is a difference of moments here
    width = base[0].numel() if base.shape[0] else 1
    image, label = base.flatten(1).double(), marks.flatten(1).double()
    mean = (image.sum(1)[:, None] + label.sum(1)[None]) / width
    square = ((image * image).sum(1)[:, None] + (label * label).sum(1)[None]) / width
    alpha, beta = scale(mean, square, width)  # type: ignore[operator]
    return alpha.to(base.dtype), None if beta is None else beta.to(base.dtype)
