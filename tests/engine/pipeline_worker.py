"""A rank of test_pipeline.py: `python -m tests.engine.pipeline_worker SCENARIO FOLDER`, with
torchrun's variables in its environment. What it says goes to FOLDER/SCENARIO-RANK.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ffengine as ff
from ffengine.engine.memory.plans import Job, planner_for
from ffengine.engine.parallel.pipeline import Pipeline
from ffengine.engine.parallel.trainer import PipelineTrainer
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.run.settings import Settings
from ffengine.engine.schedules.schedule import of
from ffengine.nn import LinearHead, LocalLinear, LocalNet, Readout
from ffengine.ops.config import LocalPassConfig
from tests.engine.training import loaders, network

#: Networks, precisions and epochs (of three batches) that two stages train.
RUNS = (("tiny", "fp64", 10), ("pairs", "fp64", 10), ("resnet", "fp64", 1), ("heads", "fp32", 2))
#: Segments in small tiles, some of which stages cut once more; a shortcut is live after layer 3.
CUTS, TILES = [3, 10], [4, 8, 5]


def build(name: str, seed: int = 0) -> Any:
    """A small network."""
    torch.manual_seed(seed)
    if name == "resnet":
        return ff.models.create("deeperforward/resnet17", in_channels=1, image_size=8,
                                planes=(10, 20, 40, 80))
    if name == "pairs":
        return ff.models.create("fflib/ffnn", in_channels=1, image_size=8, layers=(30, 20, 20))
    if name == "heads":  # one on layers of both stages
        layers = [LocalLinear(i, o, config=LocalPassConfig(groups=10))
                  for i, o in ((64, 30), (30, 20), (20, 20), (20, 10))]
        return LocalNet(layers, num_classes=10, in_shape=(1, 8, 8), readout=Readout("head"),
                        heads=[LinearHead((0, 1, 3), 60, 10), LinearHead((1,), 20, 10)])
    return network(seed)


def settings(name: str, precision: str = "fp64") -> dict[str, Any]:
    """Of a trainer of it, in one process or in several."""
    return {"epochs": 10, "batch_size": 16, "seed": 3, "progress": False,
            "precision": precision, "memory": ff.Memory(costs="modelled",
                                                        plan=plan(name, precision))}


def plan(name: str, precision: str) -> Any:
    """One without a search, in tiles where the network takes them."""
    net = build(name)
    if precision == "fp64":
        net.double()
    schedule = of(net, None)
    schedule.begin(net, 1)
    made = Settings.resolve(net.recipe or Recipe(), lr=None, epochs=1, batch_size=16, seed=0,
                            precision=precision)
    planner = planner_for(Job(net, schedule, made), 16)
    return planner.fixed(CUTS, TILES) if name == "resnet" else planner.one_tile()


def train(name: str, folder: Path, until: int, stages: int = 1, precision: str = "fp64",
          resume: Path | None = None, *, callbacks: tuple[ff.Callback, ...] = (),
          pipeline: dict[str, Any] | None = None) -> Any:
    """The trainer, after its epoch `until`: of this process alone, or of a rank."""
    options = {**settings(name, precision), "out": folder}
    made = ff.Trainer(build(name), **options) if stages == 1 else PipelineTrainer(
        build(name), Pipeline(stages, **(pipeline or {})), **options)
    if resume is not None:
        made.resume(resume)
    first = getattr(made, "first", True)
    shown, valid, _ = loaders()
    made.fit(shown if first else (), valid if first else None, until=until, callbacks=callbacks)
    return made


class At(ff.Callback):
    """Does something at a step."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step, self.act = step, act

    def on_step(self, trainer: Any, batch: Any, report: Any) -> None:
        if trainer.steps == self.step:
            self.act(trainer)


def same(folder: Path, rank: int) -> dict[str, Any]:
    """Ranks of other weights are refused; then networks of two stages, each for some epochs."""
    said: dict[str, Any] = {}
    try:
        PipelineTrainer(build("tiny", seed=rank), Pipeline(2), **settings("tiny"))
    except ValueError as error:
        said["refused"] = str(error)
    for name, precision, epochs in RUNS:
        made = train(name, folder / f"{name}-{precision}", epochs, 2, precision)
        said[name] = [made.piece.layers.start, made.piece.layers.stop,
                      sum(s.numel() for s in made.optimizer.state_tensors()),
                      sum(p.untyped_storage().nbytes() for p in made.net.parameters())]
    return said


def more(folder: Path, rank: int) -> dict[str, Any]:
    """Four stages go on where one process was interrupted within an epoch; then one is killed."""
    made = train("resnet", folder / "more", 3, 4, "fp32", folder / "interrupted.safetensors")
    said = {"layers": [[s.start, s.stop] for s in made.stages], "steps": made.steps}
    kill = At(11, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    return {**said, **failure(made, (kill,) if rank == 2 else ())}


def hangs(folder: Path, rank: int) -> dict[str, Any]:
    """The second of two stages hangs in the second epoch."""
    made = train("tiny", folder / "hangs", 1, 2, "fp32", pipeline={"timeout": 3.0})
    return failure(made, (At(5, lambda _: time.sleep(600)),) if rank else ())


def failure(made: Any, callbacks: tuple[ff.Callback, ...]) -> dict[str, Any]:
    """How training on comes to a bad end, and how many seconds later."""
    began = time.monotonic()
    try:
        made.fit(loaders()[0] if made.first else (), until=10, callbacks=callbacks)
    except ff.TrainingStopped as error:
        return {"error": str(error), "kind": type(error).__name__,
                "seconds": time.monotonic() - began}
    return {}


def main(scenario: str, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    said = {"same": same, "more": more, "hangs": hangs}[scenario](folder, rank)
    (folder / f"{scenario}-{rank}.json").write_text(json.dumps(said))
    if "error" in said:
        os._exit(0)  # as `ffengine train` ends: broken connections have threads


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
