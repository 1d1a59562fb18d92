"""python -m bench.gpu [--rehearse]: see bench/gpu.sh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import plan
from bench.gpu.records import Records
from bench.gpu.run import NO_DEVICE, Run, Stage

ROOT = Path(__file__).resolve().parents[2]
#: Where the kernels' folder is linked into the package while a run lasts, if nobody installed it.
LINK = ROOT / "ffengine" / "kernels"
FAKES = Path(__file__).resolve().parent / "fakes"


def main(words: list[str]) -> int:
    try:
        rehearse, slots, deadline = asked(words)
    except ValueError as bad:
        print(f"gpu.sh: {bad}", file=sys.stderr)
        return NO_DEVICE
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-run").resolve()
    begin(out, slots)
    linked, scratch = LINK.exists(), Path(tempfile.mkdtemp(prefix="ffengine-gpu-"))
    run = Run(deadline=deadline, python=os.environ.get("PYTHON") or sys.executable, root=ROOT,
              out=out, scratch=scratch, rehearse=rehearse,
              environment=environment(scratch, rehearse), groups=plan.GROUPS)
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        return through(run, slots)
    except KeyboardInterrupt:
        run.say("interrupted")
        return 1
    finally:
        run.stop()
        shutil.rmtree(scratch, ignore_errors=True)
        if not linked and LINK.is_symlink():
            LINK.unlink()


def asked(words: list[str]) -> tuple[bool, list[list[Stage]], float]:
    """(a rehearsal?, the stages by slots, the deadline); ValueError: one line."""
    unknown = [w for w in words if w != "--rehearse"]
    if unknown:
        raise ValueError(f"expected --rehearse or nothing, got {unknown[0]!r} (STAGES=... picks "
                         "stages)")
    text = os.environ.get("DEADLINE") or str(plan.DEADLINE)
    try:
        deadline = float(text)
    except ValueError:
        deadline = -1.0
    if not 0 < deadline < float("inf"):
        raise ValueError(f"DEADLINE expected seconds, got {text!r}")
    return bool(words), plan.chosen(os.environ.get("STAGES")), deadline


def begin(out: Path, slots: list[list[Stage]]) -> None:
    """The folder, with an empty file for everything that the run may write."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("summary.txt", *(f for slot in slots for stage in slot for f in stage.files)):
        (out / name).write_text("")


def environment(scratch: Path, rehearse: bool) -> dict[str, str]:
    """Of every stage's process."""
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    found |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch),
              "FFENGINE_CACHE": str(scratch / "costs")}
    if rehearse:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
                  "PATH": os.pathsep.join((str(FAKES), found.get("PATH", "")))}
    return found


def through(run: Run, slots: list[list[Stage]]) -> int:
    """Facts, then the slots; the exit status."""
    begun = time.monotonic()
    (facts,) = run.slot([plan.FACTS])
    if facts.kind != "ok":
        return NO_DEVICE if facts.status == NO_DEVICE else run.status
    for slot in slots:
        run.slot(slot)
    keep_outcomes(run, slots)
    words = {0: "everything ran and was right", 1: "something failed",
             3: "nothing failed, not everything ran"}
    run.say(f"{time.monotonic() - begun:.0f} s in all: {words[run.status]}; results in {run.out}")
    return run.status


def keep_outcomes(run: Run, slots: list[list[Stage]]) -> None:
    """How every stage ended, as the last row of the run's first file of rows."""
    files = [f for slot in slots for stage in slot for f in stage.files if f.endswith(".jsonl")]
    if files:
        facts = json.loads((run.scratch / "facts.json").read_text())
        Records(run.out / files[0], facts).add("run", status=run.status, stages=[
            {"name": o.stage.name, "kind": o.kind, "word": o.word, "seconds": o.seconds,
             "said": list(o.said)[-8:]} for o in run.outcomes])


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
