"""Settings of the ops, as frozen dataclasses: everything about a call that is not a tensor.

The numeric codes here are the ones `csrc/params.h` and `kernels/` read; they are part of the
boundary between Python and the kernels and are checked against the C++ side by a test.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from ffengine.typed import check_fields, typed

#: What annotations say of a field where torch records an op (ffengine/ops/launch.py): a tensor is
#: written, a whole number has no sign in its 64 bits, a field stays behind.
WRITTEN, UNSIGNED, ASIDE = "written", "unsigned", "aside"
Written = Annotated[torch.Tensor, WRITTEN]
Seed = Annotated[int, UNSIGNED]

LOSS_CODES = {
    "none": -1,
    "ce": 0,
    "cwc": 1,
    "pvn": 2,
    "threshold": 3,
    "symba": 4,
    "sparsemax": 5,
    "cwg": 6,
    "margin": 7,
}
GOODNESS_CODES = {"mean": 0, "sum_sq": 1, "mean_sq": 2}
NORM_CODES = {"none": 0, "group": 1, "layer": 2, "length": 3}
PHASE_FUSED, PHASE_STATS, PHASE_APPLY = 0, 1, 2

#: A researcher's own loss: (g (N, K), y) -> per-sample losses (N,), differentiable in g.
LossFunction = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """A local loss on the goodness matrix g (N, K); build one with the functions below.

    `p` are the loss's numbers in kernel order; `row_loss` families (threshold, bce, symba,
    margin) work on K = 1 goodness and take y as 1 = positive / 0 = negative row.
    """

    name: str
    p: tuple[float, float, float] = (0.0, 0.0, 0.0)
    #: "mean" averages positive and negative halves over 2B (CwComp); "sum" adds the two means (SN).
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in self.p):
            raise ValueError(f"[loss] {self.name} expected finite numbers, got {self.p}")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"[loss] reduction expected mean or sum, got {self.reduction!r}")

    @property
    def code(self) -> int:
        return LOSS_CODES["threshold" if self.name == "bce" else self.name]

    @property
    def paired(self) -> bool:
        """One loss value a (positive, negative) pair: row n and row n + N/2."""
        return self.name == "symba"

    @property
    def binary(self) -> bool:
        """The target is positive/negative, not a class."""
        return self.name in ("threshold", "bce", "symba", "margin")

    def kernel_p(self) -> tuple[float, float, float]:
        """`p` with the halves' factor of the reduction filled in where one row holds both."""
        half = 0.5 if self.reduction == "mean" else 1.0
        if self.name == "pvn":
            return (self.p[0], half, 0.0)
        if self.name == "cwg":
            return (self.p[0], self.p[1], half)
        return self.p

    def scale(self, batch: int) -> float:
        """Weight of one loss value in the objective of a batch of `batch` rows."""
        if batch == 0:
            return 0.0
        if self.paired:
            return 2.0 / batch
        if self.reduction == "sum":
            if self.name in ("threshold", "bce"):
                return 2.0 / batch
            if self.name == "margin":
                return 1.0
        return 1.0 / batch


def ce(reduction: Literal["mean", "sum"] = "mean") -> Loss:
    """Cross-entropy of softmax(g) at y (DeeperForward eq. 13)."""
    return Loss("ce", reduction=reduction)


def cwc(clamp: float = 50.0, eps: float = 1e-9) -> Loss:
    """CwC: -log((e^clip(g_y) + eps) / (sum_c e^clip(g_c) + eps)), clip to ±clamp (CwComp)."""
    return Loss("cwc", (clamp, eps, 0.0))


def pvn(theta: float = 2.0, reduction: Literal["mean", "sum"] = "mean") -> Loss:
    """PvN: softplus(theta - g_y) + softplus(mean of the other groups - theta)."""
    return Loss("pvn", (theta, 0.0, 0.0), reduction)


def threshold(
    theta: float = 2.0, maximize: bool = True, reduction: Literal["mean", "sum"] = "mean"
) -> Loss:
    """softplus(-s(g - theta)) on positive rows, softplus(s(g - theta)) on negative ones.

    s = +1 if `maximize` (Hinton, FFLib's L+), else -1 (FFLib's L-). K = 1.
    """
    return Loss("threshold", (theta, 1.0 if maximize else -1.0, 0.0), reduction)


@typed("loss")
def bce(width: float, reduction: Literal["mean", "sum"] = "mean") -> Loss:
    """BCE-with-logits of g - width (Löwe et al.: g = sum of squares, width = units). K = 1."""
    return Loss("bce", (float(width), 1.0, 0.0), reduction)


def symba(alpha: float = 4.0) -> Loss:
    """softplus(-alpha (g_pos - g_neg)) per pair: row n against row n + N/2 (Trifecta). K = 1."""
    return Loss("symba", (alpha, 0.0, 0.0))


def sparsemax() -> Loss:
    """Sparsemax loss (Martins & Astudillo 2016), the Sparse-CE of the support-neuron paper."""
    return Loss("sparsemax")


def cwg(
    weight: float = 0.28, theta: float = 2.0, reduction: Literal["mean", "sum"] = "mean"
) -> Loss:
    """CWG: weight·CE + (1 - weight)·PvN(theta) (CwComp)."""
    return Loss("cwg", (weight, theta, 0.0), reduction)


@typed("loss")
def margin(group: int, reduction: Literal["mean", "sum"] = "sum") -> Loss:
    """Growth: maximise sum of g[:, group] over y = 1 rows minus the sum over y = 0 rows."""
    return Loss("margin", (float(group), 0.0, 0.0), reduction)


@dataclass(frozen=True)
class Norm:
    """Feature normalisation of h into z.

    group: per class group, centred, biased variance, eps inside the root.
    layer: the same over the whole sample. none: z = h.
    length: z = h / (‖h‖ + eps), ‖·‖ the l2 norm or the root mean square, eps outside the root.
    """

    kind: Literal["none", "group", "layer", "length"] = "group"
    eps: float = 1e-5
    length: Literal["l2", "rms"] = "rms"
    scope: Literal["sample", "group"] = "sample"

    def __post_init__(self) -> None:
        if self.kind not in NORM_CODES:
            raise ValueError(
                f"[norm] kind must be one of {', '.join(NORM_CODES)}, got {self.kind!r}"
            )
        check_fields("norm", self)
        if self.eps < 0:
            raise ValueError(f"[norm] eps expected 0 or more, got {self.eps}")


@dataclass(frozen=True)
class Dropout:
    """Counter-based dropout: Philox4x32-10 under key = seed at (⌊i/4⌋ low, high, layer, step).

    i is the element's logical NCHW index in the whole batch; word i mod 4 decides it.
    """

    p: float = 0.0
    seed: Seed = 0
    layer: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.p, (int, float)) or not 0.0 <= self.p < 1.0:
            raise ValueError(f"[dropout] p must lie in [0, 1), got {self.p}")

    @property
    def threshold(self) -> int:
        """A word below this drops its element."""
        return math.ceil(self.p * 2**32)

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p)


@dataclass(frozen=True)
class BatchNorm:
    """BatchNorm after the activation, for `batch_pass`.

    order: "pool_norm": relu, max-pool (where the config pools), BatchNorm (CwComp); "norm_pool":
    relu, BatchNorm, max-pool (support neurons).
    use_running: normalise by the running statistics in training too, as they stood before the
    call: constants, through which no gradient flows (Trifecta, single samples).
    """

    eps: float = 1e-5
    momentum: float = 0.1
    order: Literal["norm_pool", "pool_norm"] = "pool_norm"
    use_running: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("norm_pool", "pool_norm"):
            raise ValueError(
                f"[batch_norm] order must be norm_pool or pool_norm, got {self.order!r}")
        check_fields("batch_norm", self)


@dataclass(frozen=True)
class Peer:
    """Peer normalisation, for `batch_pass` (Hinton; Löwe et al.'s code).

    r' = momentum r + (1 - momentum) mean of h over the positive rows; the penalty
    weight mean_c (mean(r') - r'_c)^2 joins the batch objective. With weight 0 there is no peer
    normalisation, and r stays as it is (the published code's way).
    """

    weight: float = 0.03
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_fields("peer", self)


@dataclass(frozen=True)
class Tile:
    """Which rows of the whole batch a call sees.

    `start`: first row; `batch`: rows of the whole batch (None: the call is the whole batch);
    `paired`: the call's first half are rows start…, its second half rows batch/2 + start….
    """

    start: int = 0
    batch: int | None = None
    paired: bool = False

    def rows(self, n: int) -> int:
        return n if self.batch is None else self.batch

    def layout(self, n: int) -> tuple[int, int, int]:
        """(start, half, half_start): row i is batch row start + i, then half_start + i - half."""
        if self.paired and self.batch is not None:
            return self.start, n // 2, self.batch // 2 + self.start
        return self.start, n, 0


@dataclass(frozen=True)
class LocalPassConfig:
    """Everything about `local_pass` that is not a tensor.

    groups: K equal groups, or channel offsets (0, …, C) of unequal ones.
    relu_gradient: "masked" (published code: 1[a > 0]) or "straight_through" (paper, eq. 6).
    pool: "max2" pools 2×2 between activation and goodness, floor mode.
    blend: beta of h' = beta·h + (1 - beta)·h_prev (FFRNN); 1 means none.
    """

    groups: int | tuple[int, ...] = 10
    goodness: Literal["mean", "sum_sq", "mean_sq"] = "mean"
    loss: Loss | LossFunction = field(default_factory=ce)
    norm: Norm = Norm()
    relu_gradient: Literal["masked", "straight_through"] = "masked"
    pool: Literal["none", "max2"] = "none"
    blend: float = 1.0
    dropout: Dropout = Dropout()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("goodness", self.goodness, tuple(GOODNESS_CODES)),
            ("relu_gradient", self.relu_gradient, ("masked", "straight_through")),
            ("pool", self.pool, ("none", "max2")),
        ):
            if value not in known:
                raise ValueError(
                    f"[local_pass] {name} must be one of {', '.join(known)}, got {value!r}"
                )
        for name, kind in (("groups", (int, tuple)), ("norm", Norm), ("dropout", Dropout),
                           ("blend", (int, float))):
            if not isinstance(getattr(self, name), kind):
                check_fields("local_pass", self)  # says which and what
        if not 0 <= self.blend <= 1:
            raise ValueError(f"[local_pass] blend expected 0 to 1, got {self.blend}")
        if not (isinstance(self.loss, Loss) or callable(self.loss)):
            raise TypeError(
                "[local_pass] loss must be a Loss or a function of (g, y), "
                f"got {type(self.loss).__name__}"
            )

    def offsets(self, channels: int) -> tuple[int, ...]:
        """Channel offsets (K + 1 values) of the groups, or ValueError."""
        if isinstance(self.groups, int):
            if self.groups < 1 or channels % self.groups:
                raise ValueError(
                    f"[local_pass] channels must be a multiple of the {self.groups} groups, "
                    f"got {channels} channels"
                )
            return _equal(self.groups, channels)
        off = self.groups
        if len(off) < 2 or off[0] != 0 or off[-1] != channels or list(off) != sorted(set(off)):
            raise ValueError(
                f"[local_pass] group offsets must rise strictly from 0 to {channels}, got {off}"
            )
        return off


@functools.lru_cache(maxsize=256)
def _equal(groups: int, channels: int) -> tuple[int, ...]:
    return tuple(range(0, channels + 1, channels // groups))


def da_scale(dtype: torch.dtype, goodness: str, batch: int, m: int) -> float:
    """Power of two that keeps fp16 gradients normal: dL/dg ~ 1/batch, and 1/m for means.

    da is stored times this and weight_update divides by it; 1 for every other dtype.
    """
    if dtype is not torch.float16 or batch == 0:
        return 1.0
    return 2.0 ** math.floor(math.log2(batch * (1 if goodness == "sum_sq" else m)))
