"""The recipes of the papers: one TOML file per number of a table, read strictly.

They live in ffengine/recipes as PAPER-MODEL-DATA[-VARIANT].toml. A key that is not known is an
error, so that a misspelt hyper-parameter never trains with its default instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ffengine import data
from ffengine.data import scale
from ffengine.engine.run.recipe import Recipe
from ffengine.models import registry
from ffengine.ops.optim import OPTIM_CODES
from ffengine.tables import (
    Expected,
    Kind,
    flag,
    mapping,
    number,
    one_of,
    read,
    table,
    text,
    whole,
)

FOLDER = Path(__file__).parents[1] / "recipes"
TEST, BEST_LAYER = METRICS = ("test_accuracy", "best_layer_accuracy")


@dataclass(frozen=True)
class Training:
    """[train]: how the paper trained.

    Rates and epochs mean what they do in `Recipe`; its fields that are not here stay the model's.
    seeds: as many as the paper made runs. augment: see data.augment.by_name.
    drop_last: an epoch's last batch is left out where it is smaller than the others.
    sip: select the layer range on held-out samples, as the network's default is otherwise.
    """

    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    lr_min: float | None = None
    weight_decay: float = 0.0
    lr_drops: tuple[tuple[int, float], ...] = ()
    lr_epochs: int | None = None
    seeds: tuple[int, ...] = (0,)
    augment: str = "none"
    drop_last: bool = False
    sip: bool = True

    def recipe(self, base: Recipe) -> Recipe:
        """The model's own recipe with these numbers."""
        return replace(base, optimizer=self.optimizer, lr=self.lr, lr_min=self.lr_min,
                       weight_decay=self.weight_decay, epochs=self.epochs,
                       batch_size=self.batch_size, lr_epochs=self.lr_epochs,
                       lr_drops=self.lr_drops)

    def augmentation(self) -> data.augment.Compose | None:
        """What is done to training images in [0, 1]."""
        return data.augment.by_name(self.augment)


@dataclass(frozen=True)
class PaperResult:
    """[paper_result]: what the paper reports, in percent. sd is None where it gives none.

    best_layer_accuracy is that of the layer which does best on the test set alone.
    """

    metric: str
    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class Digits:
    """[digits]: changes to the model's own recipe on the bundled images."""

    epochs: int | None = None
    batch_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, base: Recipe) -> Recipe:
        return replace(base, epochs=self.epochs or base.epochs,
                       batch_size=self.batch_size or base.batch_size)


@dataclass(frozen=True)
class RecipeFile:
    """One number of a table and what it takes to get it.

    options are constructor arguments of the model, data_options those of `data.load`.
    """

    name: str
    paper: str
    table: str
    row: str
    model: str
    data: str
    train: Training
    paper_result: PaperResult
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    digits: Digits = Digits()


def names() -> list[str]:
    """The bundled recipes."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def papers() -> list[str]:
    """The papers that bundled recipes are from."""
    return sorted({name.partition("-")[0] for name in names()})


def of_paper(paper: str) -> list[RecipeFile]:
    """All bundled recipes of a paper; ValueError with the known papers for another."""
    if paper not in papers():
        raise ValueError(f"[recipe] unknown paper {paper!r}; known: {', '.join(papers())}")
    return [load(name) for name in names() if name.startswith(f"{paper}-")]


def load(name_or_path: str | os.PathLike[str]) -> RecipeFile:
    """A bundled recipe by name, or a file by a path that ends in .toml.

    Raises:
        ValueError: no such recipe, not TOML, an unknown or missing key, a value of the wrong
            type or range, an unknown model, data set or constructor argument; one line that
            names the file, the key, and what is known.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in names():
            raise ValueError(f"[recipe] unknown recipe {str(name_or_path)!r}; `ffengine reproduce` "
                             f"lists them; papers: {', '.join(papers())}")
        path = FOLDER / f"{name_or_path}.toml"
    return _recipe(path, read(path, "recipe"))


def _recipe(path: Path, raw: dict[str, Any]) -> RecipeFile:
    file = f"[recipe] {path.name}"
    top = table(file, "", raw, _TOP, ("name", "paper", "table", "row", "model", "data", "train",
                                      "paper_result"))
    if top["name"] != path.stem or not path.stem.startswith(f"{top['paper']}-"):
        raise ValueError(f"[recipe] {path.name}: expected name {path.stem!r}, beginning with the "
                         f"paper and a dash, got name {top['name']!r}, paper {top['paper']!r}")
    try:
        known = registry.entry(top["model"]).options()
    except ValueError as error:
        raise ValueError(f"[recipe] {path.name}: {error}") from None
    train = table(file, "train", top["train"], _TRAIN,
                  ("optimizer", "lr", "epochs", "batch_size"))
    result = table(file, "paper_result", top["paper_result"], _RESULT, ("metric", "mean"))
    digits = table(file, "digits", top.pop("digits", {}), _DIGITS)
    for where, holder in (("options", top), ("digits.options", digits)):
        if "options" in holder:
            holder["options"] = table(file, where, holder["options"], dict.fromkeys(known, _plain))
    if "data_options" in top:
        top["data_options"] = table(file, "data_options", top["data_options"], _DATA)
    return RecipeFile(**{**top, "train": Training(**train), "paper_result": PaperResult(**result),
                         "digits": Digits(**digits)})


def _plain(value: Any) -> Any:
    """A constructor argument: lists become tuples, as `--set` has them."""
    return tuple(_plain(v) for v in value) if isinstance(value, list) else value


def _seeds(value: Any) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    if not good or len(set(value)) < len(value):
        raise Expected("a list of different whole numbers")
    return tuple(value)


def _drops(value: Any) -> tuple[tuple[int, float], ...]:
    try:
        drops = tuple((whole(1)(epoch), number()(factor)) for epoch, factor in value)
    except (TypeError, ValueError, Expected):
        raise Expected("a list of [epoch, factor]") from None
    if any(a >= b for (a, _), (b, _) in pairwise(drops)):
        raise Expected("a list of [epoch, factor] with rising epochs")
    return drops


def _normalize(value: Any) -> Any:
    if value in (scale.OFF, scale.SET):
        return value
    try:
        scale.parsed(value)
    except ValueError:
        raise Expected(scale.EXPECTED) from None
    return _plain(value)


def _augment(value: Any) -> str:
    try:
        data.augment.by_name(text(value))
    except ValueError as error:
        raise Expected(f"words of data.augment.by_name ({error})") from None
    return str(value)


_TOP: dict[str, Kind] = {
    **dict.fromkeys(("name", "paper", "table", "row", "model", "note"), text),
    **dict.fromkeys(("options", "data_options", "train", "paper_result", "digits"), mapping),
    "data": one_of(data.NAMES)}
_TRAIN: dict[str, Kind] = {
    "optimizer": one_of(tuple(OPTIM_CODES)), "lr": number(), "lr_min": number(),
    "lr_drops": _drops, "lr_epochs": whole(1), "weight_decay": number(), "epochs": whole(1),
    "batch_size": whole(1), "seeds": _seeds, "augment": _augment, "drop_last": flag, "sip": flag}
_RESULT: dict[str, Kind] = {"metric": one_of(METRICS), "mean": number(100.0),
                            "sd": number(100.0)}
_DIGITS: dict[str, Kind] = {"epochs": whole(1), "batch_size": whole(1), "options": mapping}
_DATA: dict[str, Kind] = {"normalize": _normalize, "valid": whole(0),
                          "valid_split": one_of(("random", "last"))}
