"""Trainer's keywords of the version before, which work in this one, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

from ffengine.engine.memory.plans import Memory
from ffengine.engine.run.recipe import Recipe
from ffengine.nn.network import LocalNet

Init = TypeVar("Init", bound=Callable[..., None])
#: Where each is now.
IN_RECIPE = ("optimizer", "lr_min", "weight_decay")
IN_MEMORY = tuple(f.name for f in fields(Memory))
AFTERWARDS = ("sip", "notes")


def with_old_keywords(init: Init) -> Init:
    """Decorator of Trainer's `__init__`: takes them too."""
    @functools.wraps(init)
    def call(trainer: Any, *net: LocalNet, **given: Any) -> None:
        old = {name: given.pop(name) for name in (*IN_RECIPE, *IN_MEMORY, *AFTERWARDS)
               if name in given}
        if not old:
            return init(trainer, *net, **given)
        warnings.warn(f"[trainer] {', '.join(old)} will go: expected recipe=Recipe(optimizer, "
                      "lr_min, weight_decay), memory=Memory(states, weights, costs, micro_batch, "
                      "plan), trainer.sip and trainer.notes", FutureWarning, stacklevel=2)
        recipe = recipe_of(net[0] if net else given.get("net"), given, old)
        init(trainer, *net, **{**given, "recipe": recipe,
                              "memory": replace(given.get("memory") or Memory(), **{
                                  name: old[name] for name in IN_MEMORY if name in old})})
        trainer.sip = trainer.sip and old.get("sip", True)
        trainer.notes = old.get("notes") or trainer.notes
        return None

    return cast(Init, call)


def recipe_of(net: LocalNet | None, given: dict[str, Any], old: dict[str, Any]) -> Recipe:
    """The recipe with what the old keywords change; an lr_min that is given is no ratio to lr."""
    recipe = given.get("recipe") or getattr(net, "recipe", None) or Recipe()
    changed = {name: old[name] for name in IN_RECIPE if old.get(name) is not None}
    if "lr_min" in changed and given.get("lr") is not None:
        changed["lr"] = given["lr"]
    return replace(recipe, **changed)
