"""What travels with a kernel call and is no argument of it: who hears of the memory it holds, and
what tensors allocated around it are.

Both live in the context (contextvars), so a meter hears its own thread's calls only. Whether a call
computes is told by its tensors: on those without memory, in a dry run (engine/memory/dry_run.py) or
under a compiler, a kernel says what it would hold and returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

#: Told how many bytes a kernel call holds beside its tensors, packing buffers inside C++ say; where
#: nobody listens, nobody counts them.
listeners: ContextVar[tuple[Callable[[int], None], ...]] = ContextVar("listeners", default=())
#: What tensors allocated now are, in the meter's words.
kind: ContextVar[str] = ContextVar("kind", default="feature")
#: Types of tensors with memory.
REAL = (torch.Tensor, torch.nn.Parameter)


def is_fake(t: torch.Tensor) -> bool:
    """t has a shape, a dtype and a device, but no memory."""
    return type(t) not in REAL and (hasattr(t, "dry") or hasattr(t, "fake_mode"))


def tensors_in(*values: Any) -> Iterator[torch.Tensor]:
    """Every tensor among arguments of an op, in order, those of lists and tuples too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


def declare(nbytes: int) -> None:
    """A kernel call that is about to run holds `nbytes` beside its arguments, then frees them."""
    for listen in listeners.get():
        listen(nbytes)


class listening:
    """`with listening(callback): ...` lets `callback` hear what is declared inside, or what another
    variable's listeners are told."""

    def __init__(self, callback: Callable[..., None],
                 among: ContextVar[tuple[Any, ...]] = listeners) -> None:
        self.callback, self.among = callback, among

    def __enter__(self) -> None:
        self._token = self.among.set((*self.among.get(), self.callback))

    def __exit__(self, *exc: object) -> None:
        self.among.reset(self._token)


class allocating:
    """`with allocating("gradient"): torch.zeros(...)` tells the meter what the tensor is."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __enter__(self) -> None:
        self._token = kind.set(self.word)

    def __exit__(self, *exc: object) -> None:
        kind.reset(self._token)
