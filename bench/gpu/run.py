"""One deadline, and stages under it: each in processes of its own, which end with all they started.

A stage gets the smaller of its own limit and of what is left, and is skipped by name where that is
next to nothing. What it prints is its part of the summary; a stage that failed adds the end of its
standard error. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: A stage is not begun with less.
LEAST_SECONDS = 15.0
#: From the limit on, before a process that did not end is killed.
GRACE_SECONDS = 3.0
#: Lines of a failed stage's standard error, and of any stage's output, that the summary keeps.
TAIL_LINES, SAID_LINES = 15, 60
#: Times as long that a stage may take in a rehearsal, which is about what it does, on any machine.
PATIENCE = 3.0
#: Exit statuses of a run; 2, from the stage that looks, is "no device".
DONE, FAILED, NO_DEVICE, INCOMPLETE = 0, 1, 2, 3


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Args:
        name: what STAGES picks it by.
        seconds: its own limit.
        module: what `python -m` runs.
        files: of the results' folder, which it writes.
        options: further words of its command.
        group: stages of one group share its seconds (GROUPS).
        rest: it takes what is left, and a run without it is complete.
        asked: it runs only where STAGES names it.
        rehearsed: environment of its processes in a rehearsal, beside the run's.
    """

    name: str
    seconds: float
    module: str
    files: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    group: str | None = None
    rest: bool = False
    asked: bool = False
    rehearsed: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a stage ended: ok, failed, late or skipped; in words for the summary."""

    stage: Stage
    kind: str
    word: str
    seconds: float = 0.0
    status: int = 0
    said: Sequence[str] = ()
    complaint: Sequence[str] = ()

    @property
    def text(self) -> str:
        head = f"{self.stage.name:12} {self.word:20} {self.seconds:4.0f} s"
        return "\n".join([head, *(f"  {line}" for line in self.said),
                          *(f"  ! {line}" for line in self.complaint)])


class Run:
    """Runs stages within a deadline and writes the summary.

    Args:
        deadline: seconds for everything, from now.
        python: interpreter of the stages.
        out, scratch: the results' folder, and one for everything else.
        rehearse: every stage is told that there is no GPU.
        environment: of every stage.
        groups: seconds that a group's stages share.
    """

    def __init__(self, *, deadline: float, python: str, root: Path, out: Path, scratch: Path,
                 rehearse: bool = False, environment: dict[str, str] | None = None,
                 groups: dict[str, float] | None = None) -> None:
        self.end = time.monotonic() + deadline
        self.python, self.root, self.out, self.scratch = python, root, out, scratch
        self.rehearse, self.environment = rehearse, dict(environment or os.environ)
        self.patience = PATIENCE if rehearse else 1.0
        self.left_of = {name: self.patience * seconds for name, seconds in (groups or {}).items()}
        self.outcomes: list[Outcome] = []
        self._running: list[_Running] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def slot(self, stages: Sequence[Stage]) -> list[Outcome]:
        """Run stages side by side; their lines go to the summary in order."""
        begun = time.monotonic()
        made: list[Outcome | _Running] = [self._begin(stage) for stage in stages]
        self._running = [r for r in made if isinstance(r, _Running)]
        while any(not r.over() for r in self._running):
            time.sleep(0.05)
        found = [r.outcome() if isinstance(r, _Running) else r for r in made]
        self._running = []
        for group in {s.group for s in stages if s.group is not None}:
            self.left_of[group] -= time.monotonic() - begun
        for outcome in found:
            self.say(outcome.text)
        self.outcomes += found
        return found

    def _begin(self, stage: Stage) -> Outcome | _Running:
        own = self.patience * stage.seconds
        limit = min(own, self.left(), self.left_of.get(stage.group or "", own))
        if limit < min(LEAST_SECONDS, own):
            return Outcome(stage, "skipped", f"skipped: {max(limit, 0.0):.0f} s left")
        command = [self.python, "-m", stage.module, *stage.options,
                   *["--rehearse"] * self.rehearse,
                   "--out", str(self.out), "--scratch", str(self.scratch),
                   "--seconds", f"{max(limit - GRACE_SECONDS, 1.0):.1f}"]
        return _Running(stage, limit, command, self.root, self.scratch,
                        {**self.environment, **(stage.rehearsed if self.rehearse else {})})

    def say(self, text: str) -> None:
        """A line or more of the summary, and of standard output."""
        print(text, flush=True)
        with (self.out / "summary.txt").open("a") as summary:
            summary.write(text + "\n")

    def stop(self) -> None:
        """End what is running."""
        for running in self._running:
            running.end()

    @property
    def status(self) -> int:
        """Exit status of the run."""
        if any(o.kind == "failed" for o in self.outcomes):
            return FAILED
        cut = any(o.kind in ("late", "skipped") and not o.stage.rest for o in self.outcomes)
        return INCOMPLETE if cut else DONE


class _Running:
    """A stage's process, the first of a session of its own."""

    def __init__(self, stage: Stage, limit: float, command: list[str], root: Path, scratch: Path,
                 environment: dict[str, str]) -> None:
        self.stage, self.limit, self.begun = stage, limit, time.monotonic()
        self.said, self.complaint = (scratch / f"{stage.name}.{kind}" for kind in ("out", "err"))
        self.late, self.took = False, 0.0
        with self.said.open("w") as out, self.complaint.open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, cwd=root,
                                            env=environment, stdin=subprocess.DEVNULL,
                                            start_new_session=True)

    def over(self) -> bool:
        """Whether it ended; past its limit it is ended."""
        if self.process.poll() is None and time.monotonic() - self.begun > self.limit:
            self.late = True
            self.end()
        if self.process.poll() is None:
            return False
        if not self.took:
            self.took = time.monotonic() - self.begun
            self._signal(signal.SIGKILL)  # whatever it left behind
        return True

    def end(self) -> None:
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def outcome(self) -> Outcome:
        status = self.process.returncode
        kind, word = ("late", f"TIMED OUT ({self.limit:.0f} s)") if self.late else {
            DONE: ("ok", "ok"), INCOMPLETE: ("late", "cut short")}.get(
                status, ("failed", f"FAILED ({status})"))
        complaint = [] if kind == "ok" else list(_lines(self.complaint))[-TAIL_LINES:]
        return Outcome(self.stage, kind, word, self.took, status,
                       list(_lines(self.said))[-SAID_LINES:], complaint)


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(errors="replace").splitlines():
        if line.strip():
            yield line.rstrip()[:200]
