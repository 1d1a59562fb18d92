"""Hyper-parameters a network trains with where the caller does not say otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from ffengine.typed import check_fields


@dataclass(frozen=True)
class Recipe:
    """How a model is trained where the caller does not say otherwise.

    The learning rate falls from lr to lr_min on a cosine over lr_epochs (default: all) epochs; or
    is multiplied by `factor` at each (epoch, factor) of lr_drops; or, with lr_half_linear, stays lr
    for the first half and then falls as 2 (1 + E - e) / E (Löwe). Epochs are counted per layer in
    layer-wise schedules. A batch_size above the training set's means the whole set.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_min: float | None = None
    weight_decay: float = 0.0
    epochs: int = 150
    batch_size: int = 128
    lr_epochs: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    lr_drops: tuple[tuple[int, float], ...] = ()
    lr_half_linear: bool = False

    def __post_init__(self) -> None:
        check_fields("recipe", self)
