"""The stages, in order; those of one slot run side by side.

Limits add up to less than the deadline where each takes what it should; what a stage does not need
goes to those after it.
"""

from __future__ import annotations

from bench.gpu.run import Stage

DEADLINE = 470.0
#: Seconds that the stages of a group share.
GROUPS = {"step": 100.0}
#: What a run leaves in its folder, and nothing else.
FILES = ("summary.txt", "build.log", "smoke.jsonl", "tests.log", "sanitize.log",
         "local_pass.jsonl", "step.jsonl", "ncu.csv")

#: Of stages with Triton's kernels in a rehearsal; its compiler needs processes of its own.
INTERPRETED = {"TRITON_INTERPRET": "1"}
FACTS = Stage("facts", 30.0, "bench.gpu.facts")


def rows(name: str, seconds: float, module: str, file: str, *options: str, limit: float = 30.0,
         group: str | None = None, rest: bool = False, asked: bool = False) -> Stage:
    """A stage whose rows are jobs of `module` (bench.gpu.jobs); limit: seconds of one."""
    return Stage(name, seconds, "bench.gpu.jobs", (file,),
                 (f"bench.gpu.{module}", "--file", file, "--record", name, "--limit", f"{limit:g}",
                  *options), group, rest, asked, INTERPRETED)


SLOTS: tuple[tuple[Stage, ...], ...] = (
    (Stage("build", 75.0, "bench.gpu.build", ("build.log",)),),
    (rows("smoke", 40.0, "smoke", "smoke.jsonl", limit=20.0),),
    (Stage("test", 110.0, "bench.gpu.suite", ("tests.log",)),
     Stage("sanitize", 110.0, "bench.gpu.sanitize", ("sanitize.log",), rehearsed=INTERPRETED)),
    (rows("local_pass", 45.0, "sweeps", "local_pass.jsonl", limit=20.0),),
    (rows("step", 60.0, "steps", "step.jsonl", "--together", group="step"),),
    (rows("compiled", 60.0, "steps", "step.jsonl", "--together", "--rows", "compiled", limit=60.0,
          group="step"),),
    (rows("memory", 30.0, "memory", "step.jsonl"),),
    (Stage("ncu", 35.0, "bench.gpu.ncu", ("ncu.csv",), rehearsed=INTERPRETED),),
    (rows("fp32", 90.0, "steps", "step.jsonl", "--together", "--precision", "fp32", rest=True),),
    (rows("tf32", 90.0, "steps", "step.jsonl", "--together", "--precision", "tf32", rest=True,
          asked=True),),
    (rows("free", 90.0, "steps", "step.jsonl", "--together", "--no-deterministic", rest=True,
          asked=True),),
    (Stage("counters", 400.0, "bench.gpu.counters", ("counters.json",), asked=True),),
    (Stage("devices", 240.0, "bench.gpu.other", (), ("devices",), asked=True),),
    (Stage("states", 300.0, "bench.gpu.other", (), ("states",), asked=True),),
)


def stages() -> dict[str, Stage]:
    """Every stage that STAGES may name."""
    return {stage.name: stage for slot in SLOTS for stage in slot}


def chosen(text: str | None) -> list[list[Stage]]:
    """The slots with the stages that STAGES names; default all but those only asked for.

    Raises:
        ValueError: an unknown name.
    """
    names = (text or "").split()
    unknown = [n for n in names if n not in stages()]
    if unknown:
        raise ValueError(f"STAGES expected some of {', '.join(stages())}; got {unknown[0]!r}")
    wanted = [[s for s in slot if (s.name in names if names else not s.asked)] for slot in SLOTS]
    return [slot for slot in wanted if slot]
