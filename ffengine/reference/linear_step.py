"""`linear_step` in plain PyTorch: the definition of correct, in any dtype up to fp64.

The composition itself: normalised input, F.linear, local_pass, weight gradient, tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from ffengine.ops.config import LocalPassConfig, Loss, Norm, Tile, da_scale
from ffengine.reference.local_pass import local_pass
from ffengine.reference.norms import by_length
from ffengine.reference.weight_update import bias_gradient, weight_gradient


class Gradients(NamedTuple):
    """A step without its optimizer: what `linear_step` returns, and the two gradients."""

    g: torch.Tensor
    loss: torch.Tensor
    coef: torch.Tensor
    weight: torch.Tensor  # (O, in)
    bias: torch.Tensor  # (O,)


def linear_step(
    weight: torch.Tensor, x: torch.Tensor, y: Any, *, config: LocalPassConfig,
    bias: torch.Tensor | None = None, input_norm: Norm | None = None,
    g0: torch.Tensor | None = None, tile_rows: int | None = None,
) -> Gradients:
    """Goodness, loss, coef and gradients; arguments and shapes as in ffengine.ops.linear_step."""
    n, k = x.shape[0], len(config.offsets(weight.shape[0])) - 1
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    paired = isinstance(config.loss, Loss) and config.loss.paired
    scale = da_scale(x.dtype, config.goodness, n, max(weight.shape[0] // k, 1))
    g, coef = (torch.empty(n, k, dtype=wide, device=x.device) for _ in range(2))
    loss = torch.empty(n // 2 if paired else n, dtype=wide, device=x.device)
    dw = torch.zeros_like(weight)
    db = torch.zeros(weight.shape[0], dtype=weight.dtype, device=x.device)
    for tile, parts in tiles(n, tile_rows or max(n, 1), paired):
        z = normalise_input(gather(x, parts), input_norm)
        a = F.linear(z, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        _, *results = local_pass(
            a, gather(y, parts), config=config, g0=None if g0 is None else gather(g0, parts),
            want_z=False, want_da=True, tile=tile, da_scale=scale)
        *small, da = cast(list[torch.Tensor], results)  # y is given: nothing is None
        for whole, part in zip((g, loss, coef), small, strict=True):
            scatter(whole, part, parts)
        dw += weight_gradient(z, da, weight, 1, 0) / scale
        db += bias_gradient(da, weight.dtype) / scale
    return Gradients(g, loss, coef, dw, db)


def normalise_input(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """x / (||x|| + eps) row by row in x's dtype, l2 norm or root mean square; x without a norm."""
    if norm is None or norm.kind == "none":
        return x
    return by_length(x if x.dtype is torch.float64 else x.float(), norm).to(x.dtype)


def tiles(n: int, rows: int, paired: bool) -> Iterator[tuple[Tile, tuple[slice, ...]]]:
    """Tiles of at most `rows` rows of a batch of n, and where each tile's rows lie in it.

    Paired: a tile's halves are rows start… and n/2 + start…, at least one pair.
    """
    half = n // 2
    if paired:
        step = max(1, rows // 2)
        for start in range(0, half, step):
            stop = min(start + step, half)
            yield Tile(start, n, True), (slice(start, stop), slice(half + start, half + stop))
        return
    for start in range(0, n, rows):
        yield Tile(start, n), (slice(start, min(start + rows, n)),)


def gather(t: torch.Tensor, parts: tuple[slice, ...]) -> torch.Tensor:
    """A tile's rows of t: a view where they lie together."""
    return t[parts[0]] if len(parts) == 1 else torch.cat([t[p] for p in parts])


def scatter(whole: torch.Tensor, part: torch.Tensor, parts: tuple[slice, ...]) -> None:
    """A tile's results to their rows of the whole batch; one value a pair goes to its first row."""
    for i, rows in enumerate(parts):
        size = rows.stop - rows.start
        if i * size < part.shape[0]:
            whole[rows] = part[i * size:(i + 1) * size]
