"""Blocks made of several results: the number that stands first in README.md with its opponents,
single-pass families, reproduced papers, and the fair tables in one.

Each is made of the best result that may be published, and follows when a better one is measured:
the first line of HEADLINE, or of a family, that has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.markdown import mega, table
from bench.sections import machine_name
from ffengine.commands.reproduction import report, tables
from ffengine.commands.reproduction.results import rows_in

Content = dict[str, Any]
Row = dict[str, Any]

#: (model, batch, precision) of the number that stands first.
HEADLINE = (("deeperforward/resnet17", 128, "fp32"), ("deeperforward/resnet17", 32, "fp32"))


class Family(NamedTuple):
    """Networks that train in one pass: no negatives. `models`, the one worth most first."""

    title: str
    turn: str
    models: tuple[str, ...]


FAMILIES = (
    Family("DeeperForward, residual", "every layer on every batch", (
        "deeperforward/resnet17", "deeperforward/resnet33", "deeperforward/resnet100")),
    Family("DeeperForward, deep chain", "every layer on every batch", ("deeperforward/cnn14",)),
    Family("DeeperForward, small", "every layer on every batch", ("deeperforward/tinycnn",)),
    Family("Support neurons", "layer after layer", ("sn/cifar10", "sn/cifar100", "sn/mlp")),
    Family("CwComp", "each layer from its start to its end epoch", ("cwcomp/cfse",
                                                                     "cwcomp/ffcnn")),
    Family("CaFo", "fixed blocks under predictors", ("cafo/cnn",)),
)
#: What a paper is called whose folder of models has a shorter name.
PAPERS = {"cafo": "CaFo", "cff": "Collaborative FF", "cwcomp": "CwComp",
          "deeperforward": "DeeperForward", "fflib": "FFLib", "hinton": "Hinton 2022",
          "sn": "Support neurons", "symba": "SymBa", "trifecta": "The Trifecta"}


def headline_of(contents: Iterable[Content]) -> Content | None:
    """The fair table of the number that stands first; None if there is no such table."""
    found = list(contents)
    for wanted in HEADLINE:
        for content in found:
            if (content["model"], content["batch"], content["precision"]) == wanted:
                return content
    return None


def contenders(content: Content) -> list[tuple[str, Row]]:
    """(name, row) of ours, the published code, and backpropagation: plain, fastest and leanest."""
    rows = [r for r in content["rows"] if not r["failed"]]
    theirs = [r for r in rows if r["kind"] == "bp"]
    chosen = [("ffengine", next(r for r in rows if r["kind"] == "ffengine"))]
    chosen += [("the published code", r) for r in rows if r["kind"] == "authors"]
    chosen += [("backpropagation, plain", r) for r in theirs if r["name"] == "bp plain"]
    for word, best in (("fastest", min(theirs, key=_seconds)),
                       ("leanest", min(theirs, key=lambda r: r["peak_bytes"]))):
        if not any(best is row for _, row in chosen):
            chosen.append((f"backpropagation, {word}", best))
    return chosen


def _seconds(row: Row) -> float:
    return float(row["seconds"]["median"])


def network(content: Content) -> str:
    return f"{content['model']}, batch {content['batch']}, {content['precision']}"


def clock(content: Content) -> str:
    """What the seconds are, where they are not what a watch shows."""
    return "" if content.get("clock", "seconds") == "seconds" else f", {content['clock']}"


def headline(content: Content) -> list[str]:
    """One step of one network, beside its opponents."""
    rows = contenders(content)
    held, facts = rows[0][1]["parameter"] + rows[0][1]["state"], content["machine"]
    return [f"One training step of `{content['model']}`, batch {content['batch']}, "
            f"{content['precision']}, {content['optimizer']}:", "",
            *table(["", "peak memory", "time"], (
                [f"**{name}**" if name == "ffengine" else name,
                 *(f"**{cell}**" if name == "ffengine" else cell for cell in (
                     f"{mega(row['peak_bytes'])} MB", f"{_seconds(row):.2f} s"))]
                for name, row in rows)), "",
            f"{mega(held)} MB of each are parameters and optimizer states. Medians of "
            f"{min(len(row['rounds']) for _, row in rows)} interleaved rounds{clock(content)}; "
            f"{facts['date']}, {facts['gpu'] or facts['cpu']} ({machine_name(content)}), torch "
            f"{facts['torch']}, commit {facts['commit']}."]


def families(contents: Iterable[Content]) -> list[str]:
    """A row a family: ours between backpropagation's extremes, each family's best table."""
    found = list(contents)

    def best(family: Family) -> Content | None:
        mine = [c for c in found if c["model"] in family.models and any(
            r["kind"] == "bp" and not r["failed"] for r in c["rows"])]
        return min(mine, default=None, key=lambda c: (
            family.models.index(c["model"]), c["precision"] != "fp32", -c["batch"]))

    def cells(family: Family) -> list[str]:
        content = best(family)
        if content is None:
            return [family.title, family.turn, f"`{family.models[0]}`", "to be measured anew", "",
                    ""]
        rows = [r for r in content["rows"] if not r["failed"]]
        ours = next(r for r in rows if r["kind"] == "ffengine")
        theirs = [r for r in rows if r["kind"] == "bp"]
        quick, lean = min(theirs, key=_seconds), min(theirs, key=lambda r: r["peak_bytes"])
        return [family.title, family.turn, f"`{content['model']}`, batch {content['batch']}, "
                f"{content['precision']}", *(f"{mega(r['peak_bytes'])} MB, {_seconds(r):.3f} s"
                                             for r in (ours, quick, lean))]

    return table(["family", "whose turn", "network", "ours", "fastest backpropagation",
                  "leanest backpropagation"], map(cells, FAMILIES), words=3)


def reproduced(contents: Iterable[Content]) -> list[str]:
    """One line a paper, with the row that most seeds stand behind."""
    lines = []
    found = report.once([row for content in contents for row in rows_in(content)])
    for paper, rows in tables.by_paper(found).items():
        row = max(rows, key=lambda r: len(r["seeds"]))
        lines.append(
            f"- {PAPERS.get(paper, paper)}: {report.summary(rows)} `{row['recipe']}`: "
            f"{tables.percent(row['mean'], row['sd'])} % over {len(row['seeds'])} "
            f"seed{'s' if len(row['seeds']) > 1 else ''}, in the paper "
            f"{tables.percent(row['paper_mean'], row['paper_sd'])} %.")
    return lines


def fair_summary(contents: Iterable[Content]) -> list[str]:
    """A line a fair table: our default and smallest plans between backpropagation's extremes."""
    def at(row: Content) -> str:
        return f"{mega(row['peak_bytes'])} MB, {row['seconds']['median']:.3f} s"

    def line(content: Content) -> list[str]:
        timed = [r for r in content["rows"] if not r.get("failed") and r.get("seconds")]
        ours = [r for r in timed if r["kind"] == "ffengine"]
        theirs = [r for r in timed if r["kind"] == "bp"]
        gated = [r for r in theirs if r.get("gated")]
        quick = min(theirs, key=lambda r: r["seconds"]["median"])
        lean = min(theirs, key=lambda r: r["peak_bytes"])
        said = f"{sum(r['passes'] for r in gated)} of {len(gated)}" if gated else "not gated"
        machine = content["machine"]
        where = machine["gpu"] or f"{machine['cpu']} ({machine['isa']})"
        return [content["model"], str(content["batch"]), content["precision"],
                f"{where} × {machine['threads']}", at(ours[0]),
                at(min(ours, key=lambda r: r["peak_bytes"])), at(quick), at(lean), said]

    return table(["", "batch", "precision", "on × threads", "ours, default plan",
                  "ours, smallest plan", "fastest BP", "leanest BP", "gated BP rows passed"],
                 (line(c) for c in contents if any(r["kind"] == "bp" and not r.get("failed")
                                                   for r in c["rows"])))
