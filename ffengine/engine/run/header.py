"""What a checkpoint's JSON must hold: checked whole when a file is read, so that nothing is found
to be missing after a weight has moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

#: Numbers of steps, samples and units stay below it: the kernels count in 32 bits.
MOST = 2**31
#: Raises _Misfit unless the value, which stands at `where`, has the form.
Form = Callable[[Any, str], None]


class _Misfit(ValueError):
    """A value of another form, and where it stands."""


def check(meta: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> None:
    """ValueError, in one line, unless a checkpoint's values are those of a run."""
    try:
        HEADER(meta, "")
        _check_structure(meta.get("structure"), tensors)
    except _Misfit as error:
        raise ValueError(f"[checkpoint] {error} in {path}") from None


def _misfit(where: str, expected: str, got: Any) -> _Misfit:
    said = repr(got)
    return _Misfit(f"{where.lstrip('.') or 'the header'} expected {expected}, got "
                   f"{said if len(said) < 80 else said[:77] + '...'}")


def _kind(expected: str, fits: Callable[[Any], bool]) -> Form:
    def form(value: Any, where: str) -> None:
        if not fits(value):
            raise _misfit(where, expected, value)

    return form


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


anything: Form = _kind("a value", lambda value: True)
text: Form = _kind("text", lambda value: isinstance(value, str))
flag: Form = _kind("true or false", lambda value: isinstance(value, bool))
number: Form = _kind("a finite number", _is_number)
count: Form = _kind(f"a whole number in 0..{MOST - 1}", _is_count)
positive: Form = _kind(f"a whole number in 1..{MOST - 1}", lambda value: (
    _is_count(value) and value > 0))
amount: Form = _kind("a whole number of 0 or more", lambda value: (
    isinstance(value, int) and not isinstance(value, bool) and value >= 0))


def optional(form: Form) -> Form:
    def either(value: Any, where: str) -> None:
        if value is not None:
            form(value, where)

    return either


def listed(form: Form) -> Form:
    def every(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise _misfit(where, "a list", value)
        for i, item in enumerate(value):
            form(item, f"{where}[{i}]")

    return every


def mapping(form: Form) -> Form:
    def every(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _misfit(where, "names and values", value)
        for name, item in value.items():
            form(item, f"{where}.{name}")

    return every


def record(known: dict[str, Form], later: dict[str, Form] | None = None,
           empty: bool = False) -> Form:
    """All of `known`, and what of `later` is there; `empty`: or nothing at all."""
    def fits(value: Any, where: str) -> None:
        mapping(anything)(value, where)
        if empty and not value:
            return
        for name, form in known.items():
            if name not in value:
                raise _misfit(f"{where}.{name}", "a value", None)
            form(value[name], f"{where}.{name}")
        for name, form in (later or {}).items():
            if name in value:
                form(value[name], f"{where}.{name}")

    return fits


def phase(value: Any, where: str) -> None:
    """[first epoch, cuts, tiles, one by one] of a plan."""
    parts = (count, listed(count), listed(positive), listed(flag))
    if not isinstance(value, list) or len(value) != len(parts):
        raise _misfit(where, "an epoch, cuts, tiles and flags", value)
    for i, (form, part) in enumerate(zip(parts, value, strict=True)):
        form(part, f"{where}[{i}]")


def phases(value: Any, where: str) -> None:
    """Phases by their first epochs, from 0 on."""
    listed(phase)(value, where)
    starts = [p[0] for p in value]
    if starts[:1] != [0] or any(a >= b for a, b in pairwise(starts)):
        raise _misfit(where, "phases whose epochs rise from 0", starts)


HEADER = record({
    "model": optional(record({"name": text, "options": mapping(anything)})),
    "architecture": mapping(anything),
    "settings": record({"optimizer": text, "precision": text, "lr": number, "epochs": positive,
                        "batch_size": positive, "seed": amount},
                       {"states": text, "weights": text}),
    "backend": text, "memory_budget": optional(amount), "notes": mapping(anything),
    "plan": optional(record({"samples": positive, "costs": text, "seconds": optional(number),
                             "gave_up": listed(text), "phases": phases})),
    "optimizer": record({"kind": text, "steps": mapping(count), "lr": listed(number)},
                        {"state_precision": text}),
    "best_accuracy": optional(number),
    "position": record({
        "epoch": count, "iteration": count, "steps": count, "ended": flag,
        "sums": record({"samples": count, "losses": listed(number), "hits": count},
                       {"pairs": flag}, empty=True)}),
}, {
    "versions": mapping(text), "lr": number, "layer_range": listed(count),
    "structure": record({"units": listed(positive), "groups": listed(listed(count))}),
    "micro_batch": optional(positive), "threads": positive,
    "used": record({"backend": text, "device": text}),
    "functions": mapping(text),
})


def _check_structure(structure: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> None:
    """Units and groups are those of the weights: an edit towards others would allocate them."""
    for i, (units, groups) in enumerate(zip(structure["units"], structure["groups"], strict=False)
                                        if structure else ()):
        weight = tensors.get(f"net.layers.{i}.weight")
        if weight is None or weight.shape[:1] != (units,):
            raise _misfit(f"structure.units[{i}]", "the units of the layer's weight", units)
        if groups[:1] != [0] or groups[-1] != units or any(a >= b for a, b in pairwise(groups)):
            raise _misfit(f"structure.groups[{i}]", f"offsets that rise from 0 to {units}", groups)
