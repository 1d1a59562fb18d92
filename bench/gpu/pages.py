"""A GPU run's files as sections of the results page: what is under bench/results/<gpu>.

A file that was edited is refused, and so is a rehearsal's: numbers of a processor are no GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu import ncu, records
from bench.gpu.records import Row
from bench.markdown import brief, mega, quantity, table, where

#: Files of a run that have a section, in this order.
FILES = ("step.jsonl", "local_pass.jsonl", "smoke.jsonl", "ncu.csv")


def outcome(row: Row) -> str:
    return row["check"] if row.get("error") is None else f"{row['check']}: {row['error']}"


def steps(rows: list[Row]) -> list[str]:
    """Training steps, then bytes, then what else a run says in a sentence."""
    timed = [r for r in rows if "peak_bytes" in r and "planned_bytes" in r and "kind" in r]
    sides = {r["name"] for r in rows if r["record"] in ("step", "compiled", "fp32", "tf32", "free")}
    lines = table(["", "ms a step (min–max)", "host ms", "planned MB", "metered MB",
                   "allocated MB", "launches", "images/s", "times as long as the first of ours",
                   "check"], (
        [f"**{r['name']}**" if r["kind"] == "ffengine" else r["name"],
         quantity(r.get("seconds"), 1e3, 3), quantity(r.get("host_seconds"), 1e3, 2),
         mega(r.get("planned_bytes")), mega(r["peak_bytes"]), mega(r["allocated_bytes"]),
         brief(r.get("launches")), brief(r.get("images_per_second")),
         brief(r.get("times_as_long")), outcome(r)] for r in timed))
    lines += longest(timed)
    others = [r for r in rows if r not in timed]
    said = [f"- {r['name']}: {outcome(r)}" + (f"; {r['text']}" if r.get("text") else "")
            for r in others if r["name"] not in sides or r.get("error") or r.get("text")]
    return [*lines, *([""] if said else []), *said]


def longest(timed: list[Row]) -> list[str]:
    """Kernels that take most of the fastest of our steps, where the profiler saw them."""
    ours = [r for r in timed if r["kind"] == "ffengine" and r.get("seconds") and r.get("kernels")]
    if not ours:
        return []
    row = min(ours, key=lambda r: r["seconds"]["median"])
    return ["", f"Kernels of `{row['name']}`, by the profiler:", "", *table(
        ["", "launches", "µs in all"], ([name, str(count), f"{1e6 * seconds:.0f}"]
                                        for name, (count, seconds) in row["kernels"].items()))]


def sweeps(rows: list[Row]) -> list[str]:
    return ["On cold data, in turns with a copy of the same bytes.", "", *table(
        ["", "µs (min–max)", "GB/s", "% of copy", "check"], (
            [r["name"], quantity(r.get("seconds"), 1e6, 1), brief(r.get("gb_per_s")),
             brief(r.get("percent_of_copy")), outcome(r)] for r in rows))]


def looked_at(rows: list[Row]) -> list[str]:
    """Smoke, and how every stage of the run ended."""
    lines = table(["", "check", "said"], (
        [r["name"], outcome(r), r.get("text", "")] for r in rows if r["record"] == "smoke"))
    stages = [s for r in rows if r["record"] == "run" for s in r["stages"]]
    if stages:
        lines += ["", *table(["stage", "seconds", "ended", "said last"], (
            [s["name"], f"{s['seconds']:.0f}", s["word"], s["said"][-1] if s["said"] else ""]
            for s in stages))]
    return lines


def counted(path: Path) -> tuple[Row, list[str]]:
    facts, rows = ncu.read(path)
    return facts, table(["kernel", *ncu.METRICS.values()], (
        [r["Kernel Name"].split("(")[0], *(r.get(name, "") for name in ncu.METRICS)]
        for r in rows))


SECTIONS: dict[str, Callable[[list[Row]], list[str]]] = {
    "step.jsonl": steps, "local_pass.jsonl": sweeps, "smoke.jsonl": looked_at}


def section(path: Path) -> tuple[Row, list[str], list[Row]]:
    """(facts, lines, rows) of one file; a table of ncu's counters has no rows.

    Raises:
        ValueError: one line: unreadable, edited, or of a rehearsal.
    """
    rows: list[Row] = []
    if path.suffix == ".csv":
        facts, lines = counted(path)
    else:
        facts, read = records.read(path)
        rows = records.latest(read)
        lines = SECTIONS[path.name](rows)
    if facts["kind"] != "gpu":
        raise ValueError(f"[page] {path} is of a {facts['kind']} without a GPU: expected a run on "
                         "one, numbers of a processor are no GPU's")
    return facts, lines, rows


def blocks(folder: Path) -> list[tuple[str, list[str], str, Row]]:
    """(name, lines, where it was measured, {"kind", "machine", "rows"}) of every file of a GPU run
    under a folder; empty files have none."""
    made = []
    for path in sorted((p for name in FILES for p in folder.rglob(name)),
                       key=lambda p: (p.parent, FILES.index(p.name))):
        if path.stat().st_size:
            facts, lines, rows = section(path)
            name = path.relative_to(folder).with_suffix("").as_posix()
            made.append((name, lines, where(facts, facts["version"]),
                         {"kind": f"gpu {path.stem}", "machine": facts, "rows": rows}))
    return made


def slug(facts: dict[str, Any]) -> str:
    """The folder's name of a run on this GPU."""
    kept = "".join(c if c.isalnum() else " " for c in str(facts["gpu"]).lower())
    return "-".join(kept.split())
