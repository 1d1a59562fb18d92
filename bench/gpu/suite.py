"""The GPU tests, in many processes that take them one by one (bench.gpu.pool).

tests.log has each failure as it happens. A process that dies, loses its CUDA context or stays in
one test too long is replaced; its test has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from bench.gpu.pool import OTHER_TESTS, Pool
from bench.gpu.run import DONE, FAILED, INCOMPLETE
from bench.gpu.session import Session, options

ROOT = Path(__file__).resolve().parents[2]
#: Seconds in one test after which its process is stuck.
STUCK_SECONDS = 90.0
#: Processes beyond the first ones.
MOST_RESTARTS = 12
#: Tests that a machine without a GPU runs too: a rehearsal has some that do not skip.
REHEARSED = ("tests/ops/test_product_rule.py",)
#: Failures that the summary names.
NAMED = 20


class Workers:
    """The processes, and what became of those that left early."""

    def __init__(self, args: argparse.Namespace, pool: Pool, files: list[str]) -> None:
        also = [w for path in args.also for w in ("--pool-also", path)]
        self.command = [
            sys.executable, "-m", "pytest", "-p", "bench.gpu.pool", "-p", "no:cacheprovider",
            "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--pool", str(pool.folder),
            "--pool-log", str(pool.log), "--continue-on-collection-errors", "--tb=short", *also,
            *files]
        self.pool, self.started = pool, 0
        self.running: list[subprocess.Popen[bytes]] = []
        self.why = ""

    def start(self, count: int) -> None:
        """So many more processes; what they print goes to a file each."""
        for _ in range(count):
            with (self.pool.folder / f"output-{self.started}").open("w") as out:
                self.running.append(subprocess.Popen(
                    self.command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}))
            self.started += 1

    def look(self, most: int) -> bool:
        """Replace those that left early; whether any is at work."""
        for process in list(self.running):
            status = process.poll()
            hand = self.pool.folder / f"hand-{process.pid}"
            if status is None:
                if hand.exists() and _age(hand) > STUCK_SECONDS:
                    process.kill()
                    process.wait()
                    self.lost(hand, f"no answer in {STUCK_SECONDS:.0f} s")
                continue
            self.running.remove(process)
            if status in (0, 1, 5):  # done, with failures, without a test
                continue
            if status == OTHER_TESTS:
                self.why = "the processes collected different tests"
                continue
            if status < 0:
                self.lost(hand, f"the process died: {signal.Signals(-status).name}")
            elif hand.exists():
                self.lost(hand, f"the process ended with status {status}")
            if self.started < most:
                self.start(1)
            else:
                self.why = f"a process ended with status {status}"
        return bool(self.running)

    def lost(self, hand: Path, why: str) -> None:
        """The test in hand failed."""
        if hand.exists():
            name, since = json.loads(hand.read_text())
            hand.unlink()
            self.pool.end(name, "failed", time.monotonic() - since, why)

    def stop(self) -> list[str]:
        """End all; names of the tests they were in."""
        for process in self.running:
            process.kill()
            process.wait()
        return [json.loads(h.read_text())[0] for h in self.pool.folder.glob("hand-*")]


def _age(hand: Path) -> float:
    try:
        return float(time.monotonic() - json.loads(hand.read_text())[1])
    except (OSError, ValueError):  # it is being written
        return 0.0


def test_files() -> list[str]:
    """Files that have a test for a GPU; of those about benchmarks none has."""
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_*.py"))
            if "mark.gpu" in p.read_text() and p.parent.name != "bench"]


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--files", nargs="+", help="default: those that have a test for a GPU")
    parser.add_argument("--also", nargs="*", help="files of which every test is run")
    args = parser.parse_args()
    session = Session(args)
    if args.also is None:
        args.also = list(REHEARSED) if args.rehearse else []
    folder = session.scratch / "tests"
    folder.mkdir(exist_ok=True)
    files = args.files or [*dict.fromkeys([*test_files(), *args.also])]
    workers = Workers(args, Pool(folder, session.out / "tests.log"), files)
    workers.start(session.scale.test_processes)
    while session.left() > 0 and workers.look(session.scale.test_processes + MOST_RESTARTS):
        time.sleep(0.05)
    return report(session, workers, folder)


def report(session: Session, workers: Workers, folder: Path) -> int:
    """The last lines of the log and of the summary; the exit status."""
    late, hands = bool(workers.running), workers.stop()
    results = folder / "results"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if (
        results.exists()) else []
    outcomes = Counter(outcome for _, outcome, _ in rows)
    known = folder / "tests"
    total = json.loads(known.read_text())[1] if known.exists() else 0
    # a file that could not be read is a row without a test
    missing = total - sum("::" in name for name, _, _ in rows)
    said = [f"{outcomes['passed']} passed, {outcomes['failed']} failed, {outcomes['skipped']} "
            f"skipped, {missing} not run, of {total} in {workers.started} processes"]
    said += [f"failed: {name}" for name, outcome, _ in rows if outcome == "failed"][:NAMED]
    said += [f"unfinished: {name}" for name in hands]
    slowest = sorted(rows, key=lambda row: -row[2])[:3]
    said += ["slowest: " + ", ".join(f"{name} {s:.0f} s" for name, _, s in slowest)] * bool(rows)
    if workers.why or not rows:
        said.append(workers.why or "no test ran")
        said += (folder / "output-0").read_text(errors="replace").splitlines()[-8:]
    print("\n".join(said), flush=True)
    with (session.out / "tests.log").open("a") as log:
        log.write("\n".join(said) + "\n")
    if outcomes["failed"] or workers.why or not rows:
        return FAILED
    return INCOMPLETE if late or missing else DONE


if __name__ == "__main__":
    sys.exit(main())
