"""A step's program as text, and as plain values: what `ffengine plan MODEL --steps` prints.

Bytes are those that live after a line, parameters and optimizer states among them, from a dry run
of the program; in a loop of tiles, the most after any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ffengine.engine.memory.budget import megabytes
from ffengine.engine.memory.dry_run import DryRun
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.planning import Planning
from ffengine.engine.program import Instruction, Loop

#: Of ops whose line says something else than their name and their layer {i}.
WORDS = {
    "encode": "encode", "head": "head {i}: logits, loss and update",
    "head_alone": "head {i}: features of its own, logits, loss and update",
    "linear_step": "linear_step {i}: forward, local_pass and update",
    "update_own": "update {i} by its own loss", "update_next": "update {i} by the next one's loss",
    "update_labels": "update of the label channel",
    "update_gamma": "update of gamma {i}", "update_all": "update of all parameters",
    "backpropagate": "forward and backward", "gram": "head {i}: sums of its least squares",
    "states": "states", "mean_of_frames": "mean of frames",
    "pass_on": "forward {i} and activation", "infer": "forward {i} and activation, at rest",
    "pass_updated": "forward {i} and activation, by the updated weights"}
#: Columns of a line before its bytes.
WIDTH = 76

Values = dict[str, Any]


def steps(planning: Planning, samples: int) -> list[Values]:
    """The programs of a run on batches of so many samples: every phase's, a turn each."""
    found = []
    for epoch, plan in planning.plans(samples).phases:
        for dry in planning.planner(samples, epoch).sizes.dry_runs:
            found.append({"epoch": epoch, "iteration": dry.when[1], "rows": dry.rows,
                          "layers": list(dry.turn.layers), "heads": list(dry.turn.heads),
                          "parts": parts(dry, plan)})
    return found


def parts(dry: DryRun, plan: Plan) -> list[Values]:
    """A step's instructions and segments, in order."""
    live: dict[int, int] = {}

    def told(line: Instruction, nbytes: int) -> None:
        live[id(line)] = max(nbytes, live.get(id(line), 0))

    dry.step(plan, told)
    program = dry.schedule.program(dry.net, plan, dry.facts)  # the one that has run
    return [{"title": part.title, "tile": part.size, "pairs": part.pairs,
             "layers": sorted({line.index for line in part.lines}),
             "lines": [values(line, live) for line in part.lines]}
            if isinstance(part, Loop) else values(part, live) for part in program.parts]


def values(line: Instruction, live: dict[int, int]) -> Values:
    """An instruction as plain values."""
    return {"op": line.op, "index": line.index, "reads": dict(line.reads),
            "writes": list(line.writes), "frees": sorted(line.frees), "text": sentence(line),
            "live_bytes": live[id(line)]}


def sentence(line: Instruction) -> str:
    """An instruction in words."""
    words = WORDS.get(line.op, f"{line.op} {{i}}").format(i=line.index)
    given = f" ({', '.join(name for _, name in line.reads)})" if line.reads else ""
    made = f" -> {', '.join(line.writes)}" if line.writes else ""
    return words + given + made


def text(found: list[Values]) -> Iterator[str]:
    """The programs as lines, a heading each."""
    for program in found:
        turns = sum(other["epoch"] == program["epoch"] for other in found)
        when = f"epoch {program['epoch']}" + f", batch {program['iteration']}" * (turns > 1)
        trains = [f"{name} {', '.join(map(str, program[name]))}" for name in ("layers", "heads")
                  if program[name]]
        yield row(f"{when}: {' and '.join(trains) or 'nothing'} in training", "live after it")
        for part in program["parts"]:
            if "lines" not in part:
                yield row("  " + part["text"], megabytes(part["live_bytes"]))
                continue
            first, last = part["layers"][0], part["layers"][-1]
            whose = f"layer {first}" if first == last else f"layers {first} to {last}"
            count = program["rows"] // (1 + part["pairs"])
            unit = "pairs of rows" if part["pairs"] else "rows"
            yield f"  {part['title']}, {whose}: for {min(part['tile'], count)} {unit} of {count}"
            yield from (row("    " + line["text"], megabytes(line["live_bytes"]))
                        for line in part["lines"])


def row(said: str, live: str) -> str:
    """A line and the bytes that live after it."""
    return f"{said:{WIDTH}s} {live:>13s}"
