"""What commands that edit a run share: the run read back with its data, and the new run written."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffengine import data
from ffengine.adapt.evolving import count_of
from ffengine.adapt.pruning import parameter_bytes
from ffengine.adapt.record import Edit
from ffengine.adapt.training import reshape
from ffengine.commands.folders import folder_for
from ffengine.commands.options import assignments, found_by, load_data, saved_options
from ffengine.commands.train import make_trainer, take_from_run, training_recipe, within
from ffengine.engine.run import checkpoint
from ffengine.engine.run.evaluation import class_accuracy, samples_of
from ffengine.engine.run.history import History
from ffengine.engine.trainer import Trainer
from ffengine.nn.network import LocalNet


@dataclass(frozen=True)
class Measures:
    """Of a network: accuracies (0-1) on test data, parameters, and their bytes."""

    accuracy: float
    class_accuracy: list[float | None]
    parameters: int
    bytes: int


@dataclass
class EditedRun:
    """A run to edit: its trainer, as it stood, and its data."""

    found: checkpoint.Checkpoint
    trainer: Trainer
    splits: data.Splits
    out: Path | None
    before: Measures

    def loader(self, part: data.ImageSet) -> data.Loader:
        """Of a part of the data, in its order."""
        return data.loader(part, batch_size=self.trainer.settings.batch_size,
                           device=self.trainer.device)

    @property
    def chosen_on(self) -> data.ImageSet:
        """The validation data, or what was trained on where there are none."""
        return self.splits.valid if len(self.splits.valid) else self.splits.train

    def edit(self, edit: Edit) -> None:
        """Make an edit in the run's network, optimizer and plan."""
        reshape(self.trainer, edit)

    def finish(self, kind: str, notes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Write the new run; (text, values) of before and after. notes: what was done, kept in the
        checkpoint beside earlier edits, and part of the values."""
        trainer = self.trainer
        trainer.notes["edits"] = [*trainer.notes.get("edits", []), {"kind": kind, **notes}]
        after = measured(trainer, self.loader(self.splits.test))
        with folder_for(self.out, f"{self.found.path.parent.name}-{kind}") as out:
            history = self.found.path.parent / "history.csv"
            if history.exists():
                checkpoint.write_atomically(out / history.name, history.read_bytes())
            trainer.write_into(out)
            trainer.history = History(out, before=trainer.epoch)
            checkpoint.copy(trainer.save(), out / checkpoint.BEST)
            result = {**notes, "out": str(out)}
            for name in ("accuracy", "class_accuracy", "parameters", "bytes"):
                result[f"{name}_before"] = getattr(self.before, name)
                result[f"{name}_after"] = getattr(after, name)
            checkpoint.write_atomically(out / "report.json",
                                        json.dumps(result, indent=1).encode())
        return table(self.before, after, self.splits.classes, out), result


def open_edited(args: argparse.Namespace) -> EditedRun:
    """The run of the command line, with optimizer states and data; nothing is written.

    Raises:
        ValueError: no run, or a damaged one; --out holds a run already.
    """
    found, out = found_by(args, args.run_folder), None
    if args.out is not None:
        out = Path(args.out)
        if (out / checkpoint.LATEST).exists():
            raise ValueError(f"[cli] --out expected a folder without a run, got {out}")
    asked = argparse.Namespace(
        model=None, data=None, out=None, data_options=[], augment=None, backend=args.backend,
        memory_budget=None, seed=None, precision=None, epochs=None, batch_size=None, lr=None,
        states=None, weights=None, device=args.device, costs="modelled", quiet=True)
    take_from_run(asked, found)
    options, notes = saved_options(found), found.meta["notes"]
    data_options = assignments(asked.data_options, "--data-set")
    splits = load_data(asked.model, asked.data, options, data_options, asked.seed,
                       args.data_root, notes.get("classes"))
    trainer = make_trainer(asked, within(training_recipe(asked), len(splits.train)), options,
                           data_options, asked.seed, structure=found.meta.get("structure"))
    trainer.resume(found.path)
    trainer.notes = dict(notes)
    before = measured(trainer, data.loader(splits.test, batch_size=asked.batch_size,
                                           device=trainer.device))
    return EditedRun(found, trainer, splits, out, before)


def measured(trainer: Trainer, test: data.Loader) -> Measures:
    correct, by_class = class_accuracy(trainer.net, samples_of(trainer, test), trainer.backend)
    return Measures(correct, by_class, *size_of(trainer.net))


def size_of(net: LocalNet) -> tuple[int, int]:
    """(parameters, their bytes)."""
    return count_of(net), parameter_bytes(net)


def table(before: Measures, after: Measures, classes: tuple[str, ...] | None, out: Path) -> str:
    """Before and after, overall and per class, for people."""
    rows = [f"{'':16s} {'before':>12s} {'after':>12s}",
            f"{'test accuracy':16s} {percent(before.accuracy)} {percent(after.accuracy)}"]
    for k, (b, a) in enumerate(zip(before.class_accuracy, after.class_accuracy, strict=True)):
        name = classes[k] if classes else str(k)
        rows.append(f"{'  class ' + name:16s} {percent(b)} {percent(a)}")
    rows += [f"{'parameters':16s} {before.parameters:12,d} {after.parameters:12,d}",
             f"{'bytes':16s} {before.bytes:12,d} {after.bytes:12,d}", f"run in {out}"]
    return "\n".join(rows)


def percent(value: float | None) -> str:
    return f"{'no samples':>12s}" if value is None else f"{100 * value:10.2f} %"
