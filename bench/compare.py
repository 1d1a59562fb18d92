"""The regression gate: counters to the byte, time as a ratio of two builds.

    python -m bench.compare BASE.json HEAD.json [--renew]    two files of bench.counters
    python -m bench.compare --gate [--base REF]              what `make bench-gate` runs
    python -m bench.compare --renew                          what `make bench-baseline` runs
    python -m bench.compare --timing-only [--repeat 20] [--base REF] [--json FILE]

Any counter that differs is a difference, better or worse: the baseline is renewed with the change
that moved it, and the commit shows by how much. Exit status: 0 nothing moved; 1 a difference, a
slower case or a failing row; 2 refused: not comparable, with the reason. Under --gate a part whose
compiler or machine is not the baseline's is a line that begins with "skipped", and not red.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ffengine
from bench import base, counters, results, timing
from bench import start as start_up

BASELINES = Path(__file__).parent / "baselines"
RENEW = "renew it with `make bench-baseline`"


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """A line for each row or counter of a part that moved, came or went."""
    for name in {**old["rows"], **new["rows"]}:
        before, after = old["rows"].get(name), new["rows"].get(name)
        if before is None or after is None:
            yield f"{name}: {'new, not in the baseline' if before is None else 'gone'}"
            continue
        for counter in {**before, **after}:
            if before.get(counter) != after.get(counter):
                yield (f"{name}: {counter} {before.get(counter, 'none')} -> "
                       f"{after.get(counter, 'none')}")


def incomparable(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str | None:
    """Why two parts cannot be compared; None if they can."""
    for part, whose in ((old, "the baseline"), (new, "this run")):
        if part is None:
            return f"{whose} has no such part"
        if "absent" in part:
            return f"{whose}: {part['absent']}"
    assert old is not None and new is not None
    for need in {**old["needs"], **new["needs"]}:
        if old["needs"].get(need) != new["needs"].get(need):
            return (f"the baseline is of {need} {old['needs'].get(need)}, this is "
                    f"{new['needs'].get(need)}")
    return None


def same_version(path: Path, content: dict[str, Any], version: str) -> None:
    if content["version"] != version:
        raise ValueError(f"[compare] {path} is of ffengine {content['version']}, expected "
                         f"{version}: not compared; {RENEW}")


def compare_files(old_path: Path, new_path: Path) -> list[str]:
    """Every difference of two counter files.

    Raises:
        ValueError: edited, another kind, format, version, machine class, compiler: not compared.
    """
    old = results.read(old_path, kind="counters")
    new = results.read(new_path, kind="counters", machine_class=old["machine"]["class"])
    same_version(old_path, old, new["version"])
    found: list[str] = []
    for name in {**old["parts"], **new["parts"]}:
        before, after = old["parts"].get(name), new["parts"].get(name)
        reason = incomparable(before, after)
        if reason is not None and not ("absent" in (before or {}) and "absent" in (after or {})):
            raise ValueError(f"[compare] {name}: {reason}: not compared; {RENEW}")
        if reason is None:
            found += [f"{name}: {text}" for text in differences(before, after)]
    return found + counters.failures(new["parts"])


def gate_counters(path: Path, parts: dict[str, Any]) -> list[str]:
    """Differences of this tree from the committed baseline; what cannot be compared is printed."""
    old = results.read(path, kind="counters")
    same_version(path, old, ffengine.__version__)
    found = []
    for name in {**old["parts"], **parts}:
        reason = incomparable(old["parts"].get(name), parts.get(name))
        if reason is not None:
            print(f"skipped {name}: {reason}; {RENEW} there")
            continue
        moved = list(differences(old["parts"][name], parts[name]))
        print(f"{name}: {len(parts[name]['rows'])} rows, {len(moved)} differences", flush=True)
        found += [f"{name}: {text}" for text in moved]
    return found + counters.failures(parts)


def own_baseline(device: str = "cpu") -> Path:
    """Where this machine's baseline is, or would be: by its GPU's name, or its processor's."""
    kind = torch.cuda.get_device_name() if device == "cuda" else counters.processor()
    return BASELINES / (re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json")


def baseline_path(device: str = "cpu") -> Path:
    """This machine's baseline; where it has none, another's, whose compilers may be the same: of
    the same type of device if there is one."""
    mine = own_baseline(device)
    others = sorted(BASELINES.glob("*.json"), key=lambda path: (
        results.read(path, kind="counters")["device"] != device, path))
    return others[0] if others and not mine.exists() else mine


def gate_timing(ref: str | None, only: list[str] | None = None,
                ) -> tuple[list[timing.Row], list[str]]:
    """(rows, lines of those that are red); a base that cannot be had is a skipped line."""
    try:
        tree, commit = base.tree(ref)
        rows = timing.compare(tree, base.ROOT, only)
    except base.NoBase as reason:
        print(f"skipped timing: {reason}")
        return [], []
    except timing.WorkerLost as lost:
        if lost.side == "head":
            return [], [f"timing: {lost}"]
        print(f"skipped timing: {lost}")
        return [], []
    timed = sum("ratio" in row for row in rows)
    print(f"timing: {timed} of {len(rows)} cases timed, against {commit}")
    for row in rows:
        print(timing.line(row), flush=True)
    return rows, [timing.line(row) for row in rows if row["status"] in ("slower", "failed")]


def renew(device: str) -> int:
    """Measure this machine's baseline anew and say what moved; another machine's stays as it is."""
    path, old = own_baseline(device), baseline_path(device)
    parts = counters.collect(device=device)
    failed = counters.failures(parts)
    if failed:
        print("\n".join(failed))
        return 1
    try:
        print("\n".join(gate_counters(old, parts) if old.exists() else ["the first baseline"]))
    except ValueError as other:  # of another version or format: nothing to compare with
        print(other)
    counters.write(path, parts, device)
    print(f"wrote {path}")
    return 0


def gate(ref: str | None, device: str) -> int:
    """Counters, then time; every red line again at the end."""
    path, start = baseline_path(device), time.perf_counter()
    if not path.exists():
        raise ValueError(f"[compare] expected a baseline in {BASELINES}, got none; {RENEW}")
    print(f"baseline {path.name}")
    red = gate_counters(path, counters.collect(device=device))
    print(f"counters took {time.perf_counter() - start:.0f} s", flush=True)
    told = start_up.measure()
    print("\n".join(f"start, {line}" for line in start_up.lines(told)), flush=True)
    red += start_up.failures(told)
    start = time.perf_counter()
    red += gate_timing(ref)[1]
    print(f"timing took {time.perf_counter() - start:.0f} s")
    print("\n".join(f"RED {text}" for text in red) if red else "bench-gate: nothing moved")
    if any("->" in text or ": new" in text or ": gone" in text for text in red):
        print(f"a counter that was meant to move: {RENEW}")
    return 1 if red else 0


def repeat(ref: str | None, times: int, path: Path | None) -> int:
    """The timing part over and over; how often it cried."""
    runs: list[dict[str, Any]] = []
    for i in range(times):
        start = time.perf_counter()
        rows, red = gate_timing(ref)
        runs.append({"seconds": time.perf_counter() - start, "alarms": red,
                     "first_looks_over": sum("second_look" in row for row in rows),
                     "rows": rows})
        print(f"run {i + 1} of {times}: {len(red)} alarms, {runs[-1]['seconds']:.0f} s",
              flush=True)
    alarms = sum(bool(run["alarms"]) for run in runs)
    print(f"{alarms} of {times} runs cried; longest {max(r['seconds'] for r in runs):.0f} s")
    if path is not None:
        results.write(path, "gate_repeats", {"runs": runs, "alarms": alarms})
    return 1 if alarms else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="BASE.json HEAD.json")
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--renew", action="store_true")
    parser.add_argument("--timing-only", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--base", help="commit to time against; default: $BENCH_BASE, HEAD or its "
                        "first parent")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="where --timing-only writes its rows")
    args = parser.parse_args(argv)
    if len(args.files) not in (0, 2) or not (args.files or args.gate or args.renew
                                             or args.timing_only):
        parser.error("expected BASE.json HEAD.json, --gate, --renew or --timing-only")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.timing_only:
            return repeat(args.base, args.repeat, args.json)
        if args.gate:
            return gate(args.base, args.device)
        if not args.files:
            return renew(args.device)
        found = compare_files(*args.files)
        print("\n".join(found) if found else "nothing moved")
        if args.renew:
            args.files[0].write_bytes(args.files[1].read_bytes())
            return 0
        return 1 if found else 0
    except ValueError as refused:
        print(f"bench.compare: {refused}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
