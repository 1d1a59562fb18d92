"""`ffengine eval` and `ffengine export`: what a finished run is good for."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from ffengine import data
from ffengine.commands.options import (
    assignments,
    device_of,
    load_data,
    open_run,
    saved_data_options,
    saved_options,
)
from ffengine.engine.trainer import Trainer
from ffengine.needs import need


def run_eval(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    run = open_run(args)
    saved, notes = run.found.meta["settings"], run.notes
    if "data" not in notes:
        raise ValueError(f"[checkpoint] expected a run of `ffengine train`, got {run.found.path}")
    name, options = run.found.meta["model"]["name"], saved_options(run.found)
    splits = load_data(name, notes["data"], options,
                       assignments(saved_data_options(notes), "--data-set"), saved["seed"],
                       args.data_root)
    trainer = Trainer(run.net, batch_size=saved["batch_size"], backend=args.backend or "auto",
                      precision=args.precision or saved["precision"], device=device_of(args),
                      progress=False)
    test = data.loader(splits.test, batch_size=saved["batch_size"], device=trainer.device)
    correct, layers = trainer.evaluate(test), trainer.evaluate_layers(test)
    start, end = run.net.layer_range
    result = {"model": name, "data": notes["data"], "checkpoint": str(run.found.path),
              "epochs": run.found.meta["position"]["epoch"], "test_samples": len(splits.test),
              "test_accuracy": correct, "layer_accuracy": layers, "layer_range": [start, end]}
    rows = [f"test accuracy {100 * correct:.2f} % ({name} on {notes['data']}, layers "
            f"{start}-{end}, {run.found.path})"]
    rows += [f"  layer {i:3d}  " + ("super-classes" if a is None else f"{100 * a:6.2f} %")
             for i, a in enumerate(layers)]
    return "\n".join(rows), result


def run_export(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    run = open_run(args)
    suffix = ".pt2" if args.format == "pt2" else ".safetensors"
    out = Path(args.out) if args.out else run.found.path.parent / f"model{suffix}"
    net = run.net.eval()
    if args.format == "safetensors":
        writer = need("safetensors.torch", "[export] --format safetensors")
        writer.save_file({k: t.contiguous() for k, t in net.state_dict().items()}, out)
    else:
        weight = next(net.parameters())
        example = torch.zeros(2, *net.in_shape,
                              dtype=torch.promote_types(weight.dtype, torch.float32))
        rows = torch.export.Dim("batch", min=1)
        program = torch.export.export(net, (example,), dynamic_shapes=({0: rows},))
        with warnings.catch_warnings():  # of shared storages, which these weights do not have
            warnings.simplefilter("ignore", UserWarning)
            torch.export.save(program, out)
    result = {"path": str(out), "format": args.format, "bytes": out.stat().st_size}
    return f"{out} ({args.format}, {result['bytes'] / 1e6:.1f} MB)", result
