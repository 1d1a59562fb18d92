"""What `make bench-gate` runs: this tree beside its baseline, and beside an older build.

Exact counters are held to the committed baseline. What that is of another machine, or another
compiler, is counted anew in the commit that wrote the baseline, here: its numbers are this
machine's then. Time is a ratio of two builds, this tree's and the merge base's with main.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ffengine
from bench import base, counters, results, timing
from bench import start as start_up
from bench.comparing import RENEW, differences, incomparable, same_version

Part = dict[str, Any]


@dataclass
class Verdict:
    """What the gate has found so far.

    compared: what was compared, with what. skipped: what was not, and why. undecided: cases whose
    time says neither, and all of them where the history here ends at this commit. red: a line for
    each thing that moved, "<part>: ...".
    """

    compared: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    red: list[str] = field(default_factory=list)

    def skip(self, what: str) -> None:
        print(f"skipped {what}", flush=True)
        self.skipped.append(what)

    @property
    def word(self) -> str:
        """fail, pass, or inconclusive: nothing is known to have moved, but not all was decided."""
        return "fail" if self.red else "inconclusive" if self.skipped or self.undecided else "pass"

    def lines(self, strict: bool) -> list[str]:
        """The last lines: the verdict with all that it rests on, then what is red."""
        def listed(values: list[str]) -> str:
            return "; ".join(values) or "nothing"

        red = [*self.red, *(f"{what}: not compared" for what in self.skipped if strict)]
        word = "fail" if red else self.word
        moved = "" if self.red else "nothing moved; "
        return [f"bench-gate: {word}: {moved}compared {listed(self.compared)}; not compared "
                f"{listed(self.skipped)}; undecided {listed(self.undecided)}",
                *(f"RED {text}" for text in red)]

    def markdown(self, strict: bool) -> str:
        """The same as a page, the verdict first."""
        first, *red = self.lines(strict)
        rows = [("moved", red), ("not compared", self.skipped), ("undecided", self.undecided),
                ("compared", self.compared)]
        return "\n".join([f"# {first.split(':')[1].strip()}", *(
            "\n".join([f"\n## {title}\n", *(f"- {text}" for text in texts)])
            for title, texts in rows if texts)]) + "\n"


def gate_counters(path: Path, parts: dict[str, Part], verdict: Verdict,
                  device: str = "cpu") -> None:
    """Hold this tree's counters to the committed baseline, or to those of the commit that wrote it,
    counted here."""
    old = results.read(path, kind="counters")
    same_version(path, old, ffengine.__version__)
    elsewhere = [name for name in {**old["parts"], **parts}
                 if incomparable(old["parts"].get(name), parts.get(name)) is not None]
    for name in parts:
        if name not in elsewhere:
            compare_part(name, old["parts"][name], parts[name], path.name, verdict)
    verdict.red += counters.failures(parts)
    for name, here, there, whose in counted_here(elsewhere, parts, device, verdict):
        reason = incomparable(there, here)
        if "absent" in here and "absent" in there:
            print(f"{name}: {here['absent']}, in {whose} too", flush=True)
        elif reason is not None:
            verdict.skip(f"{name}: {reason.replace('the baseline', whose)}")
        else:
            compare_part(name, there, here, whose, verdict)


def compare_part(name: str, old: Part, new: Part, whose: str, verdict: Verdict) -> None:
    """Every row of a part. One that the older build could not run proves nothing."""
    lost = [row for row, values in old["rows"].items() if "failed" in values]
    for row in lost:
        verdict.skip(f"{name}: {row}: {whose} could not run it: {old['rows'][row]['failed']}")
    rows = [{row: v for row, v in part["rows"].items() if row not in lost} for part in (old, new)]
    moved = list(differences({"rows": rows[0]}, {"rows": rows[1]}))
    print(f"{name}: {len(rows[1])} rows, {len(moved)} differences from {whose}", flush=True)
    verdict.compared.append(f"{name} with {whose}")
    unit = " bytes" if name == "memory" else ""
    verdict.red += [f"{name}: {text}{unit}" for text in moved]


def counted_here(names: list[str], parts: dict[str, Part], device: str, verdict: Verdict,
                 ) -> Iterable[tuple[str, Part, Part, str]]:
    """(part, this tree's, the baseline's commit's on this machine, whose) of the parts of which the
    committed baseline says nothing here."""
    nowhere: Part = {"absent": "this run has no such part"}
    if not names:
        return
    try:
        ref = base.baseline_ref()
        cuda = "nvcc" in names and "absent" not in parts.get("nvcc", nowhere)
        tree, commit = base.tree(ref, cuda=cuda)
        found = count_in(tree, names, device)
    except base.NoBase as reason:
        for name in names:
            verdict.skip(f"{name}: the committed baseline is of another machine or compiler, and "
                         f"its commit cannot be counted here: {reason}; {RENEW}")
        return
    for name in names:
        yield (name, parts.get(name, nowhere), found.get(name, nowhere),
               f"commit {commit}, counted here")


def count_in(tree: Path, names: list[str], device: str) -> dict[str, Part]:
    """Parts of another tree's counters, by its own hand.

    Raises:
        NoBase: it does not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counters.json"
        done = subprocess.run(
            [sys.executable, "-m", "bench.counters", "--json", str(out), "--parts",
             ",".join(names), "--device", device], cwd=tree, capture_output=True, text=True,
            check=False, env=counters.quiet_environment(tree))
        if not out.exists():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise base.NoBase(f"it does not count: {' '.join(last)}")
        return dict(json.loads(out.read_text())["parts"])


def gate_timing(ref: str | None, verdict: Verdict, only: list[str] | None = None,
                ) -> list[timing.Row]:
    """Time this tree against another; a base that cannot be had is skipped."""
    try:
        tree, commit = base.tree(ref)
        rows = timing.compare(tree, base.ROOT, only)
    except base.Shallow as reason:
        print(f"undecided timing: {reason}")
        verdict.undecided.append(f"timing: {reason}")
        return []
    except base.NoBase as reason:
        verdict.skip(f"timing: {reason}")
        return []
    except timing.WorkerLost as lost:
        if lost.side == "head":
            verdict.red.append(f"timing: {lost}")
        else:
            verdict.skip(f"timing: {lost}")
        return []
    timed = sum("ratio" in row for row in rows)
    print(f"timing: {timed} of {len(rows)} cases timed, against {commit}")
    for row in rows:
        print(timing.line(row), flush=True)
    if timed:
        verdict.compared.append(f"timing of {timed} of {len(rows)} cases with commit {commit}")
    else:
        verdict.skip("timing: no case was timed")
    for row in rows:
        if row["status"] in ("slower", "failed"):
            verdict.red.append(f"timing: {timing.line(row)}")
        elif row["status"] in ("untimed", "inconclusive"):
            verdict.undecided.append(f"timing: {timing.line(row)}")
    return rows


def gate_start(verdict: Verdict) -> None:
    """Hold what starting costs to its limits."""
    told = start_up.measure()
    print("\n".join(f"start: {line}" for line in start_up.lines(told)), flush=True)
    verdict.compared.append("starting with its limits")
    verdict.red += start_up.failures(told)


def gate(path: Path, ref: str | None, device: str, *, strict: bool = False,
         page: Path | None = None) -> int:
    """Counters, then time; the exit status."""
    verdict, start = Verdict(), time.perf_counter()
    print(f"baseline {path.name}")
    gate_counters(path, counters.collect(device=device), verdict, device)
    print(f"counters took {time.perf_counter() - start:.0f} s", flush=True)
    gate_start(verdict)
    start = time.perf_counter()
    gate_timing(ref, verdict)
    print(f"timing took {time.perf_counter() - start:.0f} s")
    if any("->" in text or ": new" in text or ": gone" in text for text in verdict.red):
        print(f"a counter that was meant to move: {RENEW}")
    if page is not None:
        page.write_text(verdict.markdown(strict))
    said = verdict.lines(strict)
    print("\n".join(said))
    return 1 if len(said) > 1 else 0
