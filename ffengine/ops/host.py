"""What goes from the host to a device: constants once, what a batch brings without waiting for it.

A copy out of pageable memory, or back to the host, holds the host until the device has done all
that was asked of it before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ffengine.ops import scratch

Constants = dict[Hashable, torch.Tensor]
_constants: Constants = {}


def constant(device: torch.device, make: Callable[..., torch.Tensor],
             *args: Hashable) -> torch.Tensor:
    """`make(*args)` on `device`, made and copied there at the first such call; to be read only."""
    store = scratch.constants() if scratch.rehearsing() else _constants
    if store is None or torch.compiler.is_compiling():  # a traced one must not outlive its trace
        return make(*args).to(device)
    key = (make, args, device)
    if key not in store:
        with torch.inference_mode(False):  # or autograd could not use it later
            store[key] = make(*args).to(device)
    return store[key]


def widths(offsets: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(K,): channels of the groups between `offsets`."""
    return constant(device, _widths, offsets, dtype)


def _widths(offsets: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(offsets, dtype=dtype).diff()


def send(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """t on `device`; a GPU takes it from pinned memory, in the order of its queue."""
    if device.type == "cuda" and t.device.type == "cpu" and not scratch.rehearsing():
        t = t.pin_memory()
    return t.to(device, non_blocking=True)
