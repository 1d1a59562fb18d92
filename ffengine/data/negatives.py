"""What a negative sample is: a wrong label, a soft wrong row, or a wrong image.

Every draw is a function of its arguments and its generator (see `seeding.negatives_generator`):
numbers are drawn on the generator's own device and torch's global generator is left alone, so a
CPU generator gives the same negatives on every device. Draw for the whole batch, then cut it in
tiles. Labels y are int64 (N,) in [0, num_classes) throughout; results lie on y's (or x's) device.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ffengine.ops.host import send
from ffengine.ops.memory_accounting import is_fake

Negatives = Literal["random", "inverse", "hardest", "permuted", "masked"]
KINDS: tuple[str, ...] = get_args(Negatives)
#: The paper gives no number; six leave regions a few pixels wide, as in its figure.
BLURS = 6


def draw(
    kind: str,
    y: Tensor,
    num_classes: int,
    generator: torch.Generator,
    *,
    goodness: Tensor | None = None,
    x: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The negatives of a batch, by the name of their kind (one of `KINDS`).

    goodness: (N, K), what "hardest" needs. x: (N, C, H, W), what "masked" needs. dtype: of the
        rows of "inverse".

    Returns int64 labels (N,) for random, hardest, permuted; rows (N, K) for inverse; images of
    x's shape for masked.

    Raises ValueError or TypeError, in one line, for an unknown kind, num_classes < 2, labels out
    of range (on the CPU), or a missing argument.
    """
    if kind not in KINDS:
        raise ValueError(f"[negatives] expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "random":
        return random_labels(y, num_classes, generator)
    if kind == "inverse":
        return inverse_rows(y, num_classes, dtype)
    if kind == "permuted":
        _check(y, num_classes)
        return permuted_labels(y, generator)
    if kind == "hardest":
        if goodness is None:
            raise ValueError("[negatives] hardest expected goodness (N, K), got none")
        if goodness.shape[-1:] != (num_classes,):
            raise ValueError(
                f"[negatives] expected goodness (N, {num_classes}), got {tuple(goodness.shape)}"
            )
        return hardest_labels(goodness, y)
    if x is None:
        raise ValueError("[negatives] masked expected images (N, C, H, W), got none")
    return masked_mixtures(x, generator)


def random_labels(y: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """(N,) int64: uniform over the num_classes - 1 wrong labels of each sample (Trifecta, FFLib).

    Raises ValueError or TypeError as `draw`.
    """
    _check(y, num_classes)
    # A step of 1..K-1 around the circle of labels reaches every label but the own one.
    step = torch.randint(
        1, num_classes, y.shape, generator=generator, device=generator.device
    )
    return (y + send(step, y.device)) % num_classes


def inverse_rows(y: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, K) of `dtype`: 1 - one_hot(y), every wrong label at once (FFLib's default, "INVERSE").

    Raises ValueError or TypeError as `draw`.
    """
    _check(y, num_classes)
    rows = torch.ones(y.shape[0], num_classes, dtype=dtype, device=y.device)
    return rows.scatter_(1, y[:, None], 0.0)


def hardest_labels(goodness: Tensor, y: Tensor) -> Tensor:
    """(N,) int64: the wrong label of the highest goodness now, the first one on ties.

    goodness: (N, K) floating point. A network that lowers the goodness of positive samples hands
        in its negative. A NaN counts as the highest; the own label is never returned.

    Raises ValueError or TypeError as `draw`.
    """
    if goodness.dim() != 2 or goodness.shape[:1] != y.shape[:1]:
        raise ValueError(
            f"[negatives] expected goodness ({y.shape[0] if y.dim() else 'N'}, K), "
            f"got {tuple(goodness.shape)}"
        )
    num_classes = goodness.shape[1]
    _check(y, num_classes)
    # Only the wrong columns are looked at: masking the own one with -inf would let it win where
    # all others are -inf.
    column = torch.arange(num_classes - 1, device=y.device)
    wrong = column + (column >= y[:, None])
    best = goodness.detach().gather(1, wrong).argmax(1, keepdim=True)
    return wrong.gather(1, best).squeeze(1)


def permuted_labels(y: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) int64: y[perm] with a random perm of the batch, as in Pezeshki's code.

    A negative may equal its own label: that is the published behaviour.
    """
    order = torch.randperm(y.shape[0], generator=generator, device=generator.device)
    return y[send(order, y.device)]


def masked_mixtures(x: Tensor, generator: torch.Generator, blurs: int = BLURS) -> Tensor:
    """Hybrid images, negatives for data without labels; x's shape, dtype and device.

    mask * x + (1 - mask) * x[perm], one mask (H, W) a sample for all channels: near pixels go
    together as in real images, far ones do not. The mask is a random binary image blurred `blurs`
    times with [1/4, 1/2, 1/4] in both directions (edges repeated), then cut at 0.5. perm is one
    random cycle through the batch, so no image is mixed with itself. Source: Hinton, "The
    Forward-Forward Algorithm: Some Preliminary Investigations" (2022), the simple unsupervised
    example of FF.

    Raises ValueError for other shapes, a batch of one image, or blurs < 0.
    """
    if x.dim() != 4:
        raise ValueError(f"[negatives] masked expected images (N, C, H, W), got {tuple(x.shape)}")
    if x.shape[0] == 1:
        raise ValueError("[negatives] masked expected at least 2 images in a batch, got 1")
    if blurs < 0:
        raise ValueError(f"[negatives] expected blurs >= 0, got {blurs}")
    count, _, height, width = x.shape
    mask = send(blob_masks((count, height, width), generator, blurs), x.device)
    cycle = torch.randperm(count, generator=generator, device=generator.device)
    partner = torch.empty_like(cycle)
    partner[cycle] = cycle.roll(-1)
    return torch.where(mask[:, None], x, x[send(partner, x.device)])


def blob_masks(
    shape: tuple[int, int, int], generator: torch.Generator, blurs: int = BLURS
) -> Tensor:
    """(N, H, W) bool on the generator's device: what `masked_mixtures` cuts images with."""
    # The weights are powers of two: their products are exact, so contracted or not, the sums and
    # with them the masks are the same on every machine.
    soft = torch.randint(0, 2, shape, generator=generator, device=generator.device).float()
    for _ in range(blurs if soft.numel() else 0):
        wide = F.pad(soft, (1, 1, 0, 0), mode="replicate")
        soft = 0.25 * wide[..., :-2] + 0.5 * wide[..., 1:-1] + 0.25 * wide[..., 2:]
        tall = F.pad(soft, (0, 0, 1, 1), mode="replicate")
        soft = 0.25 * tall[..., :-2, :] + 0.5 * tall[..., 1:-1, :] + 0.25 * tall[..., 2:, :]
    return soft > 0.5


def _check(y: Tensor, num_classes: int) -> None:
    """Labels (N,) int64 in range, and at least one wrong one; no sync with another device."""
    if num_classes < 2:
        raise ValueError(f"[negatives] expected num_classes >= 2, got {num_classes}")
    if y.dtype != torch.int64:
        raise TypeError(f"[negatives] expected int64 labels, got {y.dtype}")
    if y.dim() != 1:
        raise ValueError(f"[negatives] expected labels (N,), got {tuple(y.shape)}")
    if y.device.type == "cpu" and y.numel() and not is_fake(y):
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= num_classes:
            got = low if low < 0 else high
            raise ValueError(f"[negatives] expected labels in [0, {num_classes}), got {got}")
