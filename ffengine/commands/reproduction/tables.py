"""Rows of a reproduced table: the paper's number beside ours, for programs and for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from ffengine.commands.cases import Case
from ffengine.engine.memory.budget import megabytes

Row = dict[str, Any]
HEAD = ("recipe", "paper", "ours", "difference", "in s.e.", "seeds", "epochs", "seconds", "peak",
        "data", "machine")
RIGHT = ("paper", "ours", "difference", "in s.e.", "seeds", "epochs", "seconds", "peak")


def row_of(case: Case, runs: Sequence[Row], error: str | None = None) -> Row:
    """A line of the table: accuracies in percent, seconds of training that a seed took."""
    file, paper = case.file, case.file.paper_result
    found = [100 * (best(r["layer_accuracy"]) if case.by_layer else r["test_accuracy"])
             for r in runs]
    ours, sd = mean(found) if found else None, stdev(found) if len(found) > 1 else None
    used = {k: runs[0][k] if runs else None
            for k in ("epochs", "batch_size", "lr", "device", "backend", "precision")}
    far = ours - paper.mean if ours is not None and case.own else None
    machines = [r["machine"] for r in runs]
    row = {"recipe": file.name, "paper": file.paper, "table": file.table, "row": file.row,
            "model": file.model, "metric": paper.metric, "paper_mean": paper.mean,
            "paper_sd": paper.sd, "paper_runs": len(file.train.seeds), "mean": ours, "sd": sd,
            "difference": far,
            "seconds": mean(r["seconds"] for r in runs) if runs else None,
            "peak_bytes": max((r["peak_bytes"] for r in runs), default=None),
            "data": case.where, "trained_on": case.data, "paper_data": file.data,
            "paper_epochs": file.train.epochs, **used,
            "seeds": [r["seed"] for r in runs], "accuracies": found,
            "machines": [m for i, m in enumerate(machines) if m not in machines[:i]],
            "error": error}
    return {**row, "difference_in_errors": in_errors(row)}


def best(accuracies: Sequence[float | None]) -> float:
    """Of the layers that tell classes."""
    return max(a for a in accuracies if a is not None)


def joint_error(paper_sd: float | None, paper_runs: int, sd: float | None,
                runs: int) -> float | None:
    """Standard error of the difference of two means of so many runs each; where one side tells no
    deviation, the other's stands for both. None where neither does, or nothing ran.
    """
    theirs, ours = paper_sd if paper_sd is not None else sd, sd if sd is not None else paper_sd
    if theirs is None or ours is None or runs == 0:
        return None
    return math.sqrt(theirs ** 2 / paper_runs + ours ** 2 / runs)


def in_errors(row: Row) -> float | None:
    """The difference in joint standard errors; None where there is no such thing."""
    wide = joint_error(row["paper_sd"], row["paper_runs"], row["sd"], len(row["seeds"]))
    return row["difference"] / wide if wide and row["difference"] is not None else None


def by_paper(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each paper, both in the order they come in."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["paper"], []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """A table a paper, for people; of equal widths, so that they read as one."""
    lines = iter(aligned([HEAD, *(cells(row) for row in rows)]).splitlines())
    head = next(lines)
    told = dict(zip(map(id, rows), lines, strict=True))
    return "\n\n".join("\n".join([paper, head, *(told[id(row)] for row in mine)])
                       for paper, mine in by_paper(rows).items())


def cells(row: Row) -> list[str]:
    """Columns of HEAD."""
    paper = percent(row["paper_mean"], row["paper_sd"])
    if row["mean"] is None:
        return [row["recipe"], paper, *"-------", f"{row['data']}; {row['error']}", "-"]
    far, errors = row["difference"], in_errors(row)
    seconds, peak = row.get("seconds"), row.get("peak_bytes")
    return [row["recipe"], paper, percent(row["mean"], row["sd"]),
            "-" if far is None else f"{far:+.2f}", "-" if errors is None else f"{errors:+.1f}",
            str(len(row["seeds"])), f"{row['epochs']}/{row['paper_epochs']}",
            "-" if seconds is None else f"{seconds:.1f}",
            "-" if peak is None else megabytes(peak), row["data"],
            "; ".join(dict.fromkeys(map(machine, row["machines"])))]


def machine(facts: dict[str, Any]) -> str:
    """What a run's hardware is called in a table."""
    if facts["gpu"]:
        return str(facts["gpu"])
    count = facts["threads"]
    return f"{facts['cpu']}, {count} thread{'s' if count > 1 else ''}"


def percent(value: float, sd: float | None) -> str:
    return f"{value:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width each; those of RIGHT end together."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(
        cell.rjust(width) if name in RIGHT else cell.ljust(width)
        for cell, width, name in zip(line, widths, lines[0], strict=True)).rstrip()
        for line in lines)
