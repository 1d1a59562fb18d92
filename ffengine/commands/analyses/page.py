"""`ffengine analyze report`: everything that is cheap to see of a run, told in words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ffengine import __version__
from ffengine.analysis.hsv import colours
from ffengine.analysis.plots import lines, neurons
from ffengine.analysis.plots import tables as plots
from ffengine.analysis.report import Section, Table, page
from ffengine.analysis.responses import LayerSums, gather
from ffengine.analysis.sparsity import KINDS
from ffengine.analysis.verdicts import Verdicts, judge
from ffengine.analysis.weights import WeightStatistics, weight_statistics
from ffengine.commands.analyses.compared import (
    LAYER_COLUMNS,
    MEASURES,
    history_of,
    history_panels,
    layer_panels,
    layer_rows,
)
from ffengine.commands.analyses.neurons import classes_of, inactivity, one_sample
from ffengine.commands.analyses.opened import Made, Opened, chosen_layers, open_one
from ffengine.commands.edited import size_of

#: Classes up to which the confusion of each with each is shown.
CONFUSED = 20


def report(args: argparse.Namespace) -> Made:
    if args.out is not None and Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"[analyze] report expected --out FILE.html, got {args.out}")
    run = open_one(args)
    images = run.part(args.split, args.samples)
    verdicts = judge(run.net, run.samples(images), backend=run.backend)
    sums = gather(run.net, run.samples(images), backend=run.backend)
    told = weight_statistics(run.net)
    rows = layer_rows(verdicts, sums, told)
    sections = [trained(run), *training(run), classes(run, verdicts, args.split),
                layers(run, rows), *ranges(run, verdicts), responses(run, sums),
                specialised(run, sums), sample(run, images), weights(told)]
    lead = (f"{run.model} was trained for {run.run.found.meta['position']['epoch']} epochs and "
            f"names the right class of {100 * verdicts.accuracy:.2f} % of {verdicts.samples:,} "
            f"{args.split} samples of {data_name(run)}. Each part below asks one question of it.")
    text = page(f"{run.model} on {data_name(run)}", lead, sections,
                f"Written by ffengine {__version__} from {run.run.found.path}.")
    name = "report.html" if args.out is None else Path(args.out).name
    return Made({name: text.encode()},
                {"accuracy": verdicts.accuracy, "samples": verdicts.samples,
                 "class_accuracy": verdicts.class_accuracy(), "layers": rows,
                 "sections": [s.title for s in sections]},
                f"report on {run.title}: {100 * verdicts.accuracy:.2f} % of {verdicts.samples} "
                f"{args.split} samples right")


def data_name(run: Opened) -> str:
    return str(run.run.notes.get("data_label", run.run.notes["data"]))


def trained(run: Opened) -> Section:
    saved, net = run.settings, run.net
    count, size = size_of(net)
    shapes = [tuple(net.layer(i).weight.shape) for i in range(len(net.layers))]
    rows = [["model", run.model], ["data", data_name(run)],
            ["samples to train, validate, test on", ", ".join(
                f"{len(part):,}" for part in (run.splits.train, run.splits.valid,
                                              run.splits.test))],
            ["layers", f"{len(net.layers)}, of them {sum(len(s) == 4 for s in shapes)} "
             "convolutional"],
            ["outputs x inputs of each layer's weight", ", ".join(
                "x".join(map(str, s)) for s in shapes[:8]) + (" ..." if len(shapes) > 8 else "")],
            ["parameters", f"{count:,} ({size / 1e6:.2f} MB)"],
            ["optimizer", f"{saved['optimizer']}, learning rate {saved['lr']:g}"],
            ["batch size", str(saved["batch_size"])], ["seed", str(saved["seed"])],
            ["precision", saved["precision"]]]
    return Section("What was trained?", [
        "Every layer of this network learns from an error of its own, the goodness of its "
        "activations; no error travels back from layer to layer." if not run.model.startswith("bp/")
        else "This network was trained end to end by backpropagation, for comparison."],
        tables=[Table("", ["", "this run"], rows)])


def training(run: Opened) -> list[Section]:
    """None for a checkpoint without its history."""
    try:
        shown = history_panels({"": history_of(run)})
    except ValueError:
        return []
    if not shown:
        return []
    picture = lines.panels("History", shown, "epoch", {}, whole=True)
    return [Section("How did training go?", [
        "Loss is what a layer tries to lower; accuracy is the share of samples whose class is "
        "right, 0 to 1. Validation data were not trained on: where training accuracy rises and "
        "validation accuracy falls, the network learns by heart. Where layers train one after the "
        "other, a layer's curve covers its own epochs only."],
        [("loss and accuracy by epoch", picture)])]


def classes(run: Opened, found: Verdicts, split: str) -> Section:
    alone = found.class_accuracy()
    told = [(k, a) for k, a in enumerate(alone) if a == a]
    worst, best = min(told, key=lambda p: p[1]), max(told, key=lambda p: p[1])
    text = [f"Best: class {run.classes[best[0]]}, {100 * best[1]:.1f} % of its samples; weakest: "
            f"class {run.classes[worst[0]]}, {100 * worst[1]:.1f} %."]
    pictures = []
    if len(alone) <= CONFUSED:
        text.append("A row of the picture is a true class, a column what its samples were taken "
                    "for. The diagonal is what was right; bright cells beside it are mistakes.")
        pictures = [("confusion of classes, %",
                     plots.confusion("What each class is taken for", found.confusion,
                                     run.classes))]
    counts = found.confusion.sum(1).tolist()
    rows = [[run.classes[k], f"{counts[k]:,}", f"{100 * a:.2f} %"]
            for k, a in sorted(told, key=lambda p: p[1])]
    return Section("Which classes does it know?", text, pictures, [
        Table(f"{split} data, weakest first" + (", 20 of them" if len(rows) > 20 else ""),
              ["class", "samples", "right"], rows[:20])])


def layers(run: Opened, rows: list[dict[str, Any]]) -> Section:
    text = ["A layer alone: the class that its goodness tells. Separation is how far the true "
            "class's goodness lies above the others' mean. A deactivated neuron answers 0 to a "
            "sample; one that no sample activates does nothing at all."]
    if not run.net.readout.maximize:
        text.append("This network lowers the goodness of true labels, so the lowest goodness wins "
                    "and a separation below 0 is what it aims at.")
    picture = lines.panels("Layer by layer", layer_panels({"": rows}), "layer",
                           dict(LAYER_COLUMNS.values()), whole=True)
    return Section("What does each layer contribute?", text, [("measures by layer", picture)])


def ranges(run: Opened, found: Verdicts) -> list[Section]:
    if found.ranges is None or len(found.layers) < 2:
        return []
    start, end = found.best_range()
    kept = run.net.layer_range
    return [Section("Which layers should vote?", [
        "Classes are scored by adding up goodness from a first to a last layer; layers after the "
        "last one need not be computed. The picture shows the accuracy of every such range on this "
        f"data. Best here: layers {start} to {end}. This run uses {kept[0]} to {kept[1]}."],
        [("accuracy by first and last layer", plots.ranges("Ranges of layers", found.ranges,
                                                           (start, end)))])]


def responses(run: Opened, sums: list[LayerSums]) -> Section:
    shown = chosen_layers(run.net, None)
    grouped = any(layer.set_of() is not None for layer in sums)
    text = ["A bar is a neuron (in convolutions a channel), its height the neuron's mean response "
            "to the samples of the row's class."]
    if grouped:
        text.append("Each class owns a set of neurons, marked in its row: if learning worked, "
                    "they stand out there and the rest stays low.")
    rows = [[str(r["layer"]), str(r["neurons"]), str(r["dead"]), f"{100 * r['inactive']:.1f} %",
             "" if r["own_ratio"] is None else f"{r['own_ratio']:.1f} x"]
            for r in inactivity(sums)]
    picture = neurons.responses("Mean responses", {i: sums[i] for i in shown},
                                {k: run.classes[k] for k in classes_of(run, None)})
    return Section("Which neurons answer to which class?", text, [("mean responses", picture)], [
        Table("", ["layer", "neurons", "never active", "responses that are 0",
                   "own set's response over the others'"], rows)])


def specialised(run: Opened, sums: list[LayerSums]) -> Section:
    picture = neurons.hsv_maps("Preferred class of every neuron", {
        i: colours(sums[i].magnitude) for i in chosen_layers(run.net, None)}, run.classes)
    return Section("How specialised are the neurons?", [
        "Each small square is a neuron. Its hue is the class it answers to most, strong colour "
        "means that it answers to that class alone, grey that it answers to all alike; brightness "
        "is how strongly. Below, the same neurons are sorted by class, so that place tells what "
        "colour tells."
        + (" Samples are shown without a label here." if run.net.encoding is not None else "")],
        [("neurons by preferred class", picture)])


def sample(run: Opened, images: Any) -> Section:
    picture, _ = one_sample(run, images, 0, chosen_layers(run.net, None))
    return Section("What happens to one sample?", [
        "The first sample and what every neuron makes of it, from black (the layer's lowest "
        "activation) to white (its highest). Few bright squares mean a sparse code."],
        [("activations of one sample", picture)])


def weights(found: list[WeightStatistics]) -> Section:
    rows = [[s.name, *(f"{s.sparsity[k]:.3f}" for k in KINDS), f"{s.least:.3g}", f"{s.most:.3g}",
             f"{s.mean:.3g}", f"{s.deviation:.3g}"] for s in found]
    shown = found[:8]
    picture = lines.bars("Sparsity of weights", {s.name: {
        MEASURES[k]: (s.sparsity[k], 0.0) for k in KINDS} for s in shown}, "sparsity, 0 to 1")
    return Section("How sparse are the weights?", [
        "Sparsity is high where a few large weights do most of the work: such a network can often "
        "be made smaller. Four common measures of it, between 0 (all weights equal in size) and 1 "
        "(one alone); the L2 measure starts at 0.5."], [("sparsity by layer", picture)],
        [Table("", ["weight", *MEASURES.values(), "min", "max", "mean", "sd"], rows)])
