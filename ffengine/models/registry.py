"""Names of the networks, their builders and the hyper-parameters their papers train with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ffengine.data.scale import SET
from ffengine.engine.run.recipe import Recipe as Recipe
from ffengine.nn import LocalNet


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
             scale: Mapping[str, Any] | None = None) -> Callable[[Any], Any]:
    """Enter a builder under `name`.

    `digits` changes its recipe, and `digits_options` its defaults, on the bundled images; `scale`
    is how its authors scale pixels, by data set ("*": all others).
    """
    def register_builder(build: Callable[..., LocalNet]) -> Callable[..., LocalNet]:
        small = replace(recipe, **{"epochs": 15, "batch_size": 64, "lr_epochs": None,
                                   **(digits or {})})
        enter(Entry(name, paper, build, recipe, {"digits": small},
                    () if shared is None else (shared,), {"digits": digits_options or {}},
                    scale or {}))
        return build
    return register_builder


def enter(found: Entry) -> None:
    """Enter a model that is described already."""
    _MODELS[found.name] = found


def entry(name: str) -> Entry:
    """The model registered as `name`; ValueError with the known names otherwise."""
    if name not in _MODELS:
        raise ValueError(f"[models] unknown model {name!r}; known: {', '.join(sorted(_MODELS))}")
    return _MODELS[name]


def names() -> list[str]:
    return sorted(_MODELS)


def create(name: str, **options: Any) -> LocalNet:
    """Build a network by name, e.g. create("deeperforward/resnet17", num_classes=10).

    Raises:
        ValueError: unknown model (the known ones are listed) or unusable options.
        TypeError: an option the builder does not have.
    """
    found = entry(name)
    known = found.options()
    for option in options:
        if option not in known:
            raise TypeError(f"[models] unknown option {option!r} of {name}; known: "
                            f"{', '.join(known)}")
    try:
        net = found.build(**options)
    except (TypeError, ValueError) as error:
        if str(error).startswith("["):
            raise
        raise type(error)(f"[models] unusable options for {name}: {error}") from None
    net.origin, net.recipe = (name, options), found.recipe
    return net
