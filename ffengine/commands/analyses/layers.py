"""Kinds that show the layers of one run: `sip`, `weights`, `tsne`, `probes`, `degeneration`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch

from ffengine.adapt.growth import Degeneration
from ffengine.analysis import tsne as embedding
from ffengine.analysis.degeneration import removed
from ffengine.analysis.plots import lines
from ffengine.analysis.plots import tables as plots
from ffengine.analysis.probes import ProbeOptions, Probes
from ffengine.analysis.sparsity import KINDS
from ffengine.analysis.verdicts import judge
from ffengine.analysis.weights import WeightStatistics, clamped, weight_statistics
from ffengine.commands.analyses.opened import Made, open_one, table
from ffengine.commands.options import build_saved
from ffengine.engine.run.evaluation import accuracy
from ffengine.nn.maps import check_layer


def sip(args: argparse.Namespace) -> Made:
    """DeeperForward's table 3: all layers, the range chosen on held-out data, both judged on
    `--split`."""
    run = open_one(args)
    held_out = "valid" if len(run.splits.valid) else args.split
    images = run.part(args.split, args.samples)
    found = judge(run.net, run.samples(images), backend=run.backend)
    chosen = (found if held_out == args.split else judge(
        run.net, run.samples(run.part(held_out)), backend=run.backend)).best_range()
    assert found.ranges is not None
    depth = len(run.net.layers)
    values: dict[str, Any] = {
        "samples": found.samples, "chosen_on": held_out, "range": list(chosen),
        "all_layers": float(found.ranges[0, depth - 1]), "after_sip": float(found.ranges[chosen]),
        "kept_range": list(run.net.layer_range), "accuracy": found.accuracy,
        "table": found.ranges.tolist()}
    rows = [[s, e, f"{float(found.ranges[s, e]):.6f}"] for s in range(depth)
            for e in range(s, depth)]
    text = (f"{run.title}, {found.samples} {args.split} samples: all layers "
            f"{100 * values['all_layers']:.2f} %, after SIP {100 * values['after_sip']:.2f} % "
            f"(start {chosen[0]}, end {chosen[1]}, chosen on {held_out} data)")
    picture = plots.ranges(f"Signal integrating and pruning: {run.title}", found.ranges,
                           found.best_range())
    return Made({"sip.png": picture, "sip.csv": table(["start", "end", "accuracy"], rows)},
                values, text)


def weights(args: argparse.Namespace) -> Made:
    run = open_one(args)
    layer = check_layer(run.net, args.layer)
    values = clamped(run.net.layer(layer).weight, args.clamp)
    beyond = float((run.net.layer(layer).weight.detach().abs() > args.clamp).double().mean())
    title = f"Weights of layer {layer}: {run.title}"
    found = weight_statistics(run.net)
    told = f"{title}: {100 * beyond:.2f} % beyond ±{args.clamp:g}, largest {found[layer].largest:g}"
    return Made({"weights.png": plots.weight(title, values, args.clamp),
                 "weights.csv": statistics_csv(found)},
                {"layer": layer, "clamp": args.clamp, "beyond": beyond,
                 "weights": [asdict(s) for s in found]}, told)


def statistics_csv(found: list[WeightStatistics]) -> bytes:
    return table(["weight", *KINDS, "min", "max", "mean", "sd"],
                 [[s.name, *(repr(s.sparsity[k]) for k in KINDS), repr(s.least), repr(s.most),
                   repr(s.mean), repr(s.deviation)] for s in found])


def tsne(args: argparse.Namespace) -> Made:
    run = open_one(args)
    layer = len(run.net.layers) - 1 if args.layer is None else check_layer(run.net, args.layer)
    if not 2 <= args.samples <= min(embedding.MOST, len(run.splits.test)):
        raise ValueError(f"[tsne] --samples expected 2 to "
                         f"{min(embedding.MOST, len(run.splits.test))}, got {args.samples}")
    nets = {"trained": run.net}
    if args.untrained:
        torch.manual_seed(run.settings["seed"])
        nets["untrained"] = build_saved(run.run.found).to(run.device).eval()
    images, maps, rows = run.part("test"), [], []
    y = torch.empty(0)
    for name, net in nets.items():
        h, z, y = embedding.features(net, run.samples(images), layer, args.samples,
                                     label=args.label, backend=run.backend)
        same = torch.equal(h, z)
        parts = [("", h)] if same else [(" before normalisation", h), (" after it", z)]
        for said, values in parts:
            at = embedding.embed(values, seed=args.seed)
            maps.append((f"{name}{said}", at))
            rows += [[name, "before" if values is h else "after", i, run.classes[int(k)],
                      f"{p[0]:.6g}", f"{p[1]:.6g}"]
                     for i, (k, p) in enumerate(zip(y, at.tolist(), strict=True))]
    title = f"t-SNE of layer {layer}: {run.title}"
    return Made({"tsne.png": plots.embedding(title, maps, y, run.classes),
                 "tsne.csv": table(["network", "normalisation", "sample", "class", "x", "y"],
                                   rows)},
                {"layer": layer, "samples": args.samples, "maps": [name for name, _ in maps]},
                f"{title}, {args.samples} test samples")


def probes(args: argparse.Namespace) -> Made:
    options = ProbeOptions(tuple(args.hidden), args.epochs, args.lr, args.label, args.features)
    run = open_one(args)
    images = run.part(args.split, args.samples)
    heads = Probes(run.net, options, run.backend)

    def epoch(number: int) -> Any:
        if not args.quiet:
            print(f"heads: epoch {number + 1}/{options.epochs}", file=sys.stderr, flush=True)
        return run.samples(run.part("train"), shuffle=True, epoch=number)

    heads.fit(epoch)
    alone = [layer.accuracy for layer in judge(run.net, run.samples(images),
                                               backend=run.backend).layers]
    found = heads.accuracy(run.samples(images))
    said: dict[str, lines.Line] = {"head by backpropagation": (
        range(len(found)), [100 * a for a in found])}
    if alone:
        said["the layer's own goodness"] = (range(len(alone)), [100 * a for a in alone])
    title = f"Usefulness of each layer's features: {run.title}"
    picture = lines.panels(title, {"accuracy": said}, "layer",
                           {"accuracy": f"accuracy on {args.split} data, %"}, whole=True)
    rows = [[i, f"{a:.6f}", f"{alone[i]:.6f}" if alone else ""] for i, a in enumerate(found)]
    text = "\n".join([f"{title}, heads {'-'.join(map(str, options.hidden))}, "
                      f"{options.epochs} epochs", *(f"  layer {i}: {100 * a:.2f} %" for i, a in
                                                    enumerate(found))])
    return Made({"probes.png": picture,
                 "probes.csv": table(["layer", "head accuracy", "own accuracy"], rows)},
                {"samples": len(images), "accuracy": found, "own_accuracy": alone,
                 "epochs": options.epochs, "hidden": list(options.hidden)}, text)


#: Fractions of the strongest response that `degeneration` tries where none are named.
FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def degeneration(args: argparse.Namespace) -> Made:
    """SN fig. 8 (fractions of the strongest response) and fig. 6 (numbers of neurons)."""
    by_number = args.lowest is not None
    values = sorted(set(args.lowest if by_number else args.fractions or FRACTIONS))
    options = [Degeneration(lowest=v) if by_number else Degeneration(fraction=v) for v in values]
    run = open_one(args)
    net = run.net
    layer = net.layer_range[1] if args.layer is None else check_layer(net, args.layer)
    images = run.part(args.split, args.samples)
    found = removed(net, layer, run.samples(run.part("train")), run.samples(images), options,
                    backend=run.backend)
    whole = accuracy(net, run.samples(images), run.backend)
    name = "neurons removed" if by_number else "fraction of the set's strongest response"
    title = f"Degeneration of layer {layer}: {run.title}"
    picture = lines.removals(title, values, [100 * r.accuracy for r in found],
                             [r.count for r in found], 100 * whole, name,
                             f"accuracy on {args.split} data, %")
    rows = [[v, r.count, repr(r.accuracy)] for v, r in zip(values, found, strict=True)]
    text = "\n".join([f"{title}: {100 * whole:.2f} % before",
                      *(f"  {v:g}: {r.count} removed, {100 * r.accuracy:.2f} %"
                        for v, r in zip(values, found, strict=True))])
    return Made({"degeneration.png": picture,
                 "degeneration.csv": table(["lowest" if by_number else "fraction", "removed",
                                            "accuracy"], rows)},
                {"layer": layer, "accuracy_before": whole, "by": "lowest" if by_number else
                 "fraction", "values": values, "removed": [r.count for r in found],
                 "accuracy": [r.accuracy for r in found]}, text)
