"""`ffengine analyze`: look inside runs; every file is written once all of them are made."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from ffengine.commands.analyses.opened import Made, plain
from ffengine.engine.run.checkpoint import write_atomically
from ffengine.needs import need

#: Kind -> module of ffengine/commands/analyses that has it.
MODULES = {"report": "page", "responses": "neurons", "activations": "neurons",
           "layers": "compared", "sip": "layers", "sparsity": "compared", "history": "compared",
           "weights": "layers", "tsne": "layers", "probes": "layers", "heatmap": "trained",
           "sweep": "trained", "degeneration": "layers", "ttest": "compared",
           "prunability": "pruned"}


def run_analyze(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    need("matplotlib", "[analyze] pictures")
    folder = out_folder(args)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"[analyze] --out expected a folder, got {folder}")
    module = importlib.import_module(f"ffengine.commands.analyses.{MODULES[args.kind]}")
    made: Made = getattr(module, args.kind)(args)
    for name, content in made.files.items():
        write_atomically(folder / name, content)
    written = [str(folder / name) for name in made.files]
    values = {"kind": args.kind, "runs": args.runs, "out": str(folder), "written": written,
              **plain(made.values)}
    return "\n".join([made.text, *(f"  {path}" for path in written)]), values


def out_folder(args: argparse.Namespace) -> Path:
    """--out, else `analysis` in the first run's folder; of a report, the page's own folder."""
    if args.kind == "report" and args.out is not None:
        return Path(args.out).parent
    if args.out is not None:
        return Path(args.out)
    run = Path(args.runs[0])
    return (run if run.is_dir() else run.parent) / "analysis"
