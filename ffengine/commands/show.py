"""`ffengine plan`, `env`, `bench`: commands that train nothing."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from ffengine import models
from ffengine.commands.devices import plan_on
from ffengine.commands.options import (
    assignments,
    fitted_options,
    load_data,
    model_options,
    outline,
    scaled,
    shaped_like,
)
from ffengine.commands.train import (
    budget_text,
    budget_values,
    job_of,
    plan_text,
    plan_values,
    shuffles,
    sized,
    training_recipe,
    within,
)
from ffengine.engine.memory import listing
from ffengine.engine.memory.budget import megabytes, parse_bytes
from ffengine.engine.memory.planning import Planning
from ffengine.engine.memory.shapes import LayerSizes
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.run.settings import Settings
from ffengine.env import env_report, env_text
from ffengine.words import span

#: A suite's own output must not follow the JSON on standard output.
STDERR = 2


def run_env(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    report = env_report()
    return env_text(report), report


def run_plan(args: argparse.Namespace) -> tuple[str, Any]:
    options, budget = model_options(args.model, args.options), parse_bytes(args.memory_budget)
    recipe = sized(models.entry(args.model).recipe, args)
    samples = None
    if args.data is not None:
        recipe, options, samples = on_data(args, options)
    job = job_of(args, recipe, shaped_like(args.model, options))
    if not job.schedule.planned:
        raise ValueError(f"[cli] plan expected a model of layer-local training, got {args.model}, "
                         "trained by one loss; its memory is metered (`ffengine train`)")
    if args.device_profile:
        return plan_on(args, job)
    planning = Planning(job, budget, costs=args.costs)
    settings = planning.begin(recipe.batch_size, fixed=bool(args.states or args.weights))
    if samples is not None:
        size = recipe.batch_size
        job.schedule.expect(planning, samples, size, shuffles(size, samples))
    said, result = planned(args.model, args.data, settings, planning)
    if args.steps:
        found = listing.steps(planning, settings.batch_size)
        said = "\n".join([said, "", *listing.text(found)])
        result["steps"] = found
    return said, result


def on_data(args: argparse.Namespace,
            options: dict[str, Any]) -> tuple[Recipe, dict[str, Any], int]:
    """Recipe and options with which `train` would train on --data, and how many samples; only
    one's own data are read."""
    data_options = scaled(args.model, args.data, assignments(args.data_options, "--data-set"))
    recipe = training_recipe(args)
    seen = outline(args.model, args.data, options, data_options)
    if seen is None:
        splits = load_data(args.model, args.data, options, data_options, 0, args.data_root)
        train = len(splits.train)
        return within(recipe, train), fitted_options(args.model, splits, options), train
    return within(recipe, seen.train), fitted_options(args.model, seen, options), seen.train


def planned(model: str, dataset: str | None, settings: Settings,
            planning: Planning) -> tuple[str, dict[str, Any]]:
    """The plan of a run, phase by phase where its schedule has several."""
    found = planning.plans(settings.batch_size)
    plan, sizes = found.largest, planning.planner(settings.batch_size).sizes
    net = planning.job.net
    shape = "x".join(map(str, net.in_shape))
    whose = "the model's own; --data D fits them to a data set" if dataset is None else (
        f"of {dataset}")
    result = {"model": model, "data": dataset, "in_shape": list(net.in_shape),
              "num_classes": net.num_classes, "batch_size": settings.batch_size,
              "precision": settings.precision, **budget_values(planning), **plan_values(plan),
              "phases": [{"epoch": epoch, **plan_values(p)} for epoch, p in found.phases],
              "layers": [layer_values(i, s) for i, s in enumerate(sizes.layers)]}
    rows = [f"{model}, batch {settings.batch_size}, {settings.precision}: {plan_text(plan)}"
            f"{budget_text(planning)}",
            f"  input {shape}, {net.num_classes} classes ({whose})",
            f"  floor {megabytes(plan.floor_bytes)} (parameters and optimizer states), working "
            f"{megabytes(plan.working_bytes)}",
            f"  {'segment':>7} {'':15} {'tile':>5} {'working':>10}"]
    for epoch, phase in found.phases:
        if len(found.phases) > 1:
            rows.append(f"  from epoch {epoch}: {megabytes(phase.peak_bytes)}")
        rows += [f"  {i:7d} {span(segment.layers.start, segment.layers.stop - 1):>15} {tile:5d} "
                 f"{megabytes(segment.peak_bytes):>10}"
                 for i, (segment, tile) in enumerate(zip(phase.segments, phase.tile, strict=True))]
    return "\n".join(rows), result


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
    if status or not args.json:
        raise SystemExit(status)  # the suite has said what there is to say
    return "", {"suite": args.suite}
