"""One network, every way to train it: peak bytes and seconds a step, interleaved in one process.

    python -m bench.fair deeperforward/resnet17 --batch-size 128 --precision fp32
    python -m bench.fair deeperforward/resnet17 --batch-size 32 --authors PATH/deeperforward-main

Rows on the Pareto front of (metered peak, median seconds) are marked *. No time is printed unless
the engine's gradients are as close to fp64 as the eager step's first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import floor, machine
from bench.sides import (
    Problem,
    Side,
    authors_side,
    backprop_sides,
    compiled_side,
    engine_side,
    unfused_sides,
)
from ffengine.engine.optim import LocalOptimizer
from ffengine.engine.plan import Planner
from ffengine.engine.shapes import measure as sizes
from ffengine.engine.step import StepContext, train_batch


def check(problem: Problem, backend: str) -> float:
    """The engine's first step in this dtype, on 4 samples, against fp64: the gradients' error.

    ValueError, and so no times, unless it is at most twice the eager step's in the same dtype
    (relative, over each layer's gradient) plus rounding.
    """
    exact = gradients(problem, torch.float64, "reference")
    ours = gradients(problem, problem.dtype, backend)
    eager = gradients(problem, problem.dtype, "reference")
    worst = 0.0
    for i, true in enumerate(exact):
        size = float(true.norm())
        error, allowed = (float((g[i].double() - true).norm()) / size for g in (ours, eager))
        if not error <= 2 * allowed + 64 * torch.finfo(problem.dtype).eps:
            raise ValueError(f"[bench] layer {i}'s gradient is off by {error:.2e} (eager "
                             f"{allowed:.2e}): no times printed")
        worst = max(worst, error)
    return worst


def gradients(problem: Problem, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """Every layer's weight gradient at the initial weights, on 4 samples, on the host."""
    net = problem.network()
    net = net.double() if dtype is torch.float64 else net
    x, y = problem.x[:4], problem.y[:4]
    optimizer = LocalOptimizer(net.named_parameters(), problem.optim)
    planner = Planner(sizes(net, len(x), dtype, states=problem.optim.states,
                            device=x.device.type, backend=backend))
    grads = {(i, "weight"): torch.empty_like(net.layer(i).weight) for i in range(len(net.layers))}
    ctx = StepContext(net, optimizer, y, len(x), backend=backend, grads=grads)
    train_batch(ctx, x, planner.fastest(), dtype)
    return [g.cpu() for g in grads.values()]


def sides_of(problem: Problem, args: argparse.Namespace) -> list[Side]:
    budget = int(args.budget * 1e6) if args.budget else None
    name = f"ffengine, {args.budget:g} MB" if args.budget else "ffengine"
    sides = [engine_side(problem, name, budget, backend=args.backend),
             engine_side(problem, "ffengine, fastest", fastest=True, backend=args.backend)]
    if args.authors:
        sides.append(authors_side(problem, args.authors))
    if args.only != "engine":
        sides += unfused_sides(problem)
        sides += [compiled_side(problem)] if args.compile else []
        sides += backprop_sides(problem, "bp plain" if args.only == "plain" else None)
    return sides


def measure(problem: Problem, args: argparse.Namespace) -> list[dict[str, Any]]:
    sides = sides_of(problem, args)
    for side in sides:
        side.step()  # states come to life
    memory = {s.name: s.metered(problem.x, problem.y) for s in sides}
    times = machine.interleaved({s.name: s.step for s in sides}, args.rounds, warmup=0)
    rows = [{"name": s.name, "kind": s.kind, "planned_bytes": s.planned, **memory[s.name],
             "seconds": machine.spread(times[s.name]), "rounds": times[s.name]} for s in sides]
    return mark_front(keep_better_layout(rows))


def keep_better_layout(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a BP recipe's two layouts the faster is kept, with the leaner one's memory."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = row["name"].removesuffix(" (cl)")
        if key in best:
            fast, lean = (min((best[key], row), key=rank) for rank in (
                lambda r: r["seconds"]["median"], lambda r: r["peak_bytes"]))
            row = {**lean, "name": fast["name"], "seconds": fast["seconds"],
                   "rounds": fast["rounds"]}
        best[key] = row
    return list(best.values())


def mark_front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        row["front"] = not any(
            other["peak_bytes"] <= row["peak_bytes"]
            and other["seconds"]["median"] <= row["seconds"]["median"] and other is not row
            for other in rows)
    return rows


def table(rows: list[dict[str, Any]], batch: int) -> str:
    ours = rows[0]
    lines = [f"{'':44s} {'planned':>8s} {'metered':>8s} {'alloc.':>8s} {'working':>8s} "
             f"{'s/step':>7s} "
             f"{'min..max':>13s} {'img/s':>7s} {'ours/it':>7s}"]
    for row in rows:
        seconds = row["seconds"]
        planned = f"{row['planned_bytes'] / 1e6:8.1f}" if row["planned_bytes"] else " " * 8
        peak, working = row["peak_bytes"], row["peak_bytes"] - row["parameter"] - row["state"]
        lines.append(
            f"{'* ' if row['front'] else '  '}{row['name']:42s} {planned} "
            f"{peak / 1e6:8.1f} {row['allocated_bytes'] / 1e6:8.1f} {working / 1e6:8.1f} "
            f"{seconds['median']:7.3f} {seconds['min']:6.3f}-{seconds['max']:6.3f} "
            f"{batch / seconds['median']:7.1f} {machine.ratio(ours['rounds'], row['rounds']):7.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fair", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, help="MB for the engine's plan")
    parser.add_argument("--authors", type=Path, help="checkout of the authors' code")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--only", choices=("all", "plain", "engine"), default="all",
                        help="plain: of the BP recipes only plain")
    parser.add_argument("--compile", action="store_true",
                        help="with torch.compile of the eager step (minutes of compiling)")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args(argv)
    try:
        problem = Problem.of(args.model, args.batch_size, args.precision, args.device,
                             dropout=args.dropout)
        error = check(problem, args.backend)
        rows = measure(problem, args)
    except ValueError as bad:
        print(f"bench.fair: {bad}", file=sys.stderr)
        return 2
    print(f"{args.model}, batch {args.batch_size}, {args.precision}, AdamW, dropout "
          f"{args.dropout:g}; MB = 10^6 bytes; gradients within {error:.1e} of fp64")
    print(table(rows, args.batch_size))
    least = floor.seconds(problem)
    print(f"  {'floor (copy and product rates, cold)':42s} {least:44.3f}")
    if args.json:
        args.json.write_text(json.dumps(
            {"model": args.model, "batch": args.batch_size, "precision": args.precision,
             "dropout": args.dropout, "floor_seconds": least, "gradient_error": error,
             "machine": machine.facts(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
