"""The results page, from the JSON under bench/results and bench/baselines; never typed by hand.

    python -m bench.page                writes bench/RESULTS.md
    python -m bench.page --readme       and fills the marked blocks of README.md
    python -m bench.page --list         names of the blocks

A block of README.md lies between <!-- results:NAME:begin --> and <!-- results:NAME:end -->; NAME is
a file's path under bench/results without its suffix, e.g. cpu/fair/deeperforward-resnet17-b32-fp32.
A file that was edited by hand is refused: its checksum does not fit. Runs of bench/gpu.sh are there
too, their JSON lines by bench.gpu.pages; what was only rehearsed is refused.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import results, states, variants
from bench.gpu import pages
from bench.markdown import brief, mega, quantity, table, where
from ffengine.commands.reproduction import tables
from ffengine.commands.reproduction.results import rows_in
from ffengine.engine.run.checkpoint import write_atomically

HERE = Path(__file__).resolve().parent
PAGE, README = HERE / "RESULTS.md", HERE.parent / "README.md"
RESULTS, BASELINES = HERE / "results", HERE / "baselines"
BLOCK = re.compile(r"<!-- results:(?P<name>[\w./-]+):begin -->\n.*?<!-- results:(?P=name):end -->",
                   re.DOTALL)
ORDER = ("fair", "fflib", "states-sweep", "states-curves", "devices", "digits", "variants",
         "local_pass", "linear_step", "batch_pass", "weight_update", "counters",
         "gate_repeats")

Content = dict[str, Any]


def fair(content: Content) -> list[str]:
    def row(r: Content) -> list[str]:
        mark = "**" if r["kind"] == "ffengine" else ""
        name = f"{'★ ' if r.get('front') else ''}{mark}{r['name']}{mark}"
        if r.get("failed"):
            return [name, *[""] * 6, f"failed: {r['failed']}"]
        beaten = {True: "dominated", False: "leaner" if r.get("leaner") else "no"}
        return [name, mega(r.get("planned_bytes")), mega(r["peak_bytes"]),
                mega(r["allocated_bytes"]), mega(r["working_bytes"]), quantity(r.get("seconds")),
                quantity(r.get("images_per_second"), digits=1),
                "; ".join(filter(None, (
                    beaten[r["dominated"]] if "dominated" in r else "",
                    "not gated" if r["kind"] == "bp" and r.get("gated") is False else "",
                    r.get("note"))))]

    floor, error = content["floor_seconds"], content["gradient_error"]
    return [f"{content['model']}, batch {content['batch']}, {content['precision']}, "
            f"{content['optimizer']}; gradients within {error:.1e} of fp64"
            + (f"; {content['step']}" if "step" in content else "")
            + (f"; {content['clock']}" if content.get("clock", "seconds") != "seconds" else "")
            + (f". Floor by copy and product rates: {floor:.4f} s" if floor else "") + ".", "",
            *table(["★ on the Pareto front", "planned MB", "metered MB", "allocated MB",
                    "working MB", "s/step (min–max)", "images/s (min–max)", "beaten by ours"],
                   map(row, content["rows"]))]


def fair_summary(contents: list[Content]) -> list[str]:
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


def fflib(content: Content) -> list[str]:
    step = content["step"]
    said = f"A training step of FFNN 784-2000-2000, batch {content['batch']}: " + ", ".join(
        f"{name} {quantity(s, 1e3, 1)} ms" for name, s in step.items())
    gain = f"; {content['gain']:.2f} × the authors' speed" if "gain" in content else ""
    return [said + gain + ". Prediction, all labels in one pass against one forward a label:", "",
            *table(["images", "batched, ms", "one by one, ms", "gain", "extra MB"], (
                [str(r["images"]), quantity(r["batched"], 1e3, 2),
                 quantity(r["one by one"], 1e3, 2), f"{r['gain']:.2f}", mega(r["extra_bytes"])]
                for r in content["prediction"]))]


def rates(content: Content) -> list[str]:
    """The device's own rates, and steps against the floor they give and what was predicted."""
    device = content["device"]
    figures = ", ".join(f"{name} {brief(figure['value'])}"
                        for name, figure in device["figures"].items() if "value" in figure)
    over = "; ".join(f"{p} {brief(s)}" for p, s in content["ratios"].items())
    return [f"{device.get('title', '')}: {figures}. Measured over floor: {over}.", "",
            *table(["", "batch", "precision", "floor, ms", "predicted, ms", "measured, ms",
                    "over floor", "planned MB", "metered MB"], (
                [r["model"], str(r["batch"]), r["precision"], f"{1e3 * r['floor_seconds']:.2f}",
                 f"{1e3 * r['expected_seconds']:.2f}", quantity(r["seconds"], 1e3, 2),
                 f"{r['ratio']:.2f}", mega(r["planned_bytes"]), mega(r["metered_bytes"])]
                for r in content["rows"]))]


def digits(content: Content) -> list[str]:
    means = content["means"]
    return [f"{content['model']} on the bundled digits, {content['epochs']} epochs; mean: ffengine "
            f"{100 * means['ffengine']:.2f} %, unfused {100 * means['unfused']:.2f} %.", "",
            *table(["seed", "ffengine, %", "unfused, %", "ffengine, s", "unfused, s"], (
                [str(r["seed"]), *(f"{100 * r[k]:.2f}" for k in ("ffengine", "unfused")),
                 *(f"{r[f'{k}_seconds']:.1f}" for k in ("ffengine", "unfused"))]
                for r in content["rows"]))]


def sweeps(content: Content) -> list[str]:
    """local_pass and batch_pass: layouts of rows, ours against eager."""
    asked = ", ".join(f"{k} {content[k]}" for k in ("batch", "precision", "dropout", "order")
                      if k in content)
    lines = [f"{asked}; ms."]
    for layout, made in content.items():
        if not isinstance(made, dict) or "rows" not in made:
            continue
        lines += ["", f"{layout}: ours {1e3 * made['ours']:.1f} ms in all, eager "
                  f"{1e3 * made['eager']:.1f}, × {made['speedup']:.1f}.", "",
                  *table(["shape", "ours", "eager", "speed-up", "GB/s"], (
                      ["×".join(map(str, r["shape"])) + (" pool" if r.get("pools") else ""),
                       quantity(r["ours"], 1e3, 2), quantity(r["eager"], 1e3, 2),
                       f"{r['speedup']:.1f}", f"{r['gb_per_s']:.1f}"] for r in made["rows"]))]
    return lines


def dense(content: Content) -> list[str]:
    rows, features, out = content["shape"]
    return [f"{rows} × {features} → {out}, {content['dtype']}, tiles of {content['tile_rows']} "
            f"rows; {mega(content['bytes_moved'])} MB must move.", "",
            *table(["", "ms", "ours is faster", "MB beside input, weights, states"], (
                [name, quantity(s, 1e3, 1), f"{s['ours_is_faster']:.2f}", mega(s["working_bytes"])]
                for name, s in content["sides"].items()))]


def counter_parts(content: Content) -> list[str]:
    """What the gate holds every change to: how many rows, of what, and the totals."""
    def row(name: str, part: Content) -> list[str]:
        if "absent" in part:
            return [name, "", "", part["absent"]]
        totals: dict[str, int] = {}
        for counters in part["rows"].values():
            for counter, value in counters.items():
                if isinstance(value, int):
                    totals[counter] = totals.get(counter, 0) + value
        return [name, ", ".join(f"{k} {v}" for k, v in part["needs"].items()),
                str(len(part["rows"])), ", ".join(f"{k} {v:,}" for k, v in totals.items())]

    return ["The regression gate's baseline; every counter at 0 %. Sums over the rows:", "",
            *table(["part", "of", "rows", "sums"],
                   (row(*part) for part in content["parts"].items()))]


def repeats(content: Content) -> list[str]:
    runs = content["runs"]
    seconds = sorted(r["seconds"] for r in runs)
    cases = [row for r in runs for row in r["rows"]]
    looks = sum("ratio" in row for row in cases)
    over = sum(r["first_looks_over"] for r in runs)
    worst = max((row["ratio"] for row in cases if "ratio" in row), default=0.0)
    return [f"The gate's timing part, {len(runs)} times over: **{content['alarms']} alarms**; "
            f"{looks} of {len(cases)} cases timed, {over} first looks over their threshold, "
            f"largest ratio {worst:.3f}; {seconds[0]:.0f} to {seconds[-1]:.0f} s a run."]


def state_curves(content: Content) -> list[str]:
    curves = content["curves"]["fp32"]
    return [f"{content['model']}, batch {content['batch']}, {content['precision']}, "
            f"{len(curves)} seeds, {len(curves[0])} steps on class prototypes plus noise. Training "
            f"with optimizer states in", "", *(f"- {line}" for line in states.said(content))]


def reproduction(content: Content) -> list[str]:
    return ["The papers' numbers beside ours; `docs/reproduction.md` has them with pictures.", "",
            *table(list(tables.HEAD), map(tables.cells, rows_in(content)))]


def plain(content: Content) -> list[str]:
    """Any other file: its values, and its rows where it has some."""
    skipped = ("kind", "format", "version", "machine", "checksum")
    values = {k: v for k, v in content.items() if k not in skipped}
    rows = values.pop("rows", None)
    if isinstance(rows, dict) and all(isinstance(r, dict) for r in rows.values()):
        rows = [{"row": name, **r} for name, r in rows.items()]
    lines = [f"- {k}: {brief(v)}" for k, v in values.items()]
    if isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows):
        head = list(dict.fromkeys(k for r in rows for k in r))
        lines += ["", *table(head, ([brief(r.get(k)) for k in head] for r in rows))]
    return lines


SECTIONS: dict[str, Callable[[Content], list[str]]] = {
    "fair": fair, "fflib": fflib, "digits": digits, "local_pass": sweeps, "batch_pass": sweeps,
    "linear_step": dense, "counters": counter_parts,
    "gate_repeats": repeats, "devices": rates, "states-curves": state_curves,
    "reproduction": reproduction,
    "variants": lambda content: [variants.markdown(content["runs"])],
}


def blocks(folder: Path = RESULTS, baselines: Path = BASELINES) -> dict[str, list[str]]:
    """Lines of every result file, by its name; refuses what was edited by hand."""
    files = [(path.relative_to(folder), path) for path in sorted(folder.rglob("*.json"))]
    files += [(Path("baselines") / path.name, path) for path in sorted(baselines.glob("*.json"))]
    made, compared = [], []
    for name, path in files:
        content = results.read(path)
        kind = content["kind"]
        if kind == "fair" and all("passes" in r for r in content["rows"] if r.get("gated")):
            compared.append(content)
        lines = [*SECTIONS.get(kind, plain)(content), "",
                 where(content["machine"], content["version"])]
        picture = path.with_suffix(".png")
        if picture.exists() and picture.is_relative_to(HERE):
            lines += ["", f"![{name.stem}]({picture.relative_to(HERE).as_posix()})"]
        rank = ORDER.index(kind) if kind in ORDER else len(ORDER)
        made.append((rank, kind, name.with_suffix("").as_posix(), lines))
    if compared:
        compared.sort(key=lambda c: (c["model"], c["batch"], c["precision"]))
        made.append((-1, "", "fair-summary", fair_summary(compared)))
    return pages.blocks(folder) | {
        name: lines for _, _, name, lines in sorted(made, key=lambda m: m[:3])}


def page(found: dict[str, list[str]]) -> str:
    """The whole page."""
    lines = ["# Measured results", "",
             "Generated by `python -m bench.page` from the files named in the headings, each "
             "with the date, hardware and commit of its own run. MB = 10⁶ bytes; medians, with "
             "smallest and largest in brackets; `metered` is the peak of live bytes of a step.",
             ""]
    for name, block in found.items():
        lines += [f"## {name}", "", *block, ""]
    return "\n".join(lines).rstrip() + "\n"


def filled(text: str, found: dict[str, list[str]]) -> str:
    """README.md with every marked block as it is measured now; ValueError for an unknown name."""
    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            raise ValueError(f"[page] expected a block named by a result file, got {name!r}; "
                             f"known: {', '.join(found)}")
        begin, end = (f"<!-- results:{name}:{edge} -->" for edge in ("begin", "end"))
        return "\n".join([begin, *found[name], end])

    return BLOCK.sub(replaced, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    try:
        found = blocks()
        if args.list:
            print("\n".join(found))
            return 0
        write_atomically(PAGE, page(found).encode())
        if args.readme:
            write_atomically(README, filled(README.read_text(), found).encode())
    except ValueError as bad:
        print(f"bench.page: {bad}", file=sys.stderr)
        return 2
    print(f"wrote {PAGE.name}: {len(found)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
