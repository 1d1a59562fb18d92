"""Kinds that show neurons: `responses` and `activations`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ffengine.analysis.hsv import Colours, colours
from ffengine.analysis.plots import neurons as plots
from ffengine.analysis.responses import LayerSums, gather
from ffengine.commands.analyses.opened import Made, Opened, chosen_layers, open_one, table
from ffengine.nn.maps import layer_maps, over_pixels

#: Classes that one picture of responses shows.
MOST_CLASSES, SHOWN_CLASSES = 12, 10


def responses(args: argparse.Namespace) -> Made:
    run = open_one(args)
    layers, shown = chosen_layers(run.net, args.layers), classes_of(run, args.classes)
    part = neurons_of(args.neurons)
    images = run.part(args.split, args.samples)
    sums = gather(run.net, run.samples(images), label=args.label, backend=run.backend)
    picture = plots.responses(f"Mean responses: {run.title}", {i: sums[i] for i in layers},
                              {k: run.classes[k] for k in shown}, part, grown_of(run))
    rows = inactivity(sums)
    text = [f"mean response of every neuron to {len(images)} {args.split} samples, {run.title}"]
    text += [f"  layer {r['layer']}: {r['neurons']} neurons, {r['dead']} never active, "
             f"{100 * r['inactive']:.1f} % of responses are 0" + (
                 "" if r["own_ratio"] is None else
                 f"; own set's response {r['own_ratio']:.2f} x the others'") for r in rows]
    return Made({"responses.png": picture, "responses.csv": csv_of(sums, run.classes)},
                {"samples": len(images), "layers": rows, "grown": {
                    str(i): units for i, units in grown_of(run).items()}}, "\n".join(text))


def grown_of(run: Opened) -> dict[int, list[int]]:
    """Neurons that `ffengine grow` added, by layer: the last ones of their sets; none where later
    edits may have moved them."""
    found: dict[int, list[int]] = {}
    edits = run.run.notes.get("edits", [])
    if any(edit["kind"] != "grow" for edit in edits):
        return {}
    sizes: dict[tuple[int, int], int] = {}
    for edit in edits:
        for label in edit["grown_classes"]:
            each = edit["neurons"] // len(edit["grown_classes"])
            place = edit["layer"], int(label)
            sizes[place] = sizes.get(place, 0) + each
    for (i, label), count in sizes.items():
        layer = run.net.layer(i)
        end = layer.config.offsets(layer.weight.shape[0])[label + 1]
        found.setdefault(i, []).extend(range(end - count, end))
    return found


def classes_of(run: Opened, named: list[int] | None) -> list[int]:
    count = run.net.num_classes
    if named is None:
        return list(range(min(count, SHOWN_CLASSES)))
    if len(named) > MOST_CLASSES or not all(0 <= k < count for k in named) or (
            len(set(named)) < len(named)):
        raise ValueError(f"[analyze] --classes expected up to {MOST_CLASSES} that differ, from 0 "
                         f"to {count - 1}, got {named}")
    return named


def neurons_of(text: str | None) -> slice:
    """FIRST:LAST, the last not among them, as a slice."""
    if text is None:
        return slice(None)
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ValueError(f"[analyze] --neurons expected FIRST:LAST, got {text!r}")
    return slice(int(first), int(last))


def inactivity(sums: list[LayerSums]) -> list[dict[str, Any]]:
    """Per layer: neurons, dead ones, share of zero responses, own set's response over others'."""
    rows = []
    for i, layer in enumerate(sums):
        rows.append({"layer": i, "neurons": layer.neurons, "dead": layer.dead(),
                     "inactive": layer.inactive(), "own_ratio": own_ratio(layer)})
    return rows


def own_ratio(layer: LayerSums) -> float | None:
    """Mean response of the neurons of a sample's own set, over that of all others; None without
    sets."""
    sets, mean = layer.set_of(), layer.mean_response().nan_to_num()
    if sets is None:
        return None
    own = sets[None] == torch.arange(len(mean))[:, None]
    rest = float(mean[~own].mean())
    return float(mean[own].mean()) / rest if rest else None


def csv_of(sums: list[LayerSums], classes: list[str]) -> bytes:
    """A row a neuron: layer, neuron, its set, share of samples that activate it, response to each
    class."""
    rows = []
    for i, layer in enumerate(sums):
        mean, sets = layer.mean_response(), layer.set_of()
        active = layer.active / layer.counts.sum()
        rows += [[i, j, "" if sets is None else classes[int(sets[j])], f"{float(active[j]):.6g}",
                  *(f"{v:.8g}" for v in mean[:, j].tolist())] for j in range(layer.neurons)]
    return table(["layer", "neuron", "set", "active", *(f"class {name}" for name in classes)],
                 rows)


def activations(args: argparse.Namespace) -> Made:
    run = open_one(args)
    layers = chosen_layers(run.net, args.layers)
    images = run.part(args.split, args.samples)
    if not 0 <= args.sample < len(images):
        raise ValueError(f"[analyze] --sample expected 0 to {len(images) - 1}, got {args.sample}")
    sums = gather(run.net, run.samples(images), label=args.label, backend=run.backend)
    found = [colours(layer.magnitude) for layer in sums]
    values = [{"layer": i, **told(c, layer)} for i, (c, layer) in enumerate(
        zip(found, sums, strict=True))]
    picture, chosen = one_sample(run, images, args.sample, layers)
    files = {"activations-grey.png": picture,
             "activations-hsv.png": plots.hsv_maps(
                 f"Functional sparsity: {run.title}", {i: found[i] for i in layers}, run.classes),
             "activations.csv": hsv_csv(found, run.classes, chosen)}
    text = [f"activations of {len(images)} {args.split} samples, label {args.label}, {run.title}"]
    text += [f"  layer {v['layer']}: mean saturation {v['saturation']:.3f}, "
             f"{100 * v['specialised']:.1f} % of neurons give one class over half of their response"
             for v in values]
    return Made(files, {"samples": len(images), "layers": values}, "\n".join(text))


def told(found: Colours, sums: LayerSums) -> dict[str, Any]:
    """A layer's map in numbers."""
    return {"neurons": len(found.hue), "saturation": float(found.saturation.mean()),
            "specialised": float((found.saturation > 0.5).double().mean()),
            "value": float(found.value.mean()), "inactive": sums.inactive(), "dead": sums.dead(),
            "by_class": [int((found.preferred == k).sum()) for k in range(len(sums.counts))]}


def one_sample(run: Opened, images: Any, sample: int,
               layers: list[int]) -> tuple[bytes, list[torch.Tensor]]:
    """(grey maps of one sample with its own label, its activations of every layer)."""
    one = images.subset(slice(sample, sample + 1))
    (x, y), = run.samples(one)
    maps = [over_pixels(m.h)[0].float().cpu().clone()
            for m in layer_maps(run.net, x, y, label="true", backend=run.backend)]
    image = one.images[0].float()
    picture = plots.grey_map(
        f"Activations of sample {sample}, class {run.classes[int(y[0])]}: {run.title}",
        image if image.shape[0] in (1, 3) else None, {i: maps[i] for i in layers})
    return picture, maps


def hsv_csv(found: list[Colours], classes: list[str], sample: list[torch.Tensor]) -> bytes:
    rows = []
    for i, c in enumerate(found):
        names = [classes[k] if k >= 0 else "" for k in c.preferred.tolist()]
        numbers = torch.stack([c.hue, c.saturation, c.value, sample[i].double()], 1).tolist()
        rows += [[i, j, names[j], *(f"{v:.8g}" for v in row)] for j, row in enumerate(numbers)]
    return table(["layer", "neuron", "preferred class", "hue", "saturation", "value",
                  "activation of the grey map's sample"], rows)
