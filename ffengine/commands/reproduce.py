"""`ffengine reproduce`: train the recipes of papers and print their numbers beside ours.

A recipe whose data is not on this machine trains on the bundled digits, with its model's own
recipe for them, and the table says so; nothing is fetched unless --data asks for it. Finished seeds
lie in one results file below --out, trainings under way beside it: the same command goes on where
it was, whatever ended it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ffengine import sealed
from ffengine.commands.cases import Case, case_of, hosts, with_shorter
from ffengine.commands.options import device_of
from ffengine.commands.reproduction import queue, report
from ffengine.commands.reproduction.budget import Costs, choose
from ffengine.commands.reproduction.results import NAME, Results
from ffengine.commands.reproduction.tables import Row, aligned, percent, row_of, table
from ffengine.commands.reproduction.training import Job, refuse_early, work_folder
from ffengine.data import files
from ffengine.engine.run.stopping import TrainingStopped
from ffengine.models import recipe_files
from ffengine.models.recipe_files import RecipeFile

#: Flags that a command may change when it goes on.
FREE = ("jobs", "budget_hours", "quiet", "out", "resume", "costs")

Answer = tuple[str, dict[str, list[Row]]]


def run_reproduce(args: argparse.Namespace) -> Answer:
    if args.report:
        if args.recipe or args.resume:
            raise ValueError("[cli] --report expected no recipe and no --resume: it tells what "
                             "has been trained")
        return report.write(None if args.out is None else Path(args.out) / NAME)
    args.out = args.out or "runs"
    if args.resume and not args.recipe:
        args = last_command(args)
    if not args.recipe and args.budget_hours is None:
        return listing()
    return trained(args)


def listing() -> Answer:
    """The bundled recipes, by paper."""
    found = [recipe_files.load(name) for name in recipe_files.names()]
    rows = [{"recipe": f.name, "paper": f.paper, "table": f.table, "row": f.row, "model": f.model,
             "data": f.data, "paper_mean": f.paper_result.mean, "paper_sd": f.paper_result.sd}
            for f in found]
    cells = [[f.name, percent(f.paper_result.mean, f.paper_result.sd), f.table, f.row]
             for f in found]
    return aligned([["recipe", "paper", "table", "row"], *cells]), {"rows": rows}


def trained(args: argparse.Namespace) -> Answer:
    """Train what is missing of the recipes asked for; their table."""
    for flag, number, least in (("jobs", args.jobs, 1), ("budget-hours", args.budget_hours, 0)):
        if number is not None and (number < least or not 0 < number < math.inf):
            raise ValueError(f"[cli] --{flag} expected {'1 or more' if least else 'more than 0'}, "
                             f"got {number:g}")
    seeds, recipes = seeds_of(args.seeds), chosen(args.recipe or recipe_files.papers())
    cases = [case_of(args, recipe) for recipe in recipes]
    if len(cases) == 1:
        cases = with_shorter(args, cases[0])
    if not args.recipe and any(case.own for case in cases):
        cases = [case for case in cases if case.own]
    jobs = jobs_of(args, cases, seeds)
    refuse_early(jobs)
    at_a_time = queue.width(args.jobs, len(jobs), device_of(args))
    results = Results(Path(args.out) / NAME)
    costs, deadline = Costs(args, results.read()["runs"]), None
    if args.budget_hours is not None:
        jobs, deadline = within(args, jobs, costs, at_a_time)
        cases = [case for case in cases if any(case in job.cases for job in jobs)]
    sealed.write(work_folder(args) / "command.json", {
        "flags": {k: v for k, v in vars(args).items() if k not in ("run", "json", "debug")}})
    failed = queue.work(jobs, at_a_time, deadline, costs)
    if len(recipes) == 1 and deadline is None and failed:
        raise TrainingStopped(*failed.values())
    rows = rows_of(args, cases, jobs, results, failed)
    return "\n".join([table(rows), "", *notes(args, cases), *(
        f"{name}: {why}" for name, why in failed.items()), f"rows in {results.path}"]), {
            "rows": rows}


def last_command(args: argparse.Namespace) -> argparse.Namespace:
    """The command that trained into --out last, as it was but for the flags of FREE."""
    path = work_folder(args) / "command.json"
    if not path.exists():
        raise ValueError(f"[cli] --resume expected a recipe, or a queue that was begun in "
                         f"{args.out}: there is no {path}")
    saved = sealed.read(path)["flags"]
    given = {k: v for k, v in vars(args).items() if v not in (None, [], False)}
    for name, value in given.items():
        if name in saved and name not in FREE and value != saved[name]:
            raise ValueError(f"[cli] --resume goes on with {name} {saved[name]!r}, got {value!r}; "
                             "name the recipes for another queue")
    return argparse.Namespace(**{**vars(args), **saved, **{
        k: v for k, v in given.items() if k in FREE}})


def chosen(names: Sequence[str]) -> list[RecipeFile]:
    """The recipes of these names or paths, or all of a paper; each once."""
    found = [file for name in names for file in (
        recipe_files.of_paper(name) if name in recipe_files.papers()
        else [recipe_files.load(name)])]
    return list({file.name: file for file in found}.values())


def seeds_of(text: str | None) -> tuple[int, ...] | None:
    """--seeds: a count, or a list with a comma; None leaves them to the recipe."""
    if text is None:
        return None
    words = [word for word in text.split(",") if word.strip()]
    if words and all(word.strip().isdecimal() for word in words):
        numbers = tuple(int(word) for word in words)
        if "," not in text and numbers[0] > 0:
            return tuple(range(numbers[0]))
        if "," in text and len(set(numbers)) == len(numbers):
            return numbers
    raise ValueError(f"[cli] --seeds expected a count (5) or different seeds (0,3,7), got {text!r}")


def jobs_of(args: argparse.Namespace, cases: Sequence[Case],
            seeds: Sequence[int] | None) -> list[Job]:
    """Recipes that differ in what is read off alone share a training, and one of fewer epochs is
    read off a longer one's as it passes them."""
    served: dict[str, list[Case]] = {}
    host_of = hosts(args, cases, seeds)
    for case in cases:
        served.setdefault(host_of[case.file.name].key, []).append(case)
    jobs = []
    for mine in served.values():
        mine.sort(key=lambda case: case.epochs)
        for seed in seeds or sorted({s for case in mine for s in case.file.train.seeds}):
            jobs.append(Job(args, tuple(
                case for case in mine if seeds or seed in case.file.train.seeds), seed))
    return jobs


def within(args: argparse.Namespace, jobs: list[Job], costs: Costs,
           at_a_time: int) -> tuple[list[Job], float]:
    """(those that fit into --budget-hours, when these are over); timing them does not count."""
    hours = args.budget_hours

    def tell(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    costs.measure(jobs, max(queue.cores() // at_a_time, 1), tell)
    seconds = [costs.seconds(job) or 0.0 for job in jobs]
    deadline = time.time() + 3600 * hours
    picked = [jobs[i] for i in choose(jobs, seconds, 3600 * hours, at_a_time)]
    papers = sorted({job.cases[-1].file.paper for job in picked})
    tell(f"{len(picked)} of {len(jobs)} trainings fit into {hours:g} h; papers: "
         f"{', '.join(papers) or 'none'}")
    if not picked:
        least = min(seconds) / 3600
        raise ValueError(f"[cli] --budget-hours expected at least {least:.2g}, which the shortest "
                         f"training takes, got {hours:g}")
    return picked, deadline


def rows_of(args: argparse.Namespace, cases: Sequence[Case], jobs: Sequence[Job],
            results: Results, failed: dict[str, str]) -> list[Row]:
    """The rows of this command, from the seeds that it asked for."""
    runs = results.runs()
    rows = []
    for case in cases:
        mine = [job for job in jobs if case in job.cases]
        found = [runs[place] for job in mine if (place := (job.key(case), job.seed)) in runs]
        error = next((failed[name] for job in mine
                      if (name := job.cases[-1].file.name) in failed), None)
        rows.append(row_of(case, found, None if len(found) == len(mine) else error))
    return rows


def notes(args: argparse.Namespace, cases: Sequence[Case]) -> list[str]:
    """What a reader of the table must know."""
    found = ["accuracy in percent, mean ± sd over seeds; in s.e.: the difference in joint standard "
             "errors, where one side tells no sd with the other's; epochs done of those asked; "
             "seconds of training a seed took"]
    if any(not case.own for case in cases):
        found.append("numbers on other data than the paper's do not compare with it")
    missing = sorted({case.file.data for case in cases if case.missing})
    if missing:
        found.append(f"not on this machine: {', '.join(missing)} (looked below "
                     f"{files.data_root(args.data_root)}); --data-root FOLDER or $FFENGINE_DATA "
                     f"names a folder that has them, --data {missing[0]} downloads it")
    return found
