"""Test accuracy of every model on the bundled digits: the engine against the unfused update rule.

    python -m bench.variants [MODEL ...] [--seeds 3] [--json FILE] [--markdown FILE]
                             [--backends auto,reference]

Trains each model's own digits recipe for seeds 0, 1, ... through the fused engine ("auto") and
through the same update rule in plain PyTorch ("reference"). Same splits, initial weights and batch
orders. The JSON is written after every run, and a run that it holds is not repeated unless its
recipe, options or threads have changed since: an interrupted table goes on where it stood.
--markdown replaces what stands between the markers in FILE with the table of all runs in the JSON;
with --table-only nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ffengine as ff
from bench import machine, results
from ffengine.commands.options import fitted_options, load_data
from ffengine.commands.train import within
from ffengine.engine.run.checkpoint import write_atomically
from ffengine.engine.run.stopping import TrainingStopped
from ffengine.models.registry import entry

RESULTS = Path(__file__).parent / "results" / "cpu" / "variants.json"
BEGIN, END = "<!-- variants:begin -->", "<!-- variants:end -->"
BACKENDS = ("auto", "reference")
Run = dict[str, Any]


def job(model: str, backend: str, seed: int) -> Run:
    """What a run is asked to do: equal jobs need not run twice."""
    recipe = asdict(entry(model).recipe_for("digits"))
    options = {k: str(v) for k, v in entry(model).options_for("digits").items()}
    asked: Run = {"model": model, "backend": backend, "seed": seed, "recipe": recipe,
                  "options": options, "threads": torch.get_num_threads()}
    return dict(json.loads(json.dumps(asked)))


def train(asked: Run) -> Run:
    """One run as `ffengine train MODEL --data digits` makes it, without a run folder."""
    model, seed, recipe = asked["model"], asked["seed"], entry(asked["model"]).recipe_for("digits")
    splits = load_data(model, "digits", {}, {}, seed, None)
    recipe = within(recipe, splits)
    torch.manual_seed(seed)
    net = ff.models.create(model, **fitted_options(model, splits, {}))
    trainer = ff.Trainer(net, recipe=recipe, batch_size=recipe.batch_size, seed=seed,
                         backend=asked["backend"], progress=False)
    shuffled = ff.data.loader(splits.train, batch_size=recipe.batch_size, seed=seed,
                              shuffle=recipe.batch_size < len(splits.train))
    valid, test = (ff.data.loader(part, batch_size=recipe.batch_size)
                   for part in (splits.valid, splits.test))
    start = time.perf_counter()
    trainer.fit(shuffled, valid)
    seconds = time.perf_counter() - start
    return {**asked, "accuracy": trainer.evaluate(test), "seconds": seconds,
            "epochs": trainer.epochs, "parameters": sum(p.numel() for p in net.parameters()),
            "machine": machine.facts()}


def attempt(asked: Run) -> Run:
    """The run; one that met a number that is not finite is a row too, without an accuracy."""
    try:
        return train(asked)
    except TrainingStopped as stopped:
        return {**asked, "accuracy": None, "seconds": None, "epochs": None,
                "stopped": str(stopped), "machine": machine.facts()}


def stored(path: Path) -> list[Run]:
    """The runs of a result file; none if there is no such file."""
    return list(results.read(path, kind="variants")["runs"]) if path.exists() else []


def keep(path: Path, runs: list[Run]) -> None:
    results.write(path, "variants", {"data": "digits", "runs": runs})


def find(runs: list[Run], asked: Run) -> Run | None:
    return next((r for r in runs if all(r.get(k) == v for k, v in asked.items())), None)


def replaced(runs: list[Run], new: Run) -> list[Run]:
    """The runs with a new one in the place of what an older recipe gave."""
    key = [new[k] for k in ("model", "backend", "seed")]
    return [*(r for r in runs if [r[k] for k in ("model", "backend", "seed")] != key), new]


def summary(runs: list[Run], model: str) -> dict[str, Any]:
    """One row: per backend the accuracies (per cent) and the median seconds, by seed."""
    row: dict[str, Any] = {"model": model, "epochs": None}
    for backend in BACKENDS:
        mine = sorted((r for r in runs if r["model"] == model and r["backend"] == backend),
                      key=lambda r: r["seed"])
        finished = [r for r in mine if r["accuracy"] is not None]
        row[backend] = {r["seed"]: 100 * r["accuracy"] for r in finished}
        row[f"{backend} stopped"] = len(mine) - len(finished)
        row[f"{backend} seconds"] = (statistics.median(r["seconds"] for r in finished)
                                     if finished else None)
        row["epochs"] = next((r["epochs"] for r in finished), row["epochs"])
    ours, plain = (row[b] for b in BACKENDS)
    shared = [seed for seed in ours if seed in plain]
    row["difference"] = (statistics.mean(ours[s] - plain[s] for s in shared) if shared else None)
    return row


def spread(accuracies: dict[int, float], stopped: int) -> str:
    """Mean ± sample standard deviation; what stopped on a number that is not finite is said."""
    values = list(accuracies.values())
    lost = f" ({stopped} stopped)" if stopped else ""
    if not values:
        return "—" + lost
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd}{lost}"


def cells(row: dict[str, Any]) -> list[str]:
    seconds = [row[f"{b} seconds"] for b in BACKENDS]
    return [row["model"], *(spread(row[b], row[f"{b} stopped"]) for b in BACKENDS),
            "—" if row["difference"] is None else f"{row['difference']:+.2f}",
            " / ".join("—" if s is None else f"{s:.1f}" for s in seconds),
            "—" if row["epochs"] is None else str(row["epochs"])]


HEAD = ["model", "ours, %", "unfused, %", "difference", "seconds, ours / unfused", "epochs"]


def line(values: list[str]) -> str:
    widths = (28, 16, 16, 11, 24, 7)
    return "".join(f"{v:{'<' if i == 0 else '>'}{w}}" for i, (v, w) in enumerate(
        zip(values, widths, strict=True)))


def known_models(runs: list[Run]) -> list[str]:
    """Models with a run, the twins trained by backpropagation last."""
    return sorted({r["model"] for r in runs}, key=lambda m: (m.startswith("bp/"), m))


def markdown(runs: list[Run]) -> str:
    """The table of all runs, and where they were measured, said once."""
    rows = ["| " + " | ".join(HEAD) + " |", "|---|" + "--:|" * (len(HEAD) - 1)]
    rows += ["| " + " | ".join(cells(summary(runs, m))) + " |" for m in known_models(runs)]
    facts = [r["machine"] for r in runs]
    said = "; ".join(sorted({f"{f['cpu']} ({f['isa']}), threads: {f['threads']}, torch "
                             f"{f['torch']}" for f in facts}))
    dates = sorted({f["date"] for f in facts})
    seeds = 1 + max(r["seed"] for r in runs)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "\n".join([
        *rows, "", f"Test accuracy on the digits (360 images), mean ± standard deviation of up to "
        f"{seeds} seeds; seconds: median of a training run with its validation. {said}; {when}."])


def write_markdown(path: Path, runs: list[Run]) -> None:
    """Replace what stands between the markers; ValueError where there are none."""
    text = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"[bench] expected the markers {BEGIN} and {END} in {path}")
    table = markdown(runs) if runs else ""
    write_atomically(path, f"{before}{BEGIN}\n{table}\n{END}{after}".encode())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    parser.add_argument("--markdown", type=Path, help="file with the markers")
    parser.add_argument("--backends", default="auto,reference")
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    return parser.parse_args(argv)


def run_all(args: argparse.Namespace) -> None:
    """Seed by seed, so that both sides of a pair of timings saw the same machine."""
    print(line(HEAD), flush=True)
    runs = stored(args.json)
    for model in args.models or sorted(ff.models.names(), key=lambda m: (m.startswith("bp/"), m)):
        for seed in range(args.seeds):
            for backend in args.backends.split(","):
                asked = job(model, backend, seed)
                if find(runs, asked) is None:
                    # what is on disk now: another process may have added to it
                    runs = replaced(stored(args.json), attempt(asked))
                    keep(args.json, runs)
        print(line(cells(summary(runs, model))), flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        unknown = set(args.backends.split(",")) - set(BACKENDS)
        if unknown:
            raise ValueError(f"[bench] --backends expected {', '.join(BACKENDS)}, got "
                             f"{', '.join(sorted(unknown))}")
        for model in args.models:
            entry(model)
        if args.threads:
            torch.set_num_threads(args.threads)
        if not args.table_only:
            run_all(args)
        if args.markdown:
            write_markdown(args.markdown, stored(args.json))
    except ValueError as bad:
        print(f"bench.variants: {bad}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
