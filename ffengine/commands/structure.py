"""`ffengine grow` and `ffengine degenerate`: neurons that a trained run gains or loses."""

from __future__ import annotations

import argparse
from typing import Any

from ffengine.adapt.checks import layer_of
from ffengine.adapt.growth import Degeneration, Growth, degenerate, grow, growing
from ffengine.adapt.responses import sets_of
from ffengine.commands.edited import EditedRun, open_edited
from ffengine.engine.run.evaluation import class_accuracy, samples_of


def run_grow(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    options = Growth(threshold=args.threshold, neurons=args.neurons, init=args.init,
                     epochs=args.epochs, lr=args.lr, batch_size=args.batch_size,
                     seed=args.seed)
    run = open_edited(args)
    trainer, layer = run.trainer, layer_asked(run, args)
    valid = samples_of(trainer, run.loader(run.chosen_on))
    classes = growing(class_accuracy(trainer.net, valid, trainer.backend)[1], options)
    if args.label is not None:
        classes = [args.label]
    train = samples_of(trainer, run.loader(run.splits.train))
    for label in classes:
        _, edit = grow(trainer.net, layer, label, train, options, backend=trainer.backend)
        run.edit(edit)
    notes = {"grown_class": classes[0] if classes else None, "grown_classes": classes,
             "layer": layer, "neurons": options.neurons * len(classes), "init": options.init}
    text, result = run.finish("grow", notes)
    grew = ", ".join(map(str, classes)) or f"none (no accuracy below {args.threshold})"
    return f"grown in layer {layer}, class {grew}\n{text}", result


def run_degenerate(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    lowest = args.lowest
    if lowest is None and args.threshold is None and args.fraction is None:
        lowest = 2
    options = Degeneration(threshold=args.threshold, fraction=args.fraction, lowest=lowest)
    run = open_edited(args)
    trainer, layer = run.trainer, layer_asked(run, args)
    train = samples_of(trainer, run.loader(run.splits.train))
    _, edit = degenerate(trainer.net, layer, train, options, backend=trainer.backend)
    gone = [] if edit is None else edit.gone(layer)
    if edit is not None:
        run.edit(edit)
    text, result = run.finish("degenerate", {"layer": layer, "removed": gone})
    return f"removed from layer {layer}: {', '.join(map(str, gone)) or 'none'}\n{text}", result


def layer_asked(run: EditedRun, args: argparse.Namespace) -> int:
    """--layer, or the last one that the scores read; ValueError if it has no set for each class."""
    net = run.trainer.net
    layer = layer_of(net, net.layer_range[1] if args.layer is None else args.layer)
    sets_of(net, layer)
    return layer
