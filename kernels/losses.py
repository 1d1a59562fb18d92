"""The local losses on tiles of goodness rows, once for every Triton kernel.

g (R, K) fp32 with m (R, K) its valid entries, y (R, 1) the targets. Each function returns the
loss (R, 1) and dg (R, K) = d loss / d g, unscaled; invalid entries of dg mean nothing.
Formulas: ffengine/ops/config.py; C++ twin: csrc/common/losses.h.
"""

import triton
import triton.language as tl

CE = tl.constexpr(0)
CWC = tl.constexpr(1)
PVN = tl.constexpr(2)
THRESHOLD = tl.constexpr(3)
SYMBA = tl.constexpr(4)
SPARSEMAX = tl.constexpr(5)
CWG = tl.constexpr(6)
MARGIN = tl.constexpr(7)


@triton.jit
def softplus(x):
    """log(1 + e^x) without overflow."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log1p by Kahan's correction: log(u) alone loses all of e below the epsilon
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x <= 0.0, 0.0, x) + log1p


@triton.jit
def sigmoid(x):
    """d softplus / dx."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def total(x, m):
    """Row sums (R, 1) over the valid entries."""
    return tl.sum(tl.where(m, x, 0.0), axis=1, keep_dims=True)


@triton.jit
def top(g, m):
    """Row maxima (R, 1); tl.max drops a NaN, so callers add one back through a sum."""
    return tl.max(tl.where(m, g, float("-inf")), axis=1, keep_dims=True)


@triton.jit
def ce(g, y, m):
    """log sum e^g - g_y."""
    k = tl.arange(0, g.shape[1])[None, :]
    g_top = top(g, m)
    e = tl.exp(g - g_top)
    e_sum = total(e, m)
    own = total(g, m & (k == y))
    return tl.log(e_sum) + (g_top - own), e / e_sum - tl.where(k == y, 1.0, 0.0)


@triton.jit
def cwc(g, y, m, clamp, eps):
    """-log((e^clip(g_y) + eps) / (sum e^clip(g) + eps)), clip to +-clamp; no gradient outside."""
    k = tl.arange(0, g.shape[1])[None, :]
    clipped = tl.where(g < -clamp, -clamp, tl.where(g > clamp, clamp, g))
    e = tl.exp(clipped)
    e_sum = total(e, m) + eps
    own = total(e, m & (k == y)) + eps
    dg = e / e_sum - tl.where(k == y, e / own, 0.0)
    return tl.log(e_sum) - tl.log(own), tl.where((g >= -clamp) & (g <= clamp), dg, 0.0)


@triton.jit
def pvn(g, y, m, theta, half, K):
    """half (softplus(theta - g_y) + softplus(mean of the others - theta))."""
    k = tl.arange(0, g.shape[1])[None, :]
    own = total(g, m & (k == y))
    others = total(g, m & (k != y)) / (K - 1)
    value = half * (softplus(theta - own) + softplus(others - theta))
    d_other = half * sigmoid(others - theta) / (K - 1)
    return value, tl.where(k == y, -half * sigmoid(theta - own), d_other)


@triton.jit
def sparsemax(g, y, m):
    """1/2 sum_S (v^2 - tau^2) + 1/2 - v_y, v = g - max; dg = (v - tau)+ - onehot.

    tau by Michelot's iteration: drop what lies below the threshold of the rest until nothing
    drops, at most K + 1 rounds, no sort.
    """
    k = tl.arange(0, g.shape[1])[None, :]
    # 0 * sum is 0, or NaN where the row holds a NaN, which tl.max dropped
    v = g - (top(g, m) + 0.0 * total(g, m))
    tau = tl.full((g.shape[0], 1), float("-inf"), tl.float32)
    count = tl.full((g.shape[0], 1), -1.0, tl.float32)
    shrinking = tl.full((), 1, tl.int32)
    while shrinking > 0:
        live = m & (v > tau)
        n = total(tl.where(live, 1.0, 0.0), m)
        moved = n != count
        tau = tl.where(moved & (n > 0.0), (total(v, live) - 1.0) / tl.where(n > 0.0, n, 1.0), tau)
        count = n
        shrinking = tl.max(tl.where(moved, 1, 0))
    live = v > tau
    value = 0.5 * total(tl.where(live, v * v - tau * tau, 0.0), m) + 0.5 - total(v, m & (k == y))
    p = tl.where(live, v - tau, v * 0.0)
    return value, p - tl.where(k == y, 1.0, 0.0)


@triton.jit
def side(y):
    """+1 for a positive row, -1 for a negative one."""
    return tl.where(y > 0, 1.0, -1.0)


@triton.jit
def threshold(g, y, theta, sign):
    """softplus(-s (g - theta)), s = side(y) sign; one goodness a row."""
    s = side(y) * sign
    x = -s * (g - theta)
    return tl.sum(softplus(x), axis=1, keep_dims=True), -s * sigmoid(x)


@triton.jit
def symba(g_pos, g_neg, alpha):
    """softplus(-alpha (g_pos - g_neg)); d / d g_pos, which is -d / d g_neg."""
    x = -alpha * (g_pos - g_neg)
    return tl.sum(softplus(x), axis=1, keep_dims=True), -alpha * sigmoid(x)


@triton.jit
def margin(g, y, m, group):
    """-side(y) g[:, group]."""
    k = tl.arange(0, g.shape[1])[None, :]
    chosen = k.to(tl.float32) == group
    return -side(y) * total(g, m & chosen), tl.where(chosen, -side(y), 0.0)


@triton.jit
def row_loss(g, y, m, K, p0, p1, p2, kind: tl.constexpr):
    """Every loss of one row; symba, which needs its partner, has its own function."""
    if kind == CE:
        value, dg = ce(g, y, m)
    elif kind == CWC:
        value, dg = cwc(g, y, m, p0, p1)
    elif kind == PVN:
        value, dg = pvn(g, y, m, p0, p1, K)
    elif kind == SPARSEMAX:
        value, dg = sparsemax(g, y, m)
    elif kind == CWG:
        value_ce, dg_ce = ce(g, y, m)
        value_pvn, dg_pvn = pvn(g, y, m, p1, p2, K)
        value = p0 * value_ce + (1.0 - p0) * value_pvn
        dg = p0 * dg_ce + (1.0 - p0) * dg_pvn
    elif kind == THRESHOLD:
        value, dg = threshold(g, y, p0, p1)
    else:
        tl.static_assert(kind == MARGIN)
        value, dg = margin(g, y, m, p0)
    return value, dg
