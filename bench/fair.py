"""One network, every way to train it: peak bytes and seconds a step, interleaved in one process.

    python -m bench.fair deeperforward/resnet17 --batch-size 128 --precision fp32
    python -m bench.fair deeperforward/resnet17 --batch-size 32 --authors PATH/deeperforward-main

Rows on the Pareto front of (metered peak, median seconds) are marked *. No time is printed unless
the engine's step agrees with the eager step on the same weights first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.sides import Problem, Side, authors_side, backprop_sides, engine_side, unfused_sides


def check(problem: Problem) -> float:
    """Largest difference of any layer's goodness from fp64; ValueError if fp32 rounding can't be
    the cause."""
    net = problem.network()
    with torch.no_grad():
        ours = net.goodness(problem.x[:2])
        theirs = net.double().goodness(problem.x[:2].double(), backend="reference")
    error = max(float((a.double() - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not error < 1e-3:
        raise ValueError(f"[bench] the engine's goodness is off by {error:.2e}: no times printed")
    return error


def sides_of(problem: Problem, args: argparse.Namespace) -> list[Side]:
    budget = int(args.budget * 1e6) if args.budget else None
    name = f"ffengine, {args.budget:g} MB" if args.budget else "ffengine"
    sides = [engine_side(problem, name, budget, backend=args.backend),
             engine_side(problem, "ffengine, fastest", fastest=True, backend=args.backend)]
    if args.authors:
        sides.append(authors_side(problem, args.authors))
    if args.only != "engine":
        sides += unfused_sides(problem)
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
    """Of a BP recipe's two layouts the faster is kept."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = row["name"].removesuffix(" (cl)")
        if key not in best or row["seconds"]["median"] < best[key]["seconds"]["median"]:
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
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args(argv)
    try:
        problem = Problem.of(args.model, args.batch_size, args.precision, args.device,
                             dropout=args.dropout)
        error = check(problem)
        rows = measure(problem, args)
    except ValueError as bad:
        print(f"bench.fair: {bad}", file=sys.stderr)
        return 2
    print(f"{args.model}, batch {args.batch_size}, {args.precision}, AdamW, dropout "
          f"{args.dropout:g}; MB = 10^6 bytes; goodness within {error:.1e} of fp64")
    print(table(rows, args.batch_size))
    if args.json:
        args.json.write_text(json.dumps(
            {"model": args.model, "batch": args.batch_size, "precision": args.precision,
             "dropout": args.dropout, "machine": machine.facts(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
