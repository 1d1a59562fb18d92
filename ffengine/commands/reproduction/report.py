"""docs/reproduction.md: every measured row beside its paper's, with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ffengine.commands.reproduction import plots
from ffengine.commands.reproduction.results import NAME, Results
from ffengine.commands.reproduction.tables import HEAD, Row, by_paper, cells, in_errors
from ffengine.engine.run.checkpoint import write_atomically

PAGE = Path("docs") / "reproduction.md"
HELD = Path("bench") / "results"
#: Columns of HEAD that the page leaves to the file.
LEFT_OUT = ("recipe", "seconds", "peak")


def write(path: Path | None) -> tuple[str, dict[str, list[Row]]]:
    """The page below the working folder, and its pictures; of one results file, or of those held.

    Raises:
        ValueError: no results file, or a damaged one.
        ImportError: no matplotlib.
    """
    rows = measured([path] if path is not None else held())
    for paper, mine in by_paper(rows).items():
        plots.rows_beside(PAGE.with_name(picture(paper)), mine)
    write_atomically(PAGE, page(rows).encode())
    papers = len(by_paper(rows))
    return f"{counted(len(rows), 'row')} of {counted(papers, 'paper')} in {PAGE}", {"rows": rows}


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def held(root: Path = Path()) -> list[Path]:
    """The results files of a checkout; elsewhere that of trainings in the usual folder."""
    return sorted((root / HELD).rglob(NAME)) or [root / "runs" / NAME]


def measured(paths: Sequence[Path]) -> list[Row]:
    """The rows of results files that trained on the papers' data, by paper and recipe; of one that
    several files have, the one of most seeds."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"[cli] --report expected {HELD / '*' / NAME} or {path}, which "
                             "`ffengine reproduce RECIPE` makes; --out names another folder")
    rows = [row for path in paths for row in Results(path).read()["rows"]
            if row["difference"] is not None]
    if not rows:
        raise ValueError("[cli] --report expected a row that trained on its paper's data, got none "
                         f"in {', '.join(map(str, paths))}")
    return sorted(once(rows), key=lambda row: (
        row["paper"], row["table"], row["recipe"], row["epochs"]))


def once(rows: Sequence[Row]) -> list[Row]:
    """Of each recipe and number of epochs the row of most seeds, the last of several."""
    kept: dict[tuple[str, int], Row] = {}
    for row in rows:
        place = row["recipe"], row["epochs"]
        if place not in kept or len(row["seeds"]) >= len(kept[place]["seeds"]):
            kept[place] = row
    return list(kept.values())


def picture(paper: str) -> str:
    return f"reproduction-{paper}.png"


def page(rows: Sequence[Row]) -> str:
    """The whole page, of `measured` rows."""
    lines = [
        "# Reproduced", "",
        "Written by `ffengine reproduce --report` from the results files under `bench/results`, "
        "each row trained by `ffengine reproduce RECIPE`.", "",
        "Accuracy in percent, mean ± standard deviation over seeds. `in s.e.` is the difference in "
        "joint standard errors, √(sd²/n of the paper + sd²/n of ours); where one side tells no "
        "deviation, the other's stands for both. Epochs are those done of those the paper asks "
        "for, a layer's where layers train in turn. A row is below its paper by more than 0.5 "
        "points or 2 s.e., above it by more than 0.5 points.", ""]
    for paper, mine in by_paper(rows).items():
        lines += [f"## {paper}", "", summary(mine), "", *markdown(mine), "",
                  f"![{paper}: paper against ours]({picture(paper)})", ""]
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """One line of a paper."""
    below = [row for row in rows if row["difference"] < -0.5 or (in_errors(row) or 0) < -2]
    above = [row for row in rows if row["difference"] > 0.5 and row not in below]
    level = len(rows) - len(below) - len(above)
    named = f": {', '.join(row['recipe'] for row in below)}" if below else ""
    return (f"{counted(len(rows), 'row')}: {level} level with the paper, {len(above)} above it, "
            f"{len(below)} below{named}.")


def markdown(rows: Sequence[Row]) -> list[str]:
    """Columns of HEAD, after the recipe its place in the paper."""
    kept = [i for i, name in enumerate(HEAD) if name not in LEFT_OUT]
    lines = ["| recipe | row | " + " | ".join(HEAD[i] for i in kept) + " |",
             "|---|---|" + "".join("---|" if HEAD[i] in ("data", "machine") else "--:|"
                                   for i in kept)]
    for row in rows:
        told = cells(row)
        place = f"{row['table']}: {row['row']}"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (
            f"`{row['recipe']}`", place, *(told[i] for i in kept))) + " |")
    return lines
