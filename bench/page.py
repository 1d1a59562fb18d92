"""The results pages, from the JSON under bench/results and bench/baselines; never typed by hand.

    python -m bench.page                writes bench/RESULTS.md and a page a family beside the files
    python -m bench.page --readme       and fills the marked blocks of README.md and docs/
    python -m bench.page --list         names of the blocks

A block lies between <!-- results:NAME:begin --> and <!-- results:NAME:end -->; NAME is a file's
path under bench/results without its suffix, e.g. cpu/fair/deeperforward-resnet17-b32-fp32, or one
of fair-summary, headline, families, reproduced. A file that was edited by hand is refused: its
checksum does not fit. What bench.publishing leaves out is listed with the reason. Runs of
bench/gpu.sh are there too, their JSON lines by bench.gpu.pages; what was only rehearsed is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench import front, plots, results
from bench.gpu import pages as gpu_pages
from bench.markdown import table, where
from bench.publishing import Content, again, committed, left_out
from bench.sections import SECTIONS, machine_name, plain, title
from ffengine.engine.run.checkpoint import write_atomically

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE, README = HERE / "RESULTS.md", ROOT / "README.md"
RESULTS, BASELINES = HERE / "results", HERE / "baselines"
PICTURE = ROOT / "docs" / "headline.svg"
BLOCK = re.compile(r"<!-- results:(?P<name>[\w./-]+):begin -->\n.*?<!-- results:(?P=name):end -->",
                   re.DOTALL)
ORDER = ("fair", "fflib", "states-sweep", "states-curves", "devices", "digits", "variants",
         "reproduction", "local_pass", "linear_step", "batch_pass", "weight_update", "counters",
         "gate_repeats")
#: Page of a kind that is not a model's, and the pages' titles.
FAMILY = {"digits": "accuracy", "variants": "accuracy", "reproduction": "accuracy",
          "local_pass": "ops", "linear_step": "ops", "batch_pass": "ops", "weight_update": "ops",
          "states-sweep": "states", "states-curves": "states", "devices": "devices",
          "counters": "gate", "gate_repeats": "gate", "fflib": "fflib"}
PAGES = {**{name: f"{paper}: a training step beside its opponents"
            for name, paper in front.PAPERS.items()},
         "accuracy": "Accuracy: the papers' numbers, and every model on the digits",
         "ops": "Ops: each kernel beside the chain that it replaces",
         "states": "Optimizer states in fewer bits",
         "devices": "Training steps against a device's own rates",
         "gate": "The gate that holds every change", "other": "Other measurements"}
MEANING = ("MB = 10⁶ bytes; medians, with smallest and largest in brackets; `metered` is the peak "
           "of live bytes of a step.")


@dataclass(frozen=True)
class Section:
    """One result: its name among the blocks, its page, a heading, and what it says.

    missing: why its numbers are left out, if they are. origin: date, hardware and commit.
    """

    name: str
    family: str
    title: str
    lines: list[str]
    origin: str = ""
    missing: str | None = None
    picture: Path | None = None
    content: Content = field(default_factory=dict)

    def body(self, folder: Path) -> list[str]:
        """What stands in a file of this folder."""
        if self.missing is not None:
            return [f"To be measured anew, and left out until then: {self.missing}. Last measured "
                    f"{self.origin}"]
        lines = [*self.lines, *(["", self.origin] if self.origin else [])]
        if self.picture is not None:
            seen = Path(os.path.relpath(self.picture, folder)).as_posix()
            lines += ["", f"![{self.title}]({seen})"]
        return lines


def sections(folder: Path = RESULTS, baselines: Path = BASELINES) -> list[Section]:
    """Every result file, in the order of the pages; ValueError for what was edited by hand."""
    files = [(path.relative_to(folder), path) for path in sorted(folder.rglob("*.json"))]
    files += [(Path("baselines") / path.name, path) for path in sorted(baselines.glob("*.json"))]
    made = []
    for place, path in files:
        content = committed(results.read(path))
        kind, name = content["kind"], place.with_suffix("").as_posix()
        lines = SECTIONS.get(kind, plain)(content)
        if content.get("omitted"):
            lines = [*lines, "", f"Left out: {content['omitted']} trainings whose tree had "
                     "uncommitted changes."]
        picture = path.with_suffix(".png")
        family = content["model"].partition("/")[0] if kind == "fair" else FAMILY.get(kind, "other")
        rank = ORDER.index(kind) if kind in ORDER else len(ORDER)
        made.append((rank, kind, name, Section(
            name, family, title(content, name), lines,
            where(content["machine"], content["version"]), left_out(content),
            picture if picture.exists() else None, content)))
    gpu = [Section(name, f"gpu-{name.partition('/')[0]}", title(content, name), lines, origin,
                   left_out(content), content=content)
           for name, lines, origin, content in gpu_pages.blocks(folder)]
    return [*gpu, *(section for *_, section in sorted(made, key=lambda m: m[:3]))]


def fair_tables(found: list[Section]) -> list[Content]:
    """Those that are published."""
    return [s.content for s in found if s.missing is None and s.content["kind"] == "fair"]


def summaries(found: list[Section]) -> list[Section]:
    """Blocks made of several results: the fair tables in one, and README.md's own."""
    fair = fair_tables(found)
    compared = sorted((c for c in fair if all("passes" in r for r in c["rows"] if r.get("gated"))),
                      key=lambda c: (c["model"], c["batch"], c["precision"]))
    first = front.headline_of(fair)
    made = {"fair-summary": front.fair_summary(compared) if compared else [],
            "headline": front.headline(first) if first is not None else [],
            "families": front.families(fair) if fair else [],
            "reproduced": front.reproduced(s.content for s in found if s.missing is None
                                           and s.content["kind"] == "reproduction")}
    return [Section(name, "", name, lines) for name, lines in made.items() if lines]


def blocks(folder: Path = RESULTS, baselines: Path = BASELINES,
           at: Path = HERE) -> dict[str, list[str]]:
    """Lines of every block by name, as they stand in a file of the folder `at`."""
    found = sections(folder, baselines)
    return {s.name: s.body(at) for s in [*summaries(found), *found]}


def pages(found: list[Section]) -> dict[Path, str]:
    """Every generated page's text: the contents, and one for each family that has a number."""
    shown: dict[str, list[Section]] = {}
    for section in found:
        if section.missing is None:
            shown.setdefault(section.family, []).append(section)
    names = sorted(shown, key=lambda f: (list(PAGES).index(f) if f in PAGES else -1, f))
    made = {PAGE: contents([(name, shown[name]) for name in names], found)}
    for name in names:
        path = RESULTS / f"{name}.md"
        lines = [f"# {heading(shown[name])}", "",
                 "Generated by `python -m bench.page` from the files named under the headings. "
                 f"{MEANING} [All results](../RESULTS.md)", ""]
        if any(section.content["kind"] == "fair" for section in shown[name]):
            lines += ["How these tables are made, and how to read them: "
                      "[Fair tables](../../docs/fair-tables.md).", ""]
        for section in shown[name]:
            lines += [f"## {section.title}", "", f"`{section.name}`", "",
                      *section.body(path.parent), ""]
        made[path] = "\n".join(lines).rstrip() + "\n"
    return made


def heading(mine: list[Section]) -> str:
    """The title of a family's page."""
    first = mine[0]
    return PAGES.get(first.family) or f"On {machine_name(first.content)}"


def contents(shown: list[tuple[str, list[Section]]], found: list[Section]) -> str:
    """bench/RESULTS.md: what there is and where, the fair tables in one, and what is left out."""
    lines = ["# Measured results", "",
             "Generated by `python -m bench.page` from the JSON files beside the pages, each with "
             f"the date, hardware and commit of its own run. {MEANING} A table is published with "
             "at least three timing rounds of every row of ours, measured from a commit; "
             "what falls short is [listed below](#to-be-measured-anew).", "", "## Contents", ""]
    for family, mine in shown:
        page = f"results/{family}.md"
        lines += [f"- [{heading(mine)}]({page})",
                  *(f"  - [{s.title}]({page}#{anchor(s.title)})" for s in mine)]
    for section in summaries(found):
        if section.name == "fair-summary":
            lines += ["", "## Fair tables in one", "", *section.lines]
    missing = [[f"`{s.name}`", f"{s.missing} ({s.origin.partition(';')[0]})",
                f"`{command}`" if (command := again(s.content)) else ""]
               for s in found if s.missing is not None]
    lines += ["", "## To be measured anew", ""]
    lines += table(["result", "why it is left out", "command"], missing, words=3) if missing else [
        "Nothing."]
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def documents() -> list[Path]:
    """The files whose marked blocks are filled."""
    return [README, *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str, found: dict[str, list[str]]) -> str:
    """The text with every marked block as it is measured now; ValueError for an unknown name."""
    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            raise ValueError(f"[page] expected a block named by a result file, got {name!r}; "
                             f"known: {', '.join(found)}")
        begin, end = (f"<!-- results:{name}:{edge} -->" for edge in ("begin", "end"))
        return "\n".join([begin, *found[name], end])

    return BLOCK.sub(replaced, text)


def write(found: list[Section], readme: bool) -> int:
    """Every page, and with `readme` the documents' blocks and picture; how many files."""
    made = pages(found)
    if readme:
        for path in documents():
            text = path.read_text()
            if BLOCK.search(text):
                made[path] = filled(text, blocks(at=path.parent))
        first = front.headline_of(fair_tables(found))
        if first is not None:
            plots.headline(PICTURE, front.network(first), front.contenders(first))
    for path, text in made.items():
        write_atomically(path, text.encode())
    for old in set(RESULTS.glob("*.md")) - set(made):
        old.unlink()
    return len(made)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.list:
            print("\n".join(blocks()))
            return 0
        found = sections()
        count = write(found, args.readme)
    except ValueError as bad:
        print(f"bench.page: {bad}", file=sys.stderr)
        return 2
    kept = sum(s.missing is None for s in found)
    print(f"wrote {count} files: {kept} of {len(found)} results, the others to be measured anew")
    return 0


if __name__ == "__main__":
    sys.exit(main())
