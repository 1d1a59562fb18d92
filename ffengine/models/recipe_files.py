"""The recipes of the papers: one TOML file per number of a table, read strictly.

They live in ffengine/recipes as PAPER-MODEL-DATA[-VARIANT].toml. A key that is not known is an
error, so that a misspelt hyper-parameter never trains with its default instead.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ffengine import data
from ffengine.engine.recipe import Recipe
from ffengine.models import registry
from ffengine.ops.optim import OPTIM_CODES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parents[1] / "recipes"
TEST, BEST_LAYER = METRICS = ("test_accuracy", "best_layer_accuracy")


@dataclass(frozen=True)
class Training:
    """[train]: how the paper trained.

    Rates and epochs mean what they do in `Recipe`; its fields that are not here stay the model's.
    seeds: as many as the paper made runs. augment: see data.augment.by_name.
    sip: select the layer range on held-out samples, as the network's default is otherwise.
    """

    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    lr_min: float | None = None
    weight_decay: float = 0.0
    lr_drops: tuple[tuple[int, float], ...] = ()
    seeds: tuple[int, ...] = (0,)
    augment: str = "none"
    sip: bool = True

    def recipe(self, base: Recipe) -> Recipe:
        """The model's own recipe with these numbers."""
        return replace(base, optimizer=self.optimizer, lr=self.lr, lr_min=self.lr_min,
                       weight_decay=self.weight_decay, epochs=self.epochs,
                       batch_size=self.batch_size, lr_epochs=None, lr_drops=self.lr_drops)

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
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"[recipe] expected a recipe file, got {path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"[recipe] {path.name}: not TOML: {error}") from None
    return _recipe(path, raw)


def _recipe(path: Path, raw: dict[str, Any]) -> RecipeFile:
    top = _table(path, "", raw, _TOP, ("name", "paper", "table", "row", "model", "data", "train",
                                       "paper_result"))
    if top["name"] != path.stem or not path.stem.startswith(f"{top['paper']}-"):
        raise ValueError(f"[recipe] {path.name}: expected name {path.stem!r}, beginning with the "
                         f"paper and a dash, got name {top['name']!r}, paper {top['paper']!r}")
    try:
        known = registry.entry(top["model"]).options()
    except ValueError as error:
        raise ValueError(f"[recipe] {path.name}: {error}") from None
    train = _table(path, "train", top["train"], _TRAIN,
                   ("optimizer", "lr", "epochs", "batch_size"))
    result = _table(path, "paper_result", top["paper_result"], _RESULT, ("metric", "mean"))
    digits = _table(path, "digits", top.pop("digits", {}), _DIGITS)
    for where, holder in (("options", top), ("digits.options", digits)):
        if "options" in holder:
            holder["options"] = _table(path, where, holder["options"], dict.fromkeys(known, _plain))
    if "data_options" in top:
        top["data_options"] = _table(path, "data_options", top["data_options"], _DATA)
    return RecipeFile(**{**top, "train": Training(**train), "paper_result": PaperResult(**result),
                         "digits": Digits(**digits)})


Kind = Callable[[Any], Any]


class _Expected(Exception):
    """Says what a value should have been."""


def _table(path: Path, where: str, values: dict[str, Any], kinds: Mapping[str, Kind],
           required: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a table, each checked and converted by its kind."""
    place = f"[recipe] {path.name}: " + (f"[{where}] " if where else "")
    for key in values:
        if key not in kinds:
            raise ValueError(f"{place}unknown key {key!r}; known: {', '.join(kinds)}")
    for key in required:
        if key not in values:
            raise ValueError(f"{place}missing key {key!r}; required: {', '.join(required)}")
    made = {}
    for key, value in values.items():
        try:
            made[key] = kinds[key](value)
        except _Expected as expected:
            raise ValueError(f"{place}{key} expected {expected}, got {value!r}") from None
    return made


def _plain(value: Any) -> Any:
    """A constructor argument: lists become tuples, as `--set` has them."""
    return tuple(_plain(v) for v in value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Expected("a text")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Expected("a table")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Expected("true or false")
    return value


def _whole(low: int) -> Kind:
    def kind(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise _Expected(f"a whole number of at least {low}")
        return value
    return kind


def _number(high: float = math.inf) -> Kind:
    def kind(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
                math.isfinite(value) and 0 <= value <= high):
            raise _Expected("a number of 0 or more" if high == math.inf
                            else f"a number from 0 to {high:g}")
        return float(value)
    return kind


def _one_of(known: tuple[str, ...]) -> Kind:
    def kind(value: Any) -> str:
        if value not in known:
            raise _Expected(f"one of {', '.join(known)}")
        return str(value)
    return kind


def _seeds(value: Any) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    if not good or len(set(value)) < len(value):
        raise _Expected("a list of different whole numbers")
    return tuple(value)


def _drops(value: Any) -> tuple[tuple[int, float], ...]:
    try:
        drops = tuple((_whole(1)(epoch), _number()(factor)) for epoch, factor in value)
    except (TypeError, ValueError, _Expected):
        raise _Expected("a list of [epoch, factor]") from None
    if any(a >= b for (a, _), (b, _) in pairwise(drops)):
        raise _Expected("a list of [epoch, factor] with rising epochs")
    return drops


def _augment(value: Any) -> str:
    try:
        data.augment.by_name(_text(value))
    except ValueError as error:
        raise _Expected(f"words of data.augment.by_name ({error})") from None
    return str(value)


_TOP: dict[str, Kind] = {
    **dict.fromkeys(("name", "paper", "table", "row", "model", "note"), _text),
    **dict.fromkeys(("options", "data_options", "train", "paper_result", "digits"), _mapping),
    "data": _one_of(data.NAMES)}
_TRAIN: dict[str, Kind] = {
    "optimizer": _one_of(tuple(OPTIM_CODES)), "lr": _number(), "lr_min": _number(),
    "lr_drops": _drops, "weight_decay": _number(), "epochs": _whole(1), "batch_size": _whole(1),
    "seeds": _seeds, "augment": _augment, "sip": _flag}
_RESULT: dict[str, Kind] = {"metric": _one_of(METRICS), "mean": _number(100.0),
                            "sd": _number(100.0)}
_DIGITS: dict[str, Kind] = {"epochs": _whole(1), "batch_size": _whole(1), "options": _mapping}
_DATA: dict[str, Kind] = {"valid": _whole(0), "valid_split": _one_of(("random", "last"))}
