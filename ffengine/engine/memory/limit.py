"""A memory budget as the CUDA allocator's own limit: a step that needs more than its plan fails.

    limit = budget + what others hold + library workspaces + the allocator's rounding

The plan describes tensors. Library workspaces and rounding come from the same allocator and have
rows of their own, each with a bound.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

#: cuBLAS and cuBLASLt hold up to 32 MiB each (torch's default on compute capability 9.0, 8 MiB
#: below); cuDNN gets the same, and falls back on an algorithm with less where that is refused.
LIBRARY_WORKSPACES = 96 * 2**20
#: The caching allocator takes segments of 2 MiB and of 20 MiB, and fills them imperfectly.
ALLOCATOR_ROUNDING = 64 * 2**20


@dataclass(frozen=True)
class AllocatorLimit:
    """Rows of the limit, in bytes. `others`: allocated before, by nothing in the plan."""

    budget: int
    others: int = 0
    library_workspaces: int = LIBRARY_WORKSPACES
    allocator_rounding: int = ALLOCATOR_ROUNDING

    @property
    def bytes(self) -> int:
        """The limit."""
        return sum(asdict(self).values())

    def fraction(self, total: int) -> float:
        """Of a device's memory, as the allocator takes it; at most all of it."""
        return min(1.0, self.bytes / total)


#: Of the process: what threads have in force on a device, and what was before them.
_in_force: dict[torch.device, list[float]] = {}
_before: dict[torch.device, float] = {}
_lock = threading.Lock()


class enforced:
    """`with enforced(limit, device):` torch raises OutOfMemoryError beyond the limit.

    The allocator knows one limit for all threads: it is the sum of those in force, and what other
    code of this process allocates meanwhile counts too. What was in force before the first comes
    back after the last; None, or a device without such a limit, changes nothing.
    """

    def __init__(self, limit: AllocatorLimit | None, device: torch.device) -> None:
        self.limit = limit if device.type == "cuda" else None
        self.device = device

    def __enter__(self) -> enforced:
        if self.limit is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            self._fraction = self.limit.fraction(total)
            with _lock:
                if not _in_force.setdefault(self.device, []):
                    _before[self.device] = torch.cuda.get_per_process_memory_fraction(self.device)
                _in_force[self.device].append(self._fraction)
                self._set()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.limit is not None:
            with _lock:
                _in_force[self.device].remove(self._fraction)
                self._set()

    def _set(self) -> None:
        before, fractions = _before[self.device], _in_force[self.device]
        torch.cuda.set_per_process_memory_fraction(
            min(before, sum(fractions)) if fractions else before, self.device)


def limit_for(budget: int | None, planned: Iterable[torch.Tensor],
              device: torch.device) -> AllocatorLimit | None:
    """The limit of a step; `planned` tensors lie on the device already and are in its plan.

    Cached blocks that nobody uses are given back first: they would count.
    """
    if budget is None or device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    ours = sum(t.untyped_storage().nbytes() for t in planned)
    return AllocatorLimit(budget, max(0, torch.cuda.memory_allocated(device) - ours))
