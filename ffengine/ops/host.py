"""What goes from the host to a device: constants once, what a batch brings without waiting for it.

A copy out of pageable memory, or back to the host, holds the host until the device has done all
that was asked of it before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ffengine.ops.memory_accounting import is_fake
from ffengine.ops.tracing import traced

Constants = dict[Hashable, torch.Tensor]
_constants: Constants = {}
#: Where constants are kept; None: nowhere, they are made anew at every use.
_kept: ContextVar[Constants | None] = ContextVar("constants", default=_constants)


@contextmanager
def keeping_constants(store: Constants | None) -> Iterator[None]:
    """Inside, constants are kept in `store` alone: fake ones must not outlive their dry run."""
    token = _kept.set(store)
    try:
        yield
    finally:
        _kept.reset(token)


def constant(device: torch.device, make: Callable[..., torch.Tensor],
             *args: Hashable) -> torch.Tensor:
    """`make(*args)` on `device`, made and copied there at the first such call; to be read only."""
    if traced() or (store := _kept.get()) is None:
        return make(*args).to(device)  # a traced one must not outlive its trace
    key = (make, args, device)
    if (found := store.get(key)) is None:
        with torch.inference_mode(False):  # or autograd could not use it later
            found = make(*args).to(device)
        if store is not _constants or not is_fake(found):  # under fake tensors of a caller's own
            store[key] = found
    return found


def widths(offsets: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(K,): channels of the groups between `offsets`."""
    return constant(device, _widths, offsets, dtype)


def _widths(offsets: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(offsets, dtype=dtype).diff()


def send(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """t on `device`; a GPU takes it from pinned memory, in the order of its queue."""
    if device.type == "cuda" and t.device.type == "cpu" and not is_fake(t):
        t = t.pin_memory()
    return t.to(device, non_blocking=True)
