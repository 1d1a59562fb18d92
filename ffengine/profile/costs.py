"""What a call must move and compute: the ops' own `bytes_moved`, and products from their shapes.

FLOP are those of products, a multiply-add counted as two; a sweep's few operations an element are
left out, its bytes decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ffengine.ops import batch_pass as batch_op
from ffengine.ops import linear_step as linear_op
from ffengine.ops import local_pass as pass_op
from ffengine.ops import weight_update as update_op
from ffengine.ops.optim import Parameter


@dataclass(frozen=True)
class Cost:
    """Bytes to and from memory, FLOP, and the product (rows, inner, columns) they belong to."""

    bytes: int = 0
    flops: int = 0
    product: tuple[int, int, int] | None = None
    dtype: torch.dtype = torch.float32


def size(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def shared(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One storage; fake tensors have no address to compare."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def product(a: torch.Tensor, weight: torch.Tensor, times: int = 1) -> dict[str, Any]:
    """Of a (N, O, ...) = weight (O, I, ...) on patches, so many times over: Cost's fields."""
    rows, inner, out = a.numel() // max(a.shape[1], 1), weight[0].numel(), weight.shape[0]
    return {"flops": 2 * times * rows * inner * out, "product": (rows, inner, out),
            "dtype": a.dtype}


def forward(result: torch.Tensor, layer: Any, u: torch.Tensor, *_: Any, **__: Any) -> Cost:
    """LocalLayer.preactivation: input and weights read, a written."""
    weights = layer.weight.numel() * u.element_size()
    return Cost(size(u, result) + weights, **product(result, layer.weight))


def normalised(result: Any, layer: Any, x: torch.Tensor, *_: Any, **__: Any) -> Cost:
    """LocalLayer.enter with a norm: x read, the normalised input written."""
    return Cost(size(x, result[0]))


def local_sweep(result: Any, a: torch.Tensor, *_: Any, config: Any,
                shortcut: torch.Tensor | None = None, **__: Any) -> Cost:
    return Cost(pass_op.bytes_moved(tuple(a.shape), a.dtype, config, want_z=result.z is not None,
                                    want_da=result.da is not None,
                                    shortcut=shortcut is not None))


def batch_sweep(result: Any, a: torch.Tensor, *_: Any, config: Any, coupling: Any,
                **__: Any) -> Cost:
    return Cost(batch_op.bytes_moved(tuple(a.shape), a.dtype, config, coupling,
                                     want_z=result.z is not None,
                                     want_da=result.da is not None))


def update(result: None, weight: Parameter, x: torch.Tensor, da: torch.Tensor, *, optim: Any,
           finish: bool = True, **_: Any) -> Cost:
    moved = update_op.bytes_moved(
        tuple(x.shape), tuple(da.shape), tuple(weight.value.shape), x.dtype, optim=optim,
        accumulate=weight.accumulate is not None, finish=finish)
    return Cost(moved, **product(da, weight.value))


def stepped(result: None, p: Parameter, grad: torch.Tensor, *, optim: Any, **_: Any) -> Cost:
    """gradient_update: the gradient read, weight and states read and written."""
    return Cost(size(grad) + 2 * (1 + optim.states) * size(p.value))


def streamed(result: Any, weight: Parameter, x: torch.Tensor, *_: Any, config: Any, optim: Any,
             **__: Any) -> Cost:
    """linear_step: forward and gradient, the activations never stored."""
    (n, features), out = x.shape, len(weight.value)
    moved = linear_op.bytes_moved((n, features), (out, features), x.dtype, config, optim=optim)
    return Cost(moved, 4 * n * features * out, (n, features, out), x.dtype)


def crossed(result: torch.Tensor, layer: Any, u: torch.Tensor, da: torch.Tensor, *_: Any,
            **__: Any) -> Cost:
    """affine.input_gradient: dL/du of da."""
    weights = layer.weight.numel() * da.element_size()
    return Cost(size(da, result) + weights, **product(da, layer.weight))


def elementwise(result: Any, *args: Any, **_: Any) -> Cost:
    """Every tensor given is read, the result written."""
    given = [t for t in args if isinstance(t, torch.Tensor)]
    return Cost(size(*given, result if isinstance(result, torch.Tensor) else None))


def copied(result: torch.Tensor, *_: Any) -> Cost:
    """Rows.of: a tile's rows of both halves, side by side."""
    return Cost(2 * size(result))


def put(result: None, rows: Any, whole: Any, part: torch.Tensor) -> Cost:
    """Rows.put: a tile's rows copied into the whole map."""
    return Cost(2 * size(part))


def entered(result: torch.Tensor, made: Any, rows: Any, *_: Any) -> Cost:
    """InputRows.of: the samples read, the rows written, unless they are the batch itself."""
    x = made.item if isinstance(made.item, torch.Tensor) else made.item.x
    read = size(x) * min(rows.count, len(x)) // max(len(x), 1)
    return Cost(0 if shared(result, x) else read + size(result))


def transformed(result: torch.Tensor, net: Any, i: int, x: torch.Tensor) -> Cost:
    """LocalNet.transform: pooled or copied, where it is not a view."""
    return Cost(0 if shared(result, x) else size(x, result))


def joined(result: Any, net: Any, i: int, shortcut: torch.Tensor | None, met: bool) -> Cost:
    """LocalNet.join: both maps read and the sum, or both, written, unless they have met; then the
    pooled branch."""
    wire, (z, after) = net.wires[i], result
    moved = 0 if met else {"none": 0, "add": 3 * size(z), "concat": 2 * size(z)}[wire.join]
    return Cost(moved + (size(z, after) if wire.branch_pool else 0))


def concatenated(result: Any, *_: Any) -> Cost:
    """instructions.concatenate: both maps read, and written as one."""
    return Cost(2 * size(*result))


def placed(result: Any, at: Any, line: Any, *_: Any) -> Cost:
    """instructions.place: the shortcut read and written."""
    return Cost(2 * size(result[0][:, at.ctx.net.layer(line.index).weight.shape[0]:]))


def branched(result: Any, *_: Any) -> Cost:
    """instructions.branch: a map read, its pooled form written."""
    return Cost(5 * size(*result))


def classified(result: Any, ctx: Any, index: int, features: torch.Tensor, y: Any) -> Cost:
    """heads.train_head: logits, weight gradient, optimizer."""
    weight = ctx.net.heads[index].weight
    (n, inner), out = features.shape, weight.shape[0]
    moved = update_op.bytes_moved((n, inner), (n, out), (out, inner), weight.dtype,
                                  optim=ctx.optimizer.config(weight))
    return Cost(size(features, weight, result[1]) + moved, 4 * n * inner * out, (n, inner, out),
                weight.dtype)
