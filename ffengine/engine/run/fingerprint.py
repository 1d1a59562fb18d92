"""What a function computes, told from its code: two lambdas have one name.

Code is compared within one minor version of Python alone, whose compiler wrote it.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import platform
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from ffengine.nn.network import LocalNet
from ffengine.ops.config import Loss

PYTHON = "python"


def functions(net: LocalNet, scheduler: Callable[..., Any] | None) -> dict[str, str]:
    """Fingerprints of a run's own losses and scheduler, by where they stand, for a checkpoint."""
    found = {f"loss of layer {i}": net.layer(i).config.loss for i in range(len(net.layers))}
    own = {where: of(loss) for where, loss in found.items() if not isinstance(loss, Loss)}
    if scheduler is not None:
        own["scheduler"] = of(scheduler)
    return {PYTHON: ".".join(platform.python_version_tuple()[:2]), **own}


def check(mine: dict[str, str], saved: dict[str, str], path: Any) -> None:
    """ValueError for the first function that is another one, or that only one of the runs has."""
    same_code = mine[PYTHON] == saved.get(PYTHON)
    for where in sorted((mine.keys() | saved.keys()) - {PYTHON}):
        ours, theirs = mine.get(where), saved.get(where)
        if ours is None or theirs is None or (same_code and ours != theirs):
            raise ValueError(f"[checkpoint] expected the {where} to be {ours or 'no function'}, "
                             f"got {theirs or 'no function'} in {path}")


def of(function: Callable[..., Any]) -> str:
    """Name and digest of a callable: code, defaults, and the plain values that it holds."""
    digest = hashlib.sha256("\n".join(_parts(function)).encode()).hexdigest()
    return f"{getattr(function, '__qualname__', type(function).__name__)} {digest[:16]}"


def _parts(value: Any, depth: int = 0) -> Iterator[str]:
    """What tells `value` from others; of what may change while it runs, the type alone."""
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        yield repr(value)
    elif isinstance(value, (tuple, frozenset)):
        rows = [" ".join(_parts(item, depth)) for item in value]
        yield from sorted(rows) if isinstance(value, frozenset) else rows
    elif isinstance(value, CodeType):
        yield value.co_code.hex()
        for part in (value.co_consts, value.co_names, value.co_varnames):
            yield from _parts(part, depth)
    elif depth > 8:
        yield type(value).__qualname__
    elif isinstance(value, FunctionType):
        yield from _parts(value.__code__, depth + 1)
        yield from _parts(value.__defaults__, depth + 1)
        yield from _parts(tuple(sorted((value.__kwdefaults__ or {}).items())), depth + 1)
        for cell in _constant_cells(value):
            yield from _parts(cell, depth + 1)
    elif isinstance(value, MethodType):
        yield from _parts(value.__func__, depth + 1)
        yield from _parts(value.__self__, depth + 1)
    elif isinstance(value, functools.partial):
        yield from _parts(value.func, depth + 1)
        yield from _parts((*value.args, *sorted(value.keywords.items())), depth + 1)
    elif isinstance(value, type) or not hasattr(value, "__dict__"):
        yield getattr(value, "__qualname__", type(value).__qualname__)
    else:  # an object that is called
        yield type(value).__qualname__
        called = "forward" if isinstance(value, nn.Module) else "__call__"
        yield from _parts(getattr(type(value), called, None), depth + 1)
        for name, item in sorted(vars(value).items()):
            if isinstance(item, (float, str)):  # whole numbers may count its calls
                yield f"{name} {item!r}"


def _constant_cells(function: FunctionType) -> Iterator[Any]:
    """What a function holds of the one around it, but for the names that it binds anew."""
    bound = {line.argval for line in dis.get_instructions(function.__code__)
             if line.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name not in bound:
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
