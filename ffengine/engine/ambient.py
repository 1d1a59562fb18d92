"""What a caller switched on around a step and a step does not take over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ffengine.engine.batch import Batch

F = TypeVar("F", bound=Callable[..., Any])


def left_outside(method: F) -> F:
    """The method of something with a device, where neither torch.autocast nor torch.inference_mode
    is on: a step computes in its own dtypes, and a head takes its gradient from autograd."""
    @functools.wraps(method)
    def call(owner: Any, *args: Any, **options: Any) -> Any:
        with torch.inference_mode(False), torch.autocast(owner.device.type, enabled=False):
            return method(owner, *args, **options)

    return call  # type: ignore[return-value]


def ordinary(batch: Batch) -> Batch:
    """The batch with copies of what was made in inference mode, which autograd refuses to save;
    `left_outside`."""
    if not (batch.x.is_inference() or batch.y.is_inference()):
        return batch
    return replace(batch, x=batch.x.clone(), y=batch.y.clone())
