"""A run's training, to be done again with some things changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ffengine import data, models
from ffengine.commands.analyses.opened import Opened
from ffengine.commands.options import assignments, load_data, saved_data_options, saved_options
from ffengine.commands.train import within
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.run.settings import Settings
from ffengine.engine.trainer import Trainer


@dataclass(frozen=True)
class Again:
    """What a training needs but its machine; plain values, so it travels between processes."""

    model: str
    options: dict[str, Any]
    data: str
    data_options: dict[str, Any]
    classes: tuple[str, ...] | None
    recipe: Recipe
    lr: float
    seed: int
    precision: str

    @property
    def epochs(self) -> int:
        return self.recipe.epochs

    @classmethod
    def of(cls, run: Opened, *, epochs: int | None = None,
           options: Mapping[str, Any] | None = None,
           data_options: Mapping[str, Any] | None = None) -> Again:
        """As the run was trained, or for other epochs and with other options."""
        saved, notes = run.settings, run.run.notes
        if notes.get("edits"):
            raise ValueError(f"[analyze] expected a run as it was trained, got one whose network "
                             f"was edited, in {run.name}")
        names = {f.name for f in fields(Recipe)} & set(saved)
        kept = {k: saved[k] for k in names}
        if saved["lr_epochs"] == saved["epochs"]:  # the rate falls over all of them
            kept["lr_epochs"] = None
        kept["lr_drops"] = tuple((int(e), float(f)) for e, f in saved["lr_drops"])
        recipe = Recipe(**{**kept, "betas": tuple(saved["betas"])})
        found = notes.get("classes") if data.own.is_own(notes["data"]) else None
        return cls(run.model, {**saved_options(run.run.found), **(options or {})}, notes["data"],
                   {**assignments(saved_data_options(notes), "--data-set"), **(data_options or {})},
                   None if found is None else tuple(found),
                   replace(recipe, epochs=epochs or recipe.epochs), recipe.lr, saved["seed"],
                   saved["precision"])

    def values(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Again:
        return cls(**{**values, "recipe": Recipe(**values["recipe"])})

    def changed(self, cell: Mapping[str, Any]) -> Again:
        """With a cell's lr, epochs, seed, batch size and options of the model."""
        recipe = replace(self.recipe, epochs=int(cell.get("epochs", self.recipe.epochs)),
                         batch_size=int(cell.get("batch_size", self.recipe.batch_size)))
        options = {k: v for k, v in cell.items() if k not in (
            "lr", "epochs", "seed", "batch_size")}
        return replace(self, recipe=recipe, lr=float(cell.get("lr", self.lr)),
                       seed=int(cell.get("seed", self.seed)),
                       options={**self.options, **options})

    def check(self) -> None:
        """ValueError for a network that cannot be, or settings no trainer takes, before any
        training."""
        with torch.device("meta"):
            models.create(self.model, **self.options)
        Settings.resolve(self.recipe, lr=self.lr, seed=self.seed, precision=self.precision)


def trainer_of(again: Again, place: Mapping[str, Any]) -> tuple[Trainer, Any, Any]:
    """(trainer, training batches, test batches) on a machine: root of the data, device, back-end.
    """
    splits = load_data(again.model, again.data, again.options, again.data_options, again.seed,
                       place["root"], again.classes)
    torch.manual_seed(again.seed)
    net = models.create(again.model, **again.options)
    recipe = within(again.recipe, len(splits.train))
    trainer = Trainer(net, recipe=recipe, lr=again.lr, batch_size=recipe.batch_size,
                      seed=again.seed, precision=again.precision, backend=place["backend"],
                      device=place["device"], progress=False)
    size = trainer.settings.batch_size
    train = data.loader(splits.train, batch_size=size, shuffle=size < len(splits.train),
                        seed=again.seed, device=trainer.device)
    return trainer, train, data.loader(splits.test, batch_size=size, device=trainer.device)
