"""Hyper-parameters a network trains with where the caller does not say otherwise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a model is trained where the caller does not say otherwise.

    The learning rate falls from lr to lr_min on a cosine over lr_epochs (default: all) epochs.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_min: float | None = None
    weight_decay: float = 0.0
    epochs: int = 150
    batch_size: int = 128
    lr_epochs: int | None = None
