"""One network, every way to train it: peak bytes and seconds a step, interleaved in one process.

    python -m bench.fair deeperforward/resnet17 --batch-size 128 --precision fp32,bf16
    python -m bench.fair trifecta/shallow --batch-size 32 --authors PATH --budget 300

Ours under several plans, the published step and an expert's, the authors' own code, and every
memory recipe of backpropagation of the same network: same batch, dtype and optimizer. Rows on the
Pareto front of (metered peak, median seconds) are marked *. No time is printed unless the engine's
gradients are as close to fp64 as its plain PyTorch form's. A contender that fails is a row with the
reason. Results: a JSON and a PNG a precision, under --out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import floor, machine, plots, publishing, results
from bench.contenders import (
    Builder,
    Contender,
    authors_contender,
    backprop_contenders,
    budget_contender,
    eager_contenders,
    engine_contenders,
)
from bench.gradients import check
from bench.judging import Row, broken, judged, table, verdict
from bench.problem import DTYPES, Problem, turns
from ffengine.commands.options import model_options

#: Steps shorter than this are timed twice without the meter to compare layouts.
SHORT = 2.0
#: Share of the time limit past which a step is timed once: leanest plans trade a lot of time.
SLOW = 0.05
#: What a contender may fail with and still be a row: refusals, and memory that is not there.
FAILURES = (ValueError, TypeError, RuntimeError, ImportError, AttributeError, MemoryError)


def candidates(problem: Problem, args: argparse.Namespace) -> Iterator[tuple[str, str,
                                                                            list[Builder]]]:
    """(name, kind, builders: one a memory layout) of every row, ours first."""
    budget = int(args.budget * 1e6) if args.budget else None
    for name, build in engine_contenders(problem, budget):
        yield name, "ffengine", [build]
    if args.authors:
        yield "authors' step", "authors", [lambda: authors_contender(problem, args.authors)]
    if args.only != "engine":
        for name, build in eager_contenders(problem, args.compile):
            yield name, "eager", [build]
        only = "bp plain" if args.only == "plain" else None
        for name, builds in backprop_contenders(problem, only, args.compile):
            yield name, "bp", builds


def prepared(problem: Problem, name: str, kind: str,
             builds: list[Builder]) -> tuple[Row, Contender | None]:
    """The row with its memory, and the contender to be timed: of two layouts the faster, with the
    leaner one's memory. A contender that fails is a row with the reason and without a contender."""
    kept: Contender | None = None
    quickest = float("inf")
    row: Row = {"name": name, "kind": kind, "failed": None, "note": ""}
    for build in builds:
        try:
            contender = build()
            contender.warm()
            start = time.perf_counter()
            memory = contender.metered(problem.x, problem.y)
            spent = (time.perf_counter() - start) / 2
            if len(builds) > 1 and spent < SHORT:
                spent = min(contender.glance(), contender.glance())
        except FAILURES as bad:
            row["failed"] = " ".join(str(bad).split())[:300] or type(bad).__name__
            continue
        if memory["peak_bytes"] < row.get("peak_bytes", float("inf")):
            row |= memory
        if spent < quickest:
            quickest, kept = spent, contender
        del contender
        gc.collect()
    if kept is None:
        return row, None
    return {**row, "failed": None, "note": kept.note,
            "planned_bytes": kept.planned() if kept.planned is not None else None,
            "channels_last": kept.channels_last,
            "working_bytes": row["peak_bytes"] - row["parameter"] - row["state"]}, kept


def rounds_of(contenders: dict[str, Contender], rounds: int,
              limit: float) -> dict[str, list[float] | str]:
    """Seconds of every contender's step, in turn, `rounds` times; fewer (one at least) where
    another round would end past `limit` seconds, once where a step takes a good part of that. A
    contender that fails has the reason instead."""
    times: dict[str, list[float] | str] = {name: [] for name in contenders}
    start = time.perf_counter()
    for turn in range(1, rounds + 1):
        for name, contender in contenders.items():
            seen = times[name]
            if isinstance(seen, str) or (seen and seen[0] > SLOW * limit):
                continue
            try:
                seen.append(contender.seconds())
            except FAILURES as bad:
                times[name] = " ".join(str(bad).split())[:300]
        spent = time.perf_counter() - start
        if spent * (turn + 1) / turn > limit:
            break
    return times


def measure(problem: Problem, args: argparse.Namespace) -> list[Row]:
    """Every row: memory side by side, then times in rounds."""
    rows, contenders = [], dict[str, Contender]()
    for name, kind, builds in candidates(problem, args):
        say(f"{problem.precision}: {name}")
        row, contender = prepared(problem, name, kind, builds)
        rows.append(row)
        if contender is not None:
            contenders[name] = contender
    name, lean = "ffengine, in the leanest BP's memory", leanest(rows)
    if lean is not None:
        say(f"{problem.precision}: {name}")
        row, contender = prepared(problem, name, "ffengine",
                                  [lambda: budget_contender(problem, name, lean)])
        rows.insert(1, row)
        if contender is not None:
            contenders[name] = contender
    say(f"{problem.precision}: timing {len(contenders)} contenders")
    times = rounds_of(contenders, args.rounds, args.limit)
    for row in rows:
        seen = times.get(row["name"])
        if isinstance(seen, str):
            row["failed"] = seen
        elif seen:
            row |= {"seconds": machine.spread(seen), "rounds": seen,
                    "images_per_second": machine.spread([problem.batch / s for s in seen])}
    return judged(rows, problem)


def leanest(rows: list[Row]) -> int | None:
    """Bytes of the leanest backpropagation, where they lie between our default and our smallest
    plan: the fastest plan within them is a row too."""
    peaks: dict[str, list[int]] = {"bp": [], "ffengine": []}
    for row in rows:
        if not row["failed"] and row["kind"] in peaks and not row["note"]:
            peaks[row["kind"]].append(row["peak_bytes"])
    if not peaks["bp"] or not peaks["ffengine"]:
        return None
    lean = min(peaks["bp"])
    return lean if min(peaks["ffengine"]) < lean < peaks["ffengine"][0] else None


def say(text: str) -> None:
    print(f"  … {text}", file=sys.stderr, flush=True)


def step_text(problem: Problem) -> str:
    """What a step is, where it is more than one batch through all layers."""
    schedule = problem.trainer().schedule
    several = turns(schedule)
    if schedule.by_stages:
        return (f"a step: one batch in each of the {len(several)} stages, seconds summed (an epoch "
                "of every layer against one of backpropagation), peak the largest; features "
                "recomputed unless said")
    if len(several) > 1:
        return (f"a step: the mean over the {len(several)} turns that training takes, by their "
                "share of it; peak the largest")
    return "a step: one batch"


def run(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    """Check, measure, print and keep one precision."""
    error = check(problem)
    rows = measure(problem, args)
    least = floor.seconds(problem)
    values = {"model": problem.model, "options": problem.options, "batch": problem.batch,
              "precision": problem.precision, "deterministic": problem.deterministic,
              "optimizer": problem.optim.kind,
              "device": problem.x.device.type, "only": args.only, "gradient_error": error,
              "clock": "processor seconds of one thread" if args.cpu_time else "seconds",
              "step": step_text(problem), "floor_seconds": least, "rows": rows}
    print(f"{problem.model}, batch {problem.batch}, {problem.precision}, {problem.optim.kind}; "
          f"MB = 10^6 bytes; {values['clock']}; gradients within {error:.1e} of fp64\n"
          f"{values['step']}")
    print(table(rows))
    if least is not None:
        print(f"  {'floor (copy and product rates, cold)':42s} {'':35s} {least:8.4f}")
    print(verdict(rows), flush=True)
    stem = f"{problem.model.replace('/', '-')}-b{problem.batch}-{problem.precision}"
    out = args.out or Path(__file__).parent / "results" / problem.x.device.type / "fair"
    results.write(out / f"{stem}.json", "fair", values)
    missing = publishing.left_out(results.read(out / f"{stem}.json"))
    if missing is not None:
        print(f"  not to be published: {missing}", flush=True)
    if args.plot:
        plots.memory_against_time(out / f"{stem}.png", values)
    return values


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fair", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32",
                        help="fp32, bf16, or fp32,bf16; on a GPU tf32: every contender has it, as "
                             "none has in fp32")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True,
                        help="library products on a GPU that are the same each time, for every "
                             "contender (as training has them), or the fastest that the library "
                             "finds")
    parser.add_argument("--optimizer", choices=("adamw", "adam", "sgd"), default="adamw")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="options",
                        help="a constructor argument of the model, e.g. dropout=0.2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true",
                        help="one thread, timed by the process's own processor seconds")
    parser.add_argument("--limit", type=float, default=600.0,
                        help="seconds of timing a precision, setup not counted")
    parser.add_argument("--budget", type=float, help="MB for one more plan of the engine")
    parser.add_argument("--authors", type=Path, help="checkout of the authors' code")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--only", choices=("all", "plain", "engine"), default="all",
                        help="plain: of the BP recipes only plain")
    parser.add_argument("--compile", action="store_true",
                        help="with torch.compile of the eager step and of plain backpropagation "
                             "(minutes of compiling)")
    parser.add_argument("--out", type=Path, help="folder of the JSON and PNG files "
                        "(default: bench/results/DEVICE/fair)")
    parser.add_argument("--no-plot", action="store_false", dest="plot")
    parser.add_argument("--gate", action="store_true",
                        help="exit status 1 unless a plan of ours beats every gated row")
    parser.add_argument("--json", action="store_true",
                        help="print the results as one JSON value, the last line")
    args = parser.parse_args(argv)
    args.precisions = args.precision.split(",")
    if not set(args.precisions) <= set(DTYPES):
        raise ValueError(f"[bench] --precision expected {' or '.join(DTYPES)}, got "
                         f"{args.precision!r}")
    if args.rounds < 1:
        raise ValueError(f"[bench] --rounds expected 1 or more, got {args.rounds}")
    if args.cpu_time and args.device != "cpu":
        raise ValueError(f"[bench] --cpu-time expected --device cpu, got {args.device}")
    if args.plot:
        plots.pyplot()
    return args


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    made = []
    try:
        args = parse(words)
        options = {**NO_DROPOUT.get(args.model.partition("/")[0], {}),
                   **model_options(args.model, args.options)}
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            for precision in args.precisions:
                clock = machine.cpu_time() if args.cpu_time else contextlib.nullcontext()
                problem = Problem.of(args.model, args.batch_size, precision, args.device,
                                     args.optimizer, args.backend, args.deterministic, **options)
                with problem.rules(), clock:
                    made.append(run(problem, args))
                gc.collect()
    except ValueError as bad:
        print(f"bench.fair: {bad}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(made))
    lost = any(broken(values["rows"]) or any(r["gated"] and not r["passes"] for r in values["rows"])
               for values in made)
    return 1 if args.gate and lost else 0


#: Options of a paper's networks unless asked for: dropout costs eager contenders more than ours.
NO_DROPOUT: dict[str, dict[str, Any]] = {"deeperforward": {"dropout": 0.0}}

if __name__ == "__main__":
    sys.exit(main())
