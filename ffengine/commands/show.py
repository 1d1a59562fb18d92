"""`ffengine models`, `plan`, `env`, `bench`: commands that train nothing."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ffengine import models
from ffengine.commands.options import device_of, model_options
from ffengine.commands.train import plan_text, plan_values
from ffengine.engine.budget import megabytes, parse_bytes
from ffengine.engine.inputs import rows_of
from ffengine.engine.optim import floor_bytes
from ffengine.engine.plan import Planner
from ffengine.engine.schedule import of
from ffengine.engine.settings import Settings
from ffengine.engine.shapes import LayerSizes, measure
from ffengine.env import env_report, env_text
from ffengine.ops import backends

#: A suite's own output must not follow the JSON on standard output.
STDERR = 2


def run_models(args: argparse.Namespace) -> tuple[str, list[dict[str, str]]]:
    found = [{"name": name, "paper": models.entry(name).paper} for name in models.names()]
    return "\n".join(f"{row['name']:28s}{row['paper']}" for row in found), found


def run_env(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    report = env_report()
    return env_text(report), report


def run_plan(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    entry, options = models.entry(args.model), model_options(args.model, args.options)
    settings = Settings.resolve(
        entry.recipe, optimizer=None, lr=None, lr_min=None, weight_decay=None, epochs=None,
        batch_size=args.batch_size, seed=0, precision=args.precision or "fp32")
    budget, device = parse_bytes(args.memory_budget), device_of(args)
    backend = args.backend or "auto"
    backends.resolve("plan", backend, device.type, settings.dtype)
    with torch.device("meta"):
        net = models.create(args.model, **options).to(settings.weight_dtype)
    schedule = of(net, None)
    schedule.begin(net, settings.epochs)
    if not schedule.planned:
        raise ValueError(f"[cli] plan expected a model of layer-local training, got {args.model}, "
                         "trained by backpropagation; its memory is metered (`ffengine train`)")
    sizes = measure(net, rows_of(net, settings.batch_size), settings.dtype,
                    states=settings.optim().states, device=device.type, backend=backend,
                    floor=floor_bytes(net, settings.optim(), schedule.phases(), schedule.owners()),
                    crosses=schedule.crosses)
    plan = Planner(sizes).best(budget)
    result = {"model": args.model, "batch_size": settings.batch_size,
              "precision": settings.precision, **plan_values(plan),
              "layers": [layer_values(i, s) for i, s in enumerate(sizes.layers)]}
    head = (f"{args.model}, batch {settings.batch_size}, {settings.precision}: "
            f"{plan_text(plan)}\n  floor {megabytes(plan.floor_bytes)} (parameters and optimizer "
            f"states), working {megabytes(plan.working_bytes)}\n"
            f"  {'run':>3} {'layers':>9} {'tile':>5} {'working':>10}")
    rows = [f"  {i:3d} {run.layers.start:4d}-{run.layers.stop - 1:<4d} {tile:5d} "
            f"{megabytes(run.peak_bytes):>10}"
            for i, (run, tile) in enumerate(zip(plan.runs, plan.tile, strict=True))]
    return "\n".join([head, *rows]), result


def layer_values(index: int, s: LayerSizes) -> dict[str, Any]:
    """One layer of `plan --json`: bytes are per sample, the weight's in all."""
    return {"index": index, "in_shape": list(s.x_shape), "out_shape": list(s.out_shape),
            "input_bytes": s.x_bytes, "activation_bytes": s.a_bytes, "output_bytes": s.out_bytes,
            "shortcut_bytes": s.shortcut_in_bytes, "weight_bytes": s.weight_bytes,
            "flops": s.flops}


def run_bench(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Hand over to `python -m bench.SUITE`; benchmarks live in a checkout, not in the package."""
    found = sorted(p.stem for p in Path("bench").glob("*.py")
                   if '__name__ == "__main__"' in p.read_text())
    if not found:
        raise ValueError("[bench] expected a checkout of ffengine with suites in bench/, got "
                         f"{Path.cwd()}")
    if args.suite is None:
        return "\n".join(found), {"suites": found}
    if args.suite not in found:
        raise ValueError(f"[bench] unknown suite {args.suite!r}; known: {', '.join(found)}")
    status = subprocess.call([sys.executable, "-m", f"bench.{args.suite}", *args.arguments],
                             stdout=STDERR if args.json else None)
    if status:
        raise ValueError(f"[bench] {args.suite} ended with status {status}")
    return "", {"suite": args.suite}
