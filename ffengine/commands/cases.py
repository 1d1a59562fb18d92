"""A recipe as it will run on this machine, and which recipes one training serves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ffengine import models
from ffengine.commands.options import assignments, model_options, shaped_like
from ffengine.commands.train import job_of, sized
from ffengine.data import files, own
from ffengine.data.catalog import SOURCES
from ffengine.engine.run.recipe import Recipe
from ffengine.models import recipe_files
from ffengine.models.recipe_files import RecipeFile


@dataclass(frozen=True)
class Case:
    """A recipe as it will run here: on its own data, or on what stands in for it."""

    file: RecipeFile
    data: str
    options: dict[str, Any]
    data_options: dict[str, Any]
    recipe: Recipe
    #: Whether the paper's data was looked for and is not here.
    missing: bool
    #: What results on the data are called.
    label: str

    @property
    def own(self) -> bool:
        """Whether the paper's number is of the same data."""
        return self.data == self.file.data

    @property
    def by_layer(self) -> bool:
        return self.file.paper_result.metric == recipe_files.BEST_LAYER

    @property
    def plain(self) -> bool:
        """Whether the model's recipe for digits rules, not the paper's."""
        return stands_in(self.data, self.file)

    @property
    def where(self) -> str:
        """The data, and why it is another than the paper's."""
        if self.own:
            return self.data
        return f"{self.data} ({self.file.data} not here)" if self.missing else (
            f"{self.label} (paper: {self.file.data})")

    @property
    def epochs(self) -> int:
        """Epochs it trains, of a layer where layers train in turn."""
        return self.recipe.epochs

    @property
    def drop_last(self) -> bool:
        return not self.plain and self.file.train.drop_last

    @property
    def augment(self) -> str:
        return "none" if self.plain else self.file.train.augment

    @property
    def start(self) -> str:
        """Equal for recipes that train the same network in the same way, but for how long and
        how the learning rate changes."""
        same = replace(self.recipe, epochs=1, lr_min=None, lr_epochs=None, lr_drops=())
        return repr((self.file.model, self.data, sorted(self.options.items()),
                     sorted(self.data_options.items()), same, self.file.train.sip, self.augment,
                     self.drop_last))

    @property
    def key(self) -> str:
        """Equal for recipes that train the same network in the same way."""
        return repr((self.start, self.recipe))


def stands_in(name: str, file: RecipeFile) -> bool:
    """Whether `name` is the bundled digits in the place of the recipe's data."""
    return name == "digits" and name != file.data


def case_of(args: argparse.Namespace, file: RecipeFile) -> Case:
    """Which data it runs on, and with what numbers."""
    entry = models.entry(file.model)
    missing = args.data is None and not at_hand(file.data, args.data_root)
    name = args.data or ("digits" if missing else file.data)
    options, data_options = dict(file.options), dict(file.data_options)
    if stands_in(name, file):
        recipe = file.digits.recipe(entry.recipe_for(name))
        # the paper's image size is of its data, and the model may want other options on digits
        options = {k: v for k, v in options.items() if k != "image_size" and (
            k not in entry.options_for(name))} | dict(file.digits.options)
    else:
        recipe = file.train.recipe(entry.recipe)
    options |= model_options(file.model, args.options)
    wanted = assignments(args.data_options, "--data-set")
    recipe = replace(sized(recipe, args), epochs=recipe.epochs if args.epochs is None else (
        args.epochs))
    return Case(file, name, options, wanted if name != file.data else data_options | wanted,
                recipe, missing, own.label(name, args.data_root))


def at_hand(name: str, root: str | None) -> bool:
    """Whether the data set can be read without the network."""
    return name not in SOURCES or files.find(SOURCES[name], files.data_root(root)) is not None


def passes(args: argparse.Namespace, long: Case, short: Case) -> bool:
    """Whether training `long` is, after the epochs of `short`, what training `short` ends with."""
    if long.start != short.start or short.epochs > long.epochs:
        return False
    if long.recipe == short.recipe:
        return True
    a, b = (job_of(argparse.Namespace(**{**vars(args), "model": case.file.model}), case.recipe,
                   shaped_like(case.file.model, case.options)) for case in (long, short))
    if (a.schedule.total, b.schedule.total) != (long.epochs, short.epochs):
        return False  # epochs are a layer's
    return all(a.settings.rate_factor(e) == b.settings.rate_factor(e) and all(
        a.schedule.turn(e, i) == b.schedule.turn(e, i) for i in (0, 1))
        for e in range(short.epochs))


def with_shorter(args: argparse.Namespace, case: Case) -> list[Case]:
    """The case, after the bundled ones with fewer epochs that its training passes through."""
    if case.plain or case.file.name not in recipe_files.names():
        return [case]
    others = [case_of(args, file) for file in recipe_files.of_paper(case.file.paper)
              if file.model == case.file.model and file.data == case.file.data]
    found = [other for other in others
             if other.epochs < case.epochs and passes(args, case, other)]
    return [*sorted(found, key=lambda other: other.epochs), case]


def hosts(args: argparse.Namespace, cases: Sequence[Case],
          seeds: Sequence[int] | None) -> dict[str, Case]:
    """By recipe, the longest of the cases whose training it is read off.

    seeds: of all cases; None: a recipe's own, all of which that training must have.
    """
    def serves(other: Case, case: Case) -> bool:
        own = set(case.file.train.seeds) <= set(other.file.train.seeds)
        return (seeds is not None or own) and passes(args, other, case)

    return {case.file.name: max((other for other in cases if serves(other, case)),
                                key=lambda other: other.epochs) for case in cases}
