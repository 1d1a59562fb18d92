"""What several commands need: `--set`, data, a network that fits it, a run read back."""

from __future__ import annotations

import argparse
import ast
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ffengine import data, models
from ffengine.adapt.edits import restructure
from ffengine.data import own, superclasses
from ffengine.data.catalog import COARSE_CLASSES, SOURCES
from ffengine.data.scale import SET
from ffengine.engine.run import checkpoint
from ffengine.models.cwcomp import ILT
from ffengine.nn import LocalNet
from ffengine.ops import backends
from ffengine.typed import at_least
from ffengine.words import meant

#: Sides the bundled 8x8 digits are enlarged to, in turn, until a network's pools fit.
DIGITS_SIDES = (8, 16, 32)


def assignments(words: Sequence[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE words; a value is a Python literal, or else a string."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"[cli] {flag} expected KEY=VALUE, got {word!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def words(options: dict[str, Any]) -> list[str]:
    """KEY=VALUE words that `assignments` reads back."""
    return [f"{key}={value}" for key, value in options.items()]


def model_options(name: str, words: Sequence[str]) -> dict[str, Any]:
    """`--set` for this model; ValueError with its options for one it does not have."""
    known, found = models.entry(name).options(), assignments(words, "--set")
    for key in found:
        if key not in known:
            raise ValueError(f"[cli] --set {key}: unknown option of {name}{meant(key, known)}; "
                             f"known: {', '.join(known)}")
    return found


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for, or the GPU where there is one."""
    if args.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ValueError(f"[cli] --device expected cpu or cuda, got {args.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"[cli] --device expected cpu or cuda, got {args.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        why = backends.no_gpu_reason(torch.version.cuda, backends.driver_version())
        raise ValueError(f"[cli] --device cuda cannot run here: {why}; usable: cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"[cli] --device expected at most cuda:{torch.cuda.device_count() - 1}, "
                         f"got {args.device!r}")
    return device


def image_side(model: str, dataset: str, options: dict[str, Any],
               root: str | None = None) -> int | None:
    """Side to resize to: what --set says; digits as small as fits; image files as the paper has it.
    """
    if "image_size" in options:
        at_least("cli", "--set image_size", options["image_size"], 1)
        return int(options["image_size"])
    if dataset == "digits":
        options = {**models.entry(model).options_for(dataset), **options}
        for side in DIGITS_SIDES[:-1]:
            with contextlib.suppress(ValueError), torch.device("meta"):
                models.create(model, **shaped_like(model, {
                    **options, "num_classes": 10, "in_channels": 1, "image_size": side}))
                return side
        return DIGITS_SIDES[-1]
    if dataset in SOURCES or (own.is_own(dataset) and own.holds_images(dataset, root)):
        usual = models.entry(model).options().get("image_size")
        return usual if isinstance(usual, int) else None
    return None


def load_data(model: str, dataset: str, options: dict[str, Any], data_options: dict[str, Any],
              seed: int, root: str | None, classes: Sequence[str] | None = None) -> data.Splits:
    """The data set, at the size the network takes, scaled as its authors scale it.

    classes: of a run, where one's own data is to be labelled as it was then.
    """
    side = image_side(model, dataset, options, root)
    wanted = scaled(model, dataset, data_options)
    if dataset.startswith("folder:") and "in_channels" in options:
        wanted = {"channels": options["in_channels"], **wanted}
    splits = data.load(dataset, root=root, image_size=side, seed=seed, classes=classes, **wanted)
    if splits.shape[1] != splits.shape[2]:
        raise ValueError(f"[cli] --data expected square images, got {splits.shape[1]}x"
                         f"{splits.shape[2]}; --set image_size=SIDE resizes them")
    return splits


def scaled(model: str, dataset: str, data_options: dict[str, Any]) -> dict[str, Any]:
    """The data set's options; how pixels are scaled is the model's where they do not say."""
    return {"normalize": models.entry(model).scale_for(dataset), **data_options}


@dataclass(frozen=True)
class Outline:
    """What is known of a data set before it is loaded; `train` samples are trained on."""

    name: str
    num_classes: int
    shape: tuple[int, ...]
    train: int


def outline(model: str, dataset: str, options: dict[str, Any],
            data_options: dict[str, Any]) -> Outline | None:
    """A data set's outline, at the size the network takes; None where only its files tell."""
    if own.is_own(dataset):
        return None
    side = image_side(model, dataset, options)
    if dataset == "synthetic":
        shape, classes, train = (data_options.get(name, usual) for name, usual in (
            ("shape", (3, 32, 32)), ("num_classes", 10), ("train", 512)))
        if not isinstance(shape, tuple) or len(shape) != 3 or not all(
                isinstance(v, int) and v > 0 for v in (*shape, classes, train)):
            return None  # the loader says what is wrong
        return Outline(dataset, classes, shape if side is None else (shape[0], side, side), train)
    if dataset == "digits":
        return Outline(dataset, 10, (1, side or 8, side or 8), 1257)
    source = SOURCES.get(dataset)
    if source is None or side is None:
        return None
    held_out = data_options.get("valid", source.valid)
    if not isinstance(held_out, int) or not 0 <= held_out < source.train:
        return None  # the loader says what is wrong
    classes = COARSE_CLASSES if data_options.get("coarse") else source.num_classes
    return Outline(dataset, classes, (len(source.mean), side, side), source.train - held_out)


def fitted_options(model: str, splits: data.Splits | Outline,
                   options: dict[str, Any]) -> dict[str, Any]:
    """The model's options, with classes, channels and size read off the data.

    Super-classes that are to be clusters of the data stay a word until there are data.
    """
    known = models.entry(model).options()
    shape: dict[str, Any] = {"num_classes": splits.num_classes, "in_channels": splits.shape[0],
             "image_size": splits.shape[1]}
    if splits.name in {name for name, _ in ILT}:  # whose interleaved spans a model may want
        shape["dataset"] = splits.name
    found = {**models.entry(model).options_for(splits.name), **{
        k: v for k, v in shape.items() if k in known}, **options}
    clusters = cluster_count(found)
    if clusters is not None and isinstance(splits, data.Splits):
        found["superclasses"] = superclasses.cluster(
            splits.train.images, splits.train.labels, clusters).map
    return found


def cluster_count(options: dict[str, Any]) -> int | None:
    """S of `superclasses=cluster:S`: clusters of the training set's class means."""
    word = options.get("superclasses")
    if not isinstance(word, str) or not word.startswith("cluster"):
        return None
    count = word.partition(":")[2]
    if not count.isdigit() or int(count) < 1:
        raise ValueError(f"[cli] --set superclasses expected cluster:S, a name or the super-class "
                         f"of every class, got {word!r}")
    return int(count)


def shaped_like(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options that give the network's shapes without data: any map with as many super-classes."""
    clusters = cluster_count(options)
    if clusters is None:
        return options
    classes: int = options.get("num_classes", models.entry(model).options()["num_classes"])
    if clusters > classes:
        raise ValueError(f"[cli] --set superclasses expected at most one for each of the {classes} "
                         f"classes, got {clusters}")
    return {**options, "superclasses": tuple(c % clusters for c in range(classes))}


@dataclass
class Run:
    """A run read back from its folder."""

    found: checkpoint.Checkpoint
    net: LocalNet

    @property
    def notes(self) -> dict[str, Any]:
        notes: dict[str, Any] = self.found.meta["notes"]
        return notes


def open_run(args: argparse.Namespace) -> Run:
    """The network of a run folder, weights loaded."""
    found = found_by(args, args.run_folder)
    net = build_saved(found)
    checkpoint.load_network(found, net)
    return Run(found, net)


def found_by(args: argparse.Namespace, run: str) -> checkpoint.Checkpoint:
    """The checkpoint of a run that --checkpoint asks for."""
    return checkpoint.load_run(
        run, checkpoint.BEST if args.checkpoint == "best" else checkpoint.LATEST)


def build_saved(found: checkpoint.Checkpoint) -> LocalNet:
    """A new network as the checkpoint describes it."""
    model = found.meta["model"]
    if model is None:
        raise ValueError(f"[checkpoint] expected a run of a named model, got one of a network "
                         f"built by hand in {found.path}")
    net = models.create(model["name"], **saved_options(found))
    restructure(net, found.meta.get("structure"))
    fp64 = found.meta["settings"]["precision"] == "fp64"
    return net.to(torch.float64) if fp64 else net


def saved_data_options(notes: dict[str, Any]) -> list[str]:
    """`--data-set` words of a run; runs that do not say how pixels were scaled took the set's."""
    words: list[str] = notes["data_options"]
    named = any(word.startswith("normalize=") for word in words)
    return words if named else [*words, f"normalize={SET}"]


def saved_options(found: checkpoint.Checkpoint) -> dict[str, Any]:
    """Constructor arguments of the run's model."""
    return {k: tuple(v) if isinstance(v, list) else v
            for k, v in found.meta["model"]["options"].items()}
