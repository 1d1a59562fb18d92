"""memcheck, then racecheck, of a few calls of our kernels (tests/cuda/sanitize.py).

Findings are in sanitize.log and counted as they come, for a tool that is stopped prints no summary.
Only our kernels are looked at, each allocation by itself: a caching allocator hides what a kernel
reads beyond its end. A read past an end is planted as memcheck's last call: if it is not found,
neither was anything else. A device that the tool refuses is told, not failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from bench.gpu.run import DONE, FAILED, INCOMPLETE
from bench.gpu.session import Session, options
from bench.gpu.tool import STOPPED, lines, triton_kernels

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "cuda" / "sanitize.py"
TOOLS = ("memcheck", "racecheck")
#: Seconds of a tool's share for its end: the planted call and the summary.
END_SECONDS = 6.0
PLANTED = "planted"
FINDING = re.compile(r"=========\s+(?:Error: |Warning: )?("
                     r"Invalid __|Misaligned|Race reported|Potential |Barrier error|"
                     r"Uninitialized|Program hit|Out-of-range|Stack overflow|Malloc/Free)")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
REFUSED = re.compile(r"not supported", re.IGNORECASE)
NAMED = 10


def our_kernels() -> list[str]:
    """Substrings of our kernels' compiled names: the C++ ones' namespace, Triton's own names."""
    return ["_ZN2ff", *triton_kernels()]


def command(tool: str, session: Session, seconds: float) -> list[str]:
    only = [word for name in our_kernels() for word in ("--kernel-name", f"kns={name}")]
    memcheck = tool == "memcheck"
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", "--print-limit", "20",
            # the framework tries calls that may fail
            *(["--report-api-errors", "no", "--kernel-name", "kns=planted_kernel"] * memcheck),
            *only, "--", sys.executable, str(PROGRAM), "--device", session.scale.device,
            *(["--calls", str(session.scale.sanitized)] if session.scale.sanitized else []),
            "--backends", ",".join(session.scale.backends),
            "--until", f"{time.monotonic() + seconds - END_SECONDS:.1f}", *["--plant"] * memcheck]


class Findings:
    """What one tool's lines say."""

    def __init__(self, tool: str) -> None:
        self.tool, self.case = tool, "the start"
        self.found: list[str] = []
        self.wrong: list[str] = []
        self.program = ""
        self.planted, self.seen = False, False
        self.refused, self.stopped = False, False

    def hear(self, line: str) -> None:
        if line.startswith("case "):
            self.case = line.removeprefix("case ")
            self.planted |= self.case == PLANTED
        elif line.startswith("WRONG "):
            self.wrong.append(line)
        elif " calls right" in line:
            self.program = line
        elif line.startswith(STOPPED):
            self.stopped = True
        elif FINDING.match(line):
            if self.case == PLANTED:
                self.seen = True
            else:
                self.found.append(f"{line.lstrip('= ')} in {self.case}")
        elif (match := SUMMARY.search(line)) and int(match[1]) and not (self.found or self.seen):
            self.found.append(line.lstrip("= "))  # of a kind that FINDING does not know
        elif line.startswith("=====") and REFUSED.search(line):
            self.refused = True

    @property
    def status(self) -> int:
        if self.found or self.wrong or (self.planted and not self.seen and not self.refused):
            return FAILED
        if self.refused:
            return DONE
        if not self.program or self.program.startswith("0 of"):
            return INCOMPLETE if self.stopped or self.program else FAILED
        return DONE

    def said(self) -> list[str]:
        """Lines of the summary."""
        if self.refused and self.status == DONE:
            return [f"{self.tool}: the tool refuses this device"]
        end = self.program or f"{'stopped' if self.stopped else 'ended'} in {self.case}"
        planted = f"; a planted error was {'' if self.seen else 'NOT '}seen" * self.planted
        return [f"{self.tool}: {len(self.found)} findings; {end}{planted}",
                *(f"  {text}" for text in (self.found + self.wrong)[:NAMED])]


def look(tool: str, session: Session, seconds: float, log: Path) -> Findings:
    found = Findings(tool)
    with log.open("a") as file:
        for line in lines(command(tool, session, seconds), seconds,
                          PYTORCH_NO_CUDA_MEMORY_CACHING="1"):
            file.write(line + "\n")
            file.flush()
            found.hear(line)
    return found


def main() -> int:
    args: argparse.Namespace = options(__doc__).parse_args()
    session, log = Session(args), args.out / "sanitize.log"
    if shutil.which("compute-sanitizer") is None:
        print("no compute-sanitizer here")
        log.write_text("no compute-sanitizer here\n")
        return INCOMPLETE
    worst = DONE
    for i, tool in enumerate(TOOLS):
        found = look(tool, session, session.left() / (len(TOOLS) - i), log)
        print("\n".join(found.said()), flush=True)
        worst = max((worst, found.status), key=(DONE, INCOMPLETE, FAILED).index)
        if found.refused:
            break
    return worst


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))
    sys.exit(main())
