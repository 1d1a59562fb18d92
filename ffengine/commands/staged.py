"""`ffengine train --stages N`: the ranks of a pipeline, and what they say.

Under torchrun this process is one of them; started plainly it is rank 0 and starts the others when
its own arguments have proved good. Of what all ranks find wrong, rank 0 speaks.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ffengine.commands.options import device_of
from ffengine.engine.memory.budget import megabytes
from ffengine.engine.parallel import launch, ranks
from ffengine.engine.parallel.pipeline import Pipeline
from ffengine.engine.parallel.trainer import PipelineTrainer
from ffengine.engine.parallel.watch import StageFailed
from ffengine.engine.run import checkpoint
from ffengine.engine.trainer import Trainer
from ffengine.nn.network import LocalNet

Result = tuple[str, dict[str, Any] | None]


def run(args: argparse.Namespace, train: Callable[[argparse.Namespace], Result]) -> Result:
    """Train as a rank of a pipeline; (text, values) of rank 0."""
    started = launch.is_started()
    with launch.Local() as args.processes:
        try:
            refuse(args)
            if started:
                ranks.environment(args.stages)
                ranks.join(args.stages, device_of(args), timeout(args))
                go_on(args)
            return train(args)
        except StageFailed as error:
            args.processes.end()
            give_up(str(error), debug=args.debug)
        except KeyboardInterrupt:
            if launch.STARTED in os.environ:  # rank 0 says it
                raise SystemExit(130) from None
            raise
        except Exception as error:
            ranks.spoken(error)
            raise
        finally:
            ranks.leave()


def give_up(line: str, *, debug: bool) -> NoReturn:
    """Say it, and end the process at once: threads of broken connections may crash an interpreter
    that ends in its own time. Of ranks that were started here rank 0 says it for all, unless it is
    what died."""
    if debug:
        traceback.print_exc()
    if launch.STARTED not in os.environ or "rank 0," in line:
        print(f"ffengine: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def refuse(args: argparse.Namespace) -> None:
    """ValueError for what goes with one process only."""
    Pipeline(args.stages, timeout=timeout(args)).sane()
    for name in ("watch", "baselines", "device_profile"):
        if getattr(args, name):
            raise ValueError(f"[cli] --{name.replace('_', '-')} expected a run of one process, got "
                             f"--stages {args.stages}")


def timeout(args: argparse.Namespace) -> float:
    return Pipeline.timeout if args.timeout is None else args.timeout


def go_on(args: argparse.Namespace) -> None:
    """Ranks that torchrun starts again go on where the run's folder stands."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if again and args.out and args.resume is None and (
            Path(args.out) / checkpoint.LATEST).exists():
        args.resume = args.out


def trainer_of(args: argparse.Namespace, net: LocalNet, **options: Any) -> PipelineTrainer:
    """This rank's trainer. What is wrong with the network is found before others are started."""
    pipeline = Pipeline(args.stages, timeout=timeout(args))
    pipeline.check(net)
    if not launch.is_started():
        args.processes.start(args.words, args.stages)
    args.quiet = args.quiet or os.environ["RANK"] != "0"
    return PipelineTrainer(net, pipeline, **options)


def stages_of(trainer: Trainer) -> list[dict[str, Any]]:
    """Of every stage: its layers, plan, predicted share of a batch's seconds, and, once an epoch is
    done, the bytes that a step and the process held."""
    assert isinstance(trainer, PipelineTrainer)
    total, found = sum(trainer.seconds) or 1.0, []
    for rank, (layers, plan) in enumerate(zip(trainer.stages, trainer.plans or (), strict=True)):
        peak, resident = trainer.memory[rank] if trainer.memory else (None, None)
        found.append({"rank": rank, "layers": [layers.start, layers.stop - 1], "cuts": plan.cuts,
                      "tile": plan.tile, "floor_bytes": plan.floor_bytes,
                      "planned_bytes": plan.peak_bytes, "share": trainer.seconds[rank] / total,
                      "peak_bytes": peak, "resident_bytes": resident})
    return found


def stages_text(trainer: Trainer) -> str:
    """A line for each stage: its memory plan, and what it held in the end."""
    rows = []
    for stage in stages_of(trainer):
        first, last = stage["layers"]
        held = "" if stage["resident_bytes"] is None else (
            f"; held {megabytes(stage['peak_bytes'])} in a step, its process "
            f"{megabytes(stage['resident_bytes'])}")
        cuts = ", ".join(map(str, stage["cuts"])) or "none"
        rows.append(f"\n  stage {stage['rank']}: layers {first}-{last}, "
                    f"{100 * stage['share']:.0f} % of a batch's time, plan "
                    f"{megabytes(stage['planned_bytes'])} (cuts {cuts}; tiles "
                    f"{', '.join(map(str, stage['tile']))}){held}")
    return "".join(rows)
