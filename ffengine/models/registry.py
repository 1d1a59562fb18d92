"""Names of the networks, their builders and the hyper-parameters their papers train with."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ffengine.data.scale import SET
from ffengine.engine.run.recipe import Recipe as Recipe
from ffengine.models.options import check, divisible
from ffengine.nn import LocalNet
from ffengine.words import meant

log = logging.getLogger("ffengine")


@dataclass(frozen=True)
class Entry:
    """One registered model."""

    name: str
    paper: str
    build: Callable[..., LocalNet]
    recipe: Recipe
    #: Recipes of a data set, where they differ from the paper's.
    data: dict[str, Recipe]
    #: Where the builder hands its **options; their defaults are its keyword-only arguments.
    shared: tuple[Callable[..., LocalNet], ...] = ()
    #: Constructor arguments that differ from the defaults on a data set.
    data_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: How its authors scale pixels (ffengine.data.scale), by data set; "*" is all others.
    scale: Mapping[str, Any] = field(default_factory=dict)
    #: Layers train by losses of their own; else the whole network by one.
    local: bool = True

    def options_for(self, data: str) -> dict[str, Any]:
        """Constructor arguments that a data set wants otherwise than the defaults."""
        return self.data_options.get(data, {})

    def scale_for(self, data: str) -> Any:
        """`normalize` of data.load, as the authors' code has it."""
        return self.scale.get(data, self.scale.get("*", SET))

    def recipe_for(self, data: str) -> Recipe:
        return self.data.get(data, self.recipe)

    def options(self) -> dict[str, Any]:
        """Constructor arguments by name, with their defaults."""
        found: dict[str, Any] = {}
        for parameter in inspect.signature(self.build).parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                found[parameter.name] = parameter.default
        for shared in self.shared:
            for parameter in inspect.signature(shared).parameters.values():
                if parameter.default is not inspect.Parameter.empty:
                    found.setdefault(parameter.name, parameter.default)
        return found


_MODELS: dict[str, Entry] = {}


def register(name: str, *, paper: str, recipe: Recipe,
             digits: dict[str, Any] | None = None, digits_options: dict[str, Any] | None = None,
             shared: Callable[..., LocalNet] | None = None,
             scale: Mapping[str, Any] | None = None,
             local: bool = True) -> Callable[[Any], Any]:
    """Enter a builder under `name`.

    `digits` changes its recipe, and `digits_options` its defaults, on the bundled images; `scale`
    is how its authors scale pixels, by data set ("*": all others); `local` is as of Entry.
    """
    def register_builder(build: Callable[..., LocalNet]) -> Callable[..., LocalNet]:
        small = replace(recipe, **{"epochs": 15, "batch_size": 64, "lr_epochs": None,
                                   **(digits or {})})
        enter(Entry(name, paper, build, recipe, {"digits": small},
                    () if shared is None else (shared,), {"digits": digits_options or {}},
                    scale or {}, local))
        return build
    return register_builder


def enter(found: Entry) -> None:
    """Enter a model that is described already."""
    _MODELS[found.name] = found


def entry(name: str) -> Entry:
    """The model registered as `name`; ValueError with the known names otherwise."""
    if name not in _MODELS:
        raise ValueError(f"[models] unknown model {name!r}{meant(name, _MODELS)}; known: "
                         f"{', '.join(sorted(_MODELS))}")
    return _MODELS[name]


def names() -> list[str]:
    return sorted(_MODELS)


def create(name: str, **options: Any) -> LocalNet:
    """Build a network by name, e.g. create("deeperforward/resnet17", num_classes=10).

    Where the paper's widths do not fall into a group for each of `num_classes`, they are rounded
    up in proportion, and a line of the log says so.

    Raises:
        ValueError: unknown model (the known ones are listed) or unusable options.
        TypeError: an option the builder does not have, or of another type than it declares.
    """
    found = entry(name)
    known = found.options()
    for option in options:
        if option not in known:
            raise TypeError(f"[models] unknown option {option!r} of {name}"
                            f"{meant(option, known)}; known: {', '.join(known)}")
    check(name, (found.build, *found.shared), known, options)
    generator = torch.get_rng_state()
    try:
        net = found.build(**options)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        options = wider(found, options, error)
        torch.set_rng_state(generator)
        net = found.build(**options)
    net.origin, net.recipe = (name, options), found.recipe
    return net


def wider(found: Entry, options: dict[str, Any], error: Exception) -> dict[str, Any]:
    """The options with widths rounded up, where it is these that the builder refused.

    Raises:
        TypeError, ValueError: it is something else, or the widths are the caller's; these are then
            named with values that would do.
    """
    rounded = divisible(found.options(), options)
    try:
        with torch.device("meta"):
            found.build(**{**options, **rounded})
    except (TypeError, ValueError, IndexError, RuntimeError):
        rounded = {}
    text = str(error) if str(error).startswith("[") else (
        f"[models] unusable options for {found.name}: {error}")
    given = [f"{name}={value}" for name, value in rounded.items() if name in options]
    if given or not rounded:
        fine = f"; {', '.join(given).replace(' ', '')} would do" if given else ""
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"{text}{fine}") from None
    say(f"[models] {found.name}: " + ", ".join(
        f"{name}={value} in place of {found.options()[name]}" for name, value in rounded.items())
        + f", which do not fall into {options.get('num_classes', 'these')} classes")
    return {**options, **rounded}


@functools.cache
def say(text: str) -> None:
    """One line of the log, once."""
    log.warning("%s", text)
