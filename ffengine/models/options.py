"""Constructor arguments of the models: of the types that their builders declare, and widths that
fall into a group of neurons for each class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ffengine import typed

#: Options that are numbers of channels or units, a group of which belongs to each class.
WIDTHS = ("layers", "widths", "planes", "channels")
#: Options of which there must be one at least.
COUNTS = (*WIDTHS, "num_classes", "in_channels", "image_size", "counts", "width", "depth", "scale",
          "num_blocks", "frames", "kernel", "block", "class_groups")


def check(name: str, builders: Sequence[Callable[..., Any]], usual: Mapping[str, Any],
          options: Mapping[str, Any]) -> None:
    """TypeError or ValueError for an option that is not what its builder declares.

    Args:
        name: of the model.
        builders: whose arguments the options are.
        usual: the options' defaults.
    """
    hints: dict[str, Any] = {}
    for build in reversed(builders):
        hints |= typed.hints(build.func if isinstance(build, functools.partial) else build)
    for option, value in options.items():
        typed.check("models", f"{name}: {option}", value, hints.get(option, Any))
        if option not in COUNTS:
            continue
        values = value if isinstance(value, (tuple, list)) else (value,)
        others = any(options.get(w, usual.get(w)) for w in WIDTHS if w != option)
        none = not values and usual[option] != () and not others
        if none or any(v is not None and v < 1 for v in values):
            raise ValueError(f"[models] {name}: {option} expected 1 or more, got {value!r}")


def divisible(usual: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Widths that fall into as many groups as there are classes (and super-classes), where those
    of the model do not: rounded up in proportion, or each where they have none.

    Args:
        usual: the options' defaults.
    """
    supers = options.get("superclasses", usual.get("superclasses"))
    groups = math.lcm(options.get("num_classes", usual["num_classes"]),
                      max(supers) + 1 if isinstance(supers, tuple) else 1)
    found: dict[str, Any] = {}
    for name in WIDTHS:
        widths = options.get(name, usual.get(name))
        if not widths:
            continue
        unit = math.gcd(*widths)
        rounded = tuple(w // unit * up(unit, groups) if unit > 1 else up(w, groups) for w in widths)
        if rounded != tuple(widths):
            found[name] = rounded
    return found


def up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
