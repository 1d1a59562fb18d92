"""Where kernels declare memory that no tensor shows: packing buffers inside C++ calls.

The memory meter listens while it is on; otherwise a declaration costs one `if`. In a rehearsal
(ffengine.engine.rehearsal) the declaration is all that a kernel call does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_listeners: list[Callable[[int], None]] = []


def declare(nbytes: int) -> None:
    """A kernel call that is about to run holds `nbytes` beside its arguments, then frees them."""
    for listen in _listeners:
        listen(nbytes)


def active() -> bool:
    return bool(_listeners)


#: Of every rehearsal that is on, where its constants are kept (ffengine.ops.host), or None.
_rehearsals: list[Any] = []


class rehearsal:
    """Inside, tensors are fake: kernel calls declare what they hold and return.

    constants: keeps what a step makes once a device; None: it is made anew at every use, so that
        no fake tensor outlives the rehearsal.
    """

    def __init__(self, constants: dict[Any, Any] | None = None) -> None:
        self.constants = constants

    def __enter__(self) -> None:
        _rehearsals.append(self.constants)

    def __exit__(self, *exc: object) -> None:
        _rehearsals.pop()


def rehearsing() -> bool:
    return bool(_rehearsals)


def constants() -> dict[Any, Any] | None:
    """Of the rehearsal that is on."""
    return _rehearsals[-1] if _rehearsals else None


def listen(callback: Callable[[int], None]) -> None:
    _listeners.append(callback)


def unlisten(callback: Callable[[int], None]) -> None:
    _listeners.remove(callback)


#: What tensors allocated right now are, in the meter's words.
_kind = "feature"


class allocating:
    """`with allocating("gradient"): torch.zeros(...)` tells the meter what the tensor is."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        global _kind
        self._before, _kind = _kind, self.kind

    def __exit__(self, *exc: object) -> None:
        global _kind
        _kind = self._before


def kind() -> str:
    return _kind
