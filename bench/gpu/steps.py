"""A whole training step: ours by every back-end and plan, and what it is compared with.

--rows main: ours in one tile and by the default plan, the expert's eager step, plain and
accumulated backpropagation, and ours as a captured graph. --rows compiled: backpropagation through
torch.compile, beside ours. Every contender's memory and a first time are there as soon as it has
stepped; then all take turns. A step's weights and states are many times a GPU's cache, so every
step finds it cold. No time of ours is given unless its gradients are right.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import fair, floor, machine
from bench.contenders import (
    Builder,
    backprop_contender,
    eager_contender,
    engine_contender,
    unfused,
)
from bench.gpu import clock
from bench.gpu.checked import gradients, problem_of
from bench.gpu.records import Row
from bench.gpu.session import Session
from bench.gpu.work import Job, failed, worker
from bench.problem import Problem
from ffengine.baselines.steps import pieces
from ffengine.engine.trainer import Trainer
from ffengine.ops import backends


@dataclass
class Table:
    """The contenders of one precision, as they come to life."""

    session: Session
    precision: str
    deterministic: bool
    rows: dict[str, Row] = field(default_factory=dict)
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    trainers: dict[str, Trainer] = field(default_factory=dict)

    def problem(self, backend: str) -> Problem:
        return problem_of(self.session, backend, self.precision, self.deterministic)

    @functools.cached_property
    def theirs(self) -> Problem:
        """What those train on that have no back-end of ours."""
        return self.problem("auto")

    def named(self, name: str) -> str:
        return f"{self.precision} {name}"

    def contender(self, name: str, kind: str, problem: Problem, builds: list[Builder],
             **more: Any) -> Row:
        """A contender's memory and first time, and `more` of it in every row; it takes part in the
        rounds from now on."""
        with problem.rules():
            row, contender = fair.prepared(problem, name, kind, builds)
            row |= {"precision": self.precision, "batch": problem.batch, "model": problem.model,
                    "deterministic": problem.deterministic, **more}
            if contender is None:
                return {**row, "name": self.named(name), "check": "failed", "error": row["failed"]}
            call = contender.phases[0].run
            first = self.seconds(call, 1)[0]
            row |= {**clock.summed(clock.kernels(call, self.session.device)),
                    "first_seconds": first}
        self.rows[name], self.calls[name] = row, call
        return {**row, "name": self.named(name),
                "text": f"{1e3 * first:.2f} ms at first, {row['peak_bytes'] / 1e6:.1f} MB"}

    def seconds(self, call: Callable[[], Any], times: int) -> tuple[float, float]:
        """(device, host) seconds a step."""
        if self.session.device.type == "cuda":
            return clock.between_events(call, times)
        taken = clock.reading([call], self.session.device, times)()
        return taken, taken

    def ours(self, backend: str, plan: str) -> Row:
        """Our step by a back-end, under its default plan or in one tile."""
        name = f"ours, {backend}, {plan}"
        reason = None if backend == "auto" else backends.why_not(
            backend, self.session.device.type, torch.float32)
        if reason is not None:
            return {"name": self.named(name), "check": "absent", "error": reason}
        problem = self.problem(backend)
        verdict = gradients(self.session, problem)
        if verdict["check"] != "ok":
            return {"name": self.named(name), **verdict}
        trainer = self.trainer(problem, plan)
        if trainer is None:
            return {"name": self.named(name), "text": "the default plan is one tile"}
        plan_of = trainer.plan
        row = self.contender(name, "ffengine", problem,
                             [lambda: engine_contender(problem, name, trainer)],
                             backend=backend, cuts=plan_of.cuts if plan_of else [],
                             tile=plan_of.tile if plan_of else [], **verdict)
        if name in self.calls:
            self.trainers[name] = trainer
        return row

    def trainer(self, problem: Problem, plan: str) -> Trainer | None:
        """None for one tile, where the default plan is that."""
        made = problem.trainer(states="fp32")
        if plan == "default plan":
            return made
        assert made.plan is not None
        if not made.plan.cuts and made.plan.tile == [made.plan.batch]:
            return None
        one = made.planning.planner(problem.batch).fixed([], made.plan.batch)
        return problem.trainer(states="fp32", plan=one)

    def captured(self) -> Row:
        """The fastest of ours so far, captured in a graph and replayed."""
        name = "ours, captured graph"
        if not self.trainers:
            return {"name": self.named(name), "check": "absent", "error": "no step of ours ran"}
        problem = self.theirs
        with problem.rules():
            of = min(self.trainers, key=lambda n: self.seconds(self.calls[n], 1)[0])
            replay = self.trainers[of].capture(problem.x, problem.y)
            if replay.reason is not None:
                return {"name": self.named(name), "check": "absent", "error": replay.reason}
            replay()
            first = self.seconds(replay, 1)[0]
        # a back-end's rank comes from steps that every back-end took
        self.rows[name] = {**self.rows[of], "first_seconds": first, "of": of, "backend": None}
        self.calls[name] = replay
        return {**self.rows[name], "name": self.named(name),
                "text": f"{1e3 * first:.2f} ms at first; of {of}"}

    def rounds(self) -> Iterator[Row]:
        """Every contender in turn; a contender that fails now is a row, the others go on."""
        with self.theirs.rules():
            times, hosts = self._times()
        base = next((n for n, t in times.items() if n.startswith("ours") and t
                     and not isinstance(t, str)), None)
        for name, seen in times.items():
            row = {**self.rows[name], "name": self.named(name)}
            if isinstance(seen, str):
                yield {**row, "check": "failed", "error": seen}
                continue
            seconds, host = clock.spread(seen), clock.spread(hosts[name])
            ratio = machine.ratio(seen, times[base]) if base is not None else None
            yield {**row, "rounds": seen, "seconds": seconds, "host_seconds": host,
                   "images_per_second": self.theirs.batch / seconds["median"], "beside": base,
                   "times_as_long": ratio,
                   "text": f"{1e3 * seconds['median']:.3f} ms ({1e3 * seconds['min']:.3f}-"
                           f"{1e3 * seconds['max']:.3f}), host {1e3 * host['median']:.3f}, "
                           f"{row['peak_bytes'] / 1e6:.1f} MB"
                           + (f", {ratio:.2f} x {base}" if ratio is not None else "")}

    def _times(self) -> tuple[dict[str, Any], dict[str, list[float]]]:
        times: dict[str, Any] = {name: [] for name in self.calls}
        hosts: dict[str, list[float]] = {name: [] for name in self.calls}
        for turn in range(self.session.scale.rounds):
            for name in list(self.calls)[::1 if turn % 2 == 0 else -1]:
                if isinstance(times[name], str):
                    continue
                try:
                    device, host = self.seconds(self.calls[name], self._steps(name))
                except Exception as reason:
                    times[name] = failed(reason)["error"]
                    continue
                times[name].append(device)
                hosts[name].append(host)
        return times, hosts

    def _steps(self, name: str) -> int:
        """Steps of a turn that take about step_seconds."""
        scale, one = self.session.scale, self.rows[name]["first_seconds"]
        fewest, most = scale.steps
        return min(max(math.ceil(scale.step_seconds / max(one, 1e-9)), fewest), most)

    def floor(self) -> Row:
        """The least a step could take by this device's copy and product rates."""
        with self.theirs.rules():
            least = floor.seconds(self.theirs)
        return {"name": self.named("floor"), "seconds": least,
                "text": "none" if least is None else f"{1e3 * least:.3f} ms"}


def main_rows(table: Table) -> Iterator[Job]:
    """The contenders in the order of what is most worth knowing, then the rounds."""
    def one(row: Callable[[], Row]) -> Callable[[], Iterable[Row]]:
        return lambda: [row()]

    for plan in ("default plan", "one tile"):
        for backend in table.session.scale.backends:
            yield (table.named(f"ours, {backend}, {plan}"),
                   one(functools.partial(table.ours, backend, plan)))
    yield table.named("bp plain"), one(lambda: table.contender(
        "bp plain", "bp", table.theirs, [
            functools.partial(backprop_contender, table.theirs, "bp plain", last)
            for last in (True, False)]))
    yield table.named("eager step, expert"), one(lambda: table.contender(
        "eager step, expert", "eager", table.theirs, [lambda: eager_contender(
            table.theirs, "eager step, expert",
            unfused(table.theirs, channels_last=True, fused=True))]))
    size, words = next(iter(pieces(table.session.scale.network[2]).items()))
    yield table.named(f"bp {words}"), one(lambda: table.contender(
        f"bp {words}", "bp", table.theirs, [functools.partial(
            backprop_contender, table.theirs, f"bp {words}", True, micro_batch=size)]))
    yield table.named("ours, captured graph"), one(table.captured)
    yield table.named("rounds"), table.rounds
    yield table.named("floor"), one(table.floor)


def compiled_rows(table: Table) -> Iterator[Job]:
    """Backpropagation by torch.compile, and beside it ours in the same process."""
    name, compiler = "bp plain, torch.compile", table.session.scale.compiler
    beside = "ours, auto, default plan"
    yield table.named(name), lambda: [table.contender(name, "bp", table.theirs, [functools.partial(
        backprop_contender, table.theirs, name, True, compiler=compiler)])]
    yield table.named(beside), lambda: [table.ours("auto", "default plan")]
    yield table.named("rounds with torch.compile"), table.rounds


def jobs(session: Session, args: argparse.Namespace) -> Iterator[Job]:
    precision = args.precision or session.scale.network[3]
    table = Table(session, precision, args.deterministic)
    yield from (compiled_rows if args.rows == "compiled" else main_rows)(table)


if __name__ == "__main__":
    sys.exit(worker(__doc__, jobs, rows={"choices": ("main", "compiled"), "default": "main"},
                    precision={"choices": ("bf16", "fp32", "tf32")},
                    deterministic={"action": argparse.BooleanOptionalAction, "default": True}))
