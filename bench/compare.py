"""The regression gate: counters to the byte, time as a ratio of two builds.

    python -m bench.compare BASE.json HEAD.json [--renew]    two files of bench.counters
    python -m bench.compare --gate [--strict] [--base REF]   what `make bench-gate` runs
    python -m bench.compare --renew                          what `make bench-baseline` runs
    python -m bench.compare --timing-only [--repeat 20] [--base REF] [--json FILE]

Any counter that differs is a difference, better or worse: the baseline is renewed with the change
that moved it, and the commit shows by how much. Exit status: 0 nothing moved; 1 a difference, a
slower case or a failing row; 2 refused: not comparable, with the reason. Under --gate a part whose
compiler or machine is not the baseline's is counted in the commit that wrote the baseline, here;
where that cannot be had it is a line that begins with "skipped", and red with --strict alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ffengine
from bench import counters, gate, results
from bench.comparing import RENEW, differences, incomparable, same_version

BASELINES = Path(__file__).parent / "baselines"


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


def moved(path: Path, parts: dict[str, Any]) -> list[str]:
    """How these counters differ from a baseline's, as far as the two can be compared."""
    try:
        old = results.read(path, kind="counters")
        same_version(path, old, ffengine.__version__)
    except ValueError as other:  # of another version or format: nothing to compare with
        return [str(other)]
    found = []
    for name, part in parts.items():
        reason = incomparable(old["parts"].get(name), part)
        found += [f"{name}: {reason}"] if reason else [
            f"{name}: {text}" for text in differences(old["parts"][name], part)]
    return found


def renew(device: str) -> int:
    """Measure this machine's baseline anew and say what moved; another machine's stays as it is."""
    path, old = own_baseline(device), baseline_path(device)
    parts = counters.collect(device=device)
    failed = counters.failures(parts)
    if failed:
        print("\n".join(failed))
        return 1
    print("\n".join(moved(old, parts) if old.exists() else ["the first baseline"]))
    counters.write(path, parts, device)
    print(f"wrote {path}")
    return 0


def run_gate(ref: str | None, device: str, *, strict: bool, page: Path | None) -> int:
    """The gate's exit status."""
    path = baseline_path(device)
    if not path.exists():
        raise ValueError(f"[compare] expected a baseline in {BASELINES}, got none; {RENEW}")
    return gate.gate(path, ref, device, strict=strict, page=page)


def repeat(ref: str | None, times: int, path: Path | None) -> int:
    """The timing part over and over; how often it cried."""
    runs: list[dict[str, Any]] = []
    for i in range(times):
        start = time.perf_counter()
        verdict = gate.Verdict()
        rows = gate.gate_timing(ref, verdict)
        runs.append({"seconds": time.perf_counter() - start, "alarms": verdict.red,
                     "first_looks_over": sum("second_look" in row for row in rows),
                     "rows": rows})
        print(f"run {i + 1} of {times}: {len(verdict.red)} alarms, {runs[-1]['seconds']:.0f} s",
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
    parser.add_argument("--strict", action="store_true",
                        help="of --gate: what could not be compared is red too")
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="of --gate: write the verdict as Markdown too")
    parser.add_argument("--renew", action="store_true")
    parser.add_argument("--timing-only", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--base", help="commit to time against; default: $BENCH_BASE, else the "
                        "merge base with main, else HEAD or its first parent")
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
            return run_gate(args.base, args.device, strict=args.strict, page=args.page)
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
