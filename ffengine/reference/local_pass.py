"""`local_pass` in plain PyTorch: the definition of correct, in any dtype up to fp64.

16-bit input is computed in fp32 and rounded once at the end, as PyTorch's own group_norm does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ffengine.ops.config import Dropout, LocalPassConfig, Loss, LossFunction, Tile
from ffengine.ops.host import widths
from ffengine.reference.norms import by_length, standardised

_MASK32 = 0xFFFFFFFF


def local_pass(
    a: torch.Tensor, y: Any = None, *, config: LocalPassConfig, g0: torch.Tensor | None = None,
    h_prev: torch.Tensor | None = None, shortcut: torch.Tensor | None = None,
    want_z: bool = True, want_da: bool = False, tile: Tile | None = None, da_scale: float = 1.0,
    clock: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None,
           torch.Tensor | None]:
    """(z, g, loss, coef, da); arguments, shapes and meaning as in ffengine.ops.local_pass."""
    tile = tile or Tile()
    n, c = a.shape[:2]
    offsets = config.offsets(c)
    x = a.double() if a.dtype is torch.float64 else a.float()
    # dh_da: relu's gradient times dropout's keep and scale, at a's size
    mask = torch.ones_like(x) if config.relu_gradient == "straight_through" else (x > 0).to(x.dtype)
    keep = dropout_keep(config.dropout, tuple(a.shape), tile, a.device, clock)
    dh_da = mask if keep is None else mask * keep.to(x.dtype) * config.dropout.keep_scale
    h = F.relu(x)
    if keep is not None:
        # a dropped NaN stays NaN in torch's dropout; selecting keeps that without 0 * inf
        h = torch.where(keep | h.isnan(), h * config.dropout.keep_scale, torch.zeros_like(h))
    size = h.shape
    winner = None
    if config.pool == "max2":
        h, winner = F.max_pool2d(h, 2, return_indices=True)
    if h_prev is not None:
        h = config.blend * h + (1 - config.blend) * h_prev.to(h.dtype)
    g = goodness(h, offsets, config.goodness)
    if g0 is not None:
        g = g + g0.to(g.dtype)
    loss = coef = da = None
    if y is not None:
        loss, dg = loss_and_gradient(g, y, config, tile.rows(n))
        m = 1 if config.goodness == "sum_sq" else _sizes(h, offsets)
        coef = dg / m
        if want_da:
            dh = _spread(coef, offsets, h) * (da_scale * config.blend)
            if config.goodness != "mean":
                dh = dh * (2 * h)
            if winner is not None:
                dh = torch.zeros(size, dtype=h.dtype, device=h.device).flatten(2).scatter_(
                    2, winner.flatten(2), dh.flatten(2)).view(size)
            da = (dh * dh_da).to(a.dtype)
    z = None
    if want_z:
        z = normalise(h, offsets, config)
        z = (z if shortcut is None else z + shortcut.to(z.dtype)).to(a.dtype)
    return z, g, loss, coef, da


def goodness(h: torch.Tensor, offsets: tuple[int, ...], kind: str) -> torch.Tensor:
    """g (N, K): per contiguous channel group, the mean, sum of squares or mean of squares of h."""
    e = h if kind == "mean" else h * h
    parts = [e[:, s:t].flatten(1) for s, t in pairwise(offsets)]
    return torch.stack([p.sum(1) if kind == "sum_sq" else p.mean(1) for p in parts], dim=1)


def normalise(h: torch.Tensor, offsets: tuple[int, ...], config: LocalPassConfig) -> torch.Tensor:
    """z of h: see ffengine.ops.config.Norm."""
    norm = config.norm
    if norm.kind == "none":
        return h
    per_group = norm.kind == "group" or (norm.kind == "length" and norm.scope == "group")
    runs = offsets if per_group else (0, h.shape[1])
    out = []
    for s, t in pairwise(runs):
        part = h[:, s:t].flatten(1)
        part = by_length(part, norm) if norm.kind == "length" else standardised(part, norm.eps)[0]
        out.append(part.view(h.shape[0], t - s, *h.shape[2:]))
    return torch.cat(out, 1)


def loss_and_gradient(g: torch.Tensor, y: Any, config: LocalPassConfig,
                      batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row loss (unscaled) and dL/dg of the batch objective, by autograd on the formula."""
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        if isinstance(config.loss, Loss):
            loss = loss_value(config.loss, leaf, y)
            weight = config.loss.scale(batch)
        else:
            loss, weight = own_loss(config.loss, leaf, y), 1.0 / max(batch, 1)
        dg = slope(loss.sum() * weight, leaf)
    return loss.detach(), dg


def slope(loss: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """dL/dg of a scalar, or ValueError for a loss that g has no part in."""
    found = torch.autograd.grad(loss, g, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise ValueError("[local_pass] a loss function must depend on the goodness, with a gradient"
                         ", got one that does not")
    return found


def own_loss(fn: LossFunction, g: torch.Tensor, y: Any) -> torch.Tensor:
    """A researcher's loss at g, or ValueError if it is not one value a row."""
    loss = fn(g, y)
    if not isinstance(loss, torch.Tensor) or loss.shape != g.shape[:1]:
        came = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"[local_pass] a loss function must return one loss a row, shape "
                         f"({g.shape[0]},), got {came}")
    return loss


def loss_value(loss: Loss, g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One loss a row (a pair for symba); formulas as in ffengine.ops.config."""
    name = loss.name
    p0, p1, p2 = loss.kernel_p()
    if name in ("ce", "cwg"):
        ce = F.cross_entropy(g, y, reduction="none")
        return ce if name == "ce" else p0 * ce + (1 - p0) * _pvn(g, y, p1, p2)
    if name == "pvn":
        return _pvn(g, y, p0, p1)
    if name == "cwc":
        e = g.clamp(-p0, p0).exp()
        return (e.sum(1) + p1).log() - (_at(e, y) + p1).log()
    if name == "sparsemax":
        return sparsemax_loss(g, y)
    if name == "symba":
        half = g.shape[0] // 2
        return _softplus(-p0 * (g[:half, 0] - g[half:, 0]))
    side = 2 * y.to(g.dtype) - 1
    if name == "margin":
        return -side * g[:, int(p0)]
    return _softplus(-side * p1 * (g[:, 0] - p0))


def _pvn(g: torch.Tensor, y: torch.Tensor, theta: float, half: float) -> torch.Tensor:
    own = _at(g, y)
    others = (g.sum(1) - own) / (g.shape[1] - 1)
    return half * (_softplus(theta - own) + _softplus(others - theta))


def _sparsemax_tau(v: torch.Tensor) -> torch.Tensor:
    """tau (N, 1) with sum_j max(v_j - tau, 0) = 1, of rows whose largest value is 0."""
    ordered = v.sort(1, descending=True).values
    total = ordered.cumsum(1) - 1
    rank = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
    size = (rank * ordered > total).sum(1, keepdim=True).clamp_min(1)  # 0: a NaN row
    return total.gather(1, size - 1) / size


def sparsemax(g: torch.Tensor) -> torch.Tensor:
    """Euclidean projection of rows (N, K) onto the simplex (Martins & Astudillo 2016, alg. 1)."""
    v = g - g.max(1, keepdim=True).values
    return (v - _sparsemax_tau(v)).clamp_min(0)


def sparsemax_loss(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1/2 sum_{j in S} (g_j^2 - tau^2) + 1/2 - g_y (Martins & Astudillo 2016, eq. 16)."""
    v = (g - g.max(1, keepdim=True).values).detach()
    # tau is held fixed: d loss / d tau = 0 at its optimum, so the gradient is p - onehot
    tau = _sparsemax_tau(v)
    p = (v - tau).clamp_min(0)
    value = 0.5 * torch.where(p > 0, v**2 - tau**2, torch.zeros_like(v)).sum(1) + 0.5
    value = value - _at(v, y)
    direct = (p * g).sum(1) - _at(g, y)
    return value + direct - direct.detach()


def _at(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return g.gather(1, y[:, None])[:, 0]


def _softplus(x: torch.Tensor) -> torch.Tensor:
    # exact where torch's default turns linear above 20
    return F.relu(x) + torch.log1p(torch.exp(-x.abs()))


def _sizes(h: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    pixels = h[0, 0].numel() if h.shape[0] else 1
    return widths(offsets, h.dtype, h.device) * pixels


def _spread(coef: torch.Tensor, offsets: tuple[int, ...], h: torch.Tensor) -> torch.Tensor:
    """coef (N, K) at the size of h."""
    width = widths(offsets, torch.int64, h.device)
    wide = coef.repeat_interleave(width, dim=1, output_size=h.shape[1])
    return wide.view(*wide.shape, *([1] * (h.dim() - 2))).expand_as(h)


def dropout_keep(drop: Dropout, shape: tuple[int, ...], tile: Tile, device: torch.device,
                 clock: torch.Tensor | None = None) -> torch.Tensor | None:
    """Which elements of a tile are kept, or None without dropout; the same on every back-end.

    clock: int32 (1,), in place of drop.step.
    """
    if drop.p == 0.0:
        return None
    n, per_row = shape[0], 1
    for s in shape[1:]:
        per_row *= s
    start, half, half_start = tile.layout(n)
    row = torch.arange(n, device=device)
    row = torch.where(row < half, row + start, row - half + half_start)
    index = (row[:, None] * per_row + torch.arange(per_row, device=device)).view(shape)
    words = philox4x32(drop.seed, index >> 2, drop.layer,
                       drop.step if clock is None else clock.long())
    word = torch.stack(words).gather(0, (index & 3)[None])[0]
    return word >= drop.threshold


def philox4x32(seed: int, block: torch.Tensor, layer: int,
               step: int | torch.Tensor) -> list[torch.Tensor]:
    """Philox4x32-10 on int64 tensors holding uint32 words; step: a number, or int64 (1,)."""
    c = [block & _MASK32, (block >> 32) & _MASK32, torch.full_like(block, layer & _MASK32),
         torch.zeros_like(block) + (step & _MASK32)]
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # int64 products wrap; the upper word is still right after masking the sign extension
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [((p1 >> 32) & _MASK32) ^ c[1] ^ k0, p1 & _MASK32,
             ((p0 >> 32) & _MASK32) ^ c[3] ^ k1, p0 & _MASK32]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c
