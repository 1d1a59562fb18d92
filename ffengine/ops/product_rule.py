"""How exact the GPU libraries' products are: torch's switches, set around ours and put back after.

The switches are the process's, so all threads compute by one rule at a time: threads of one rule
share it, another rule is refused before anything is computed. What else runs meanwhile finds the
switches as ours want them. On a CPU nothing is switched.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ffengine.ops.tracing import traced


class Products(NamedTuple):
    """What the GPU libraries' products may be, ours within `exact` and everybody's else."""

    #: fp32 operands rounded to 10 bits of mantissa.
    tf32: bool = False
    #: The same sum every time; otherwise what the library finds fastest.
    deterministic: bool = True


EXACT = Products()
#: The rule that ours follow, and those of the blocks around this call that hold torch's switches.
_rule: ContextVar[Products] = ContextVar("rule", default=EXACT)
_held: ContextVar[tuple[Products, ...]] = ContextVar("held", default=())


@contextlib.contextmanager
def products(rule: Products) -> Iterator[None]:
    """Every library product of the block by one rule: benchmarks compare sides under it."""
    token = _rule.set(rule)
    try:
        with _switched(rule):
            yield
    finally:
        _rule.reset(token)


def exact(device: str) -> contextlib.AbstractContextManager[object]:
    """Around library products: full fp32 ones and the same result every time on a GPU, unless
    `products` says otherwise. Inside another one it costs nothing: a step has one around it all.

    Raises:
        RuntimeError: another thread computes by another rule.
    """
    if device != "cuda" or traced():
        return contextlib.nullcontext()
    rule = _rule.get()
    return contextlib.nullcontext() if _held.get()[-1:] == (rule,) else _switched(rule)


@contextlib.contextmanager
def _switched(rule: Products) -> Iterator[None]:
    mine = _held.get()
    _take(rule, len(mine))
    token = _held.set((*mine, rule))
    try:
        yield
    finally:
        _held.reset(token)
        _give_back()


@dataclass
class _InForce:
    """A rule that torch's switches are set to, what they were before, the blocks that hold it."""

    rule: Products
    before: list[tuple[Any, str, Any]]
    blocks: int = 1


#: Of the process, the last inside the others; several only where one context holds them all.
_in_force: list[_InForce] = []
_lock = threading.Lock()


def _take(rule: Products, mine: int) -> None:
    """Hold a rule; `mine`: blocks of this context that hold one already."""
    with _lock:
        alone = sum(each.blocks for each in _in_force) == mine
        if _in_force and _in_force[-1].rule == rule and (alone or len(_in_force) == 1):
            _in_force[-1].blocks += 1
        elif alone:
            _in_force.append(_InForce(rule, _switch(rule)))
        else:
            raise RuntimeError(
                f"[products] expected {_in_force[-1].rule}, by which another thread computes "
                f"(torch has one setting for the process), got {rule}")


def _give_back() -> None:
    with _lock:
        _in_force[-1].blocks -= 1
        if not _in_force[-1].blocks:
            _restore(_in_force.pop().before)


def _switch(rule: Products) -> list[tuple[Any, str, Any]]:
    """Set torch's switches; gives what was set before.

    The older ones, allow_tf32, may not even be read once a caller has set fp32_precision. A part
    follows the whole until somebody sets it: the whole goes first, a part only where it still
    differs, so that afterwards it follows again.
    """
    cudnn: Any = torch.backends.cudnn  # torch leaves its parts without annotations
    wanted = [(cudnn, "enabled", True), (cudnn, "benchmark", not rule.deterministic),
              (cudnn, "deterministic", rule.deterministic),
              *((owner, "fp32_precision", "tf32" if rule.tf32 else "ieee") for owner in (
                  torch.backends, cudnn, cudnn.conv, torch.backends.cuda.matmul))]
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in wanted:
            if (found := getattr(owner, name)) != value:
                before.append((owner, name, found))
                setattr(owner, name, value)
    except BaseException:
        _restore(before)
        raise
    return before


def _restore(before: list[tuple[Any, str, Any]]) -> None:
    for each in reversed(before):
        setattr(*each)
