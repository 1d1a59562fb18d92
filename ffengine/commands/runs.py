"""`ffengine eval` and `ffengine export`: what a finished run is good for."""

from __future__ import annotations

import argparse
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from ffengine import data
from ffengine.commands.options import (
    Outline,
    assignments,
    device_of,
    load_data,
    open_run,
    outline,
    saved_data_options,
    saved_options,
)
from ffengine.engine.run.checkpoint import write_atomically
from ffengine.engine.trainer import Trainer
from ffengine.needs import need
from ffengine.nn import LocalNet
from ffengine.words import span


def run_eval(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    run = open_run(args)
    saved, notes = run.found.meta["settings"], run.notes
    if "data" not in notes:
        raise ValueError(f"[checkpoint] expected a run of `ffengine train`, got {run.found.path}")
    name, options = run.found.meta["model"]["name"], saved_options(run.found)
    dataset, data_options = judged_on(args, notes)
    check_fits(run.net, outline(name, dataset, options, data_options))
    splits = load_data(name, dataset, options, data_options, saved["seed"], args.data_root,
                       notes.get("classes") if data.own.is_own(dataset) else None)
    check_fits(run.net, splits)
    trainer = Trainer(run.net, batch_size=saved["batch_size"], backend=args.backend or "auto",
                      precision=args.precision or saved["precision"], device=device_of(args),
                      progress=False)
    test = data.loader(splits.test, batch_size=saved["batch_size"], device=trainer.device)
    correct, layers = trainer.evaluate(test), trainer.evaluate_layers(test)
    start, end = run.net.layer_range
    result = {"model": name, "data": dataset, "data_label": splits.called,
              "checkpoint": str(run.found.path), "epochs": run.found.meta["position"]["epoch"],
              "test_samples": len(splits.test), "test_accuracy": correct,
              "layer_accuracy": layers, "layer_range": [start, end]}
    rows = [f"test accuracy {100 * correct:.2f} % ({name} on {splits.called}, "
            f"{span(start, end)}, {run.found.path})"]
    rows += [f"  layer {i:3d}  " + ("super-classes" if a is None else f"{100 * a:6.2f} %")
             for i, a in enumerate(layers)]
    return "\n".join(rows), result


def check_fits(net: LocalNet, seen: data.Splits | Outline | None) -> None:
    """ValueError for data that the network cannot be judged on, as far as it is known."""
    wanted = net.num_classes, tuple(net.in_shape)
    if seen is not None and (seen.num_classes, seen.shape) != wanted:
        raise ValueError(f"[cli] eval expected data of {wanted[0]} classes and images of "
                         f"{wanted[1]}, got {seen.num_classes} and {seen.shape}")


def judged_on(args: argparse.Namespace, notes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The data set and its options: the run's; or --data, all of it that has no test part of its
    own, read and scaled as the run's was.
    """
    kept = assignments(saved_data_options(notes), "--data-set")
    wanted = assignments(args.data_options, "--data-set")
    if args.data is None:
        return notes["data"], {**kept, **wanted}
    if not data.own.is_own(args.data):
        return args.data, {"normalize": kept["normalize"], **wanted}
    fits = {"normalize", "label", "shape", "range", "channels"}
    known = {"normalize", *data.own.options_of(args.data)}
    return args.data, {"test": "all", **{k: v for k, v in kept.items() if k in fits & known},
                       **wanted}


def run_export(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    run = open_run(args)
    suffix = ".pt2" if args.format == "pt2" else ".safetensors"
    out = Path(args.out) if args.out else run.found.path.parent / f"model{suffix}"
    net = run.net.eval()
    made = weights_of(net) if args.format == "safetensors" else program_of(net)
    write_atomically(out, made)
    result = {"path": str(out), "format": args.format, "bytes": out.stat().st_size}
    return f"{out} ({args.format}, {result['bytes'] / 1e6:.1f} MB)", result


def weights_of(net: LocalNet) -> bytes:
    """A safetensors file of its state_dict."""
    writer = need("safetensors.torch", "[export] --format safetensors")
    made: bytes = writer.save({k: t.contiguous() for k, t in net.state_dict().items()})
    return made


def program_of(net: LocalNet) -> bytes:
    """A pt2 file of torch.export; made in memory, where torch's own writer aborts the process when
    the disk is full."""
    weight = next(net.parameters())
    example = torch.zeros(2, *net.in_shape,
                          dtype=torch.promote_types(weight.dtype, torch.float32))
    rows = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: rows},))
    file = io.BytesIO()
    with warnings.catch_warnings():  # of shared storages, which these weights do not have
        warnings.simplefilter("ignore", UserWarning)
        torch.export.save(program, file)
    return file.getvalue()
