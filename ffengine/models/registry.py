"""Names of the networks, their builders and the hyper-parameters their papers train with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ffengine.nn import LocalNet


@dataclass(frozen=True)
class Recipe:
    """How a model is trained where the caller does not say otherwise.

    The learning rate falls from lr to lr_min on a cosine over lr_epochs (default: all) epochs.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_min: float | None = None
    weight_decay: float = 0.0
    epochs: int = 150
    batch_size: int = 128
    lr_epochs: int | None = None


@dataclass(frozen=True)
class Entry:
    """One registered model."""

    name: str
    paper: str
    build: Callable[..., LocalNet]
    recipe: Recipe
    #: Recipes of a data set, where they differ from the paper's.
    data: dict[str, Recipe]

    def recipe_for(self, data: str) -> Recipe:
        return self.data.get(data, self.recipe)

    def options(self) -> dict[str, Any]:
        """Constructor arguments by name, with their defaults."""
        found: dict[str, Any] = {}
        for parameter in inspect.signature(self.build).parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                found[parameter.name] = parameter.default
        return found


_MODELS: dict[str, Entry] = {}


def register(name: str, *, paper: str, recipe: Recipe,
             digits: dict[str, Any] | None = None) -> Callable[[Any], Any]:
    """Enter a builder under `name`; `digits` changes its recipe on the bundled images."""
    def enter(build: Callable[..., LocalNet]) -> Callable[..., LocalNet]:
        small = replace(recipe, **{"epochs": 15, "batch_size": 64, **(digits or {})})
        _MODELS[name] = Entry(name, paper, build, recipe, {"digits": small})
        return build
    return enter


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
    build = entry(name).build
    try:
        return build(**options)
    except TypeError as error:
        raise TypeError(f"[models] {name}: {error}") from None
