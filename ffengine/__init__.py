"""Forward-Forward (layer-local) learning in less memory and time than backpropagation.

    import ffengine as ff
    net = ff.models.create("deeperforward/resnet17", num_classes=10, in_channels=3)
    trainer = ff.Trainer(net, epochs=150, lr=0.08, memory_budget="440MB")
    trainer.fit(train_loader, valid_loader)

Names load when they are first used, so importing this costs nothing and needs no GPU, no
compiled kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffengine.needs import load
from ffengine.version import __version__

if TYPE_CHECKING:
    from ffengine import data as data
    from ffengine import losses as losses
    from ffengine import models as models
    from ffengine import nn as nn
    from ffengine.engine.batch import Batch as Batch
    from ffengine.engine.memory.plans import Memory as Memory
    from ffengine.engine.parallel.pipeline import Pipeline as Pipeline
    from ffengine.engine.parallel.trainer import PipelineTrainer as PipelineTrainer
    from ffengine.engine.run.callbacks import Callback as Callback
    from ffengine.engine.run.recipe import Recipe as Recipe
    from ffengine.engine.run.stopping import TrainingInterrupted as TrainingInterrupted
    from ffengine.engine.run.stopping import TrainingStopped as TrainingStopped
    from ffengine.engine.trainer import Trainer as Trainer
    from ffengine.env import env_report as env_report

_MODULES = ("data", "losses", "models", "nn")
_NAMES = {
    "Batch": "ffengine.engine.batch",
    "Callback": "ffengine.engine.run.callbacks",
    "Memory": "ffengine.engine.memory.plans",
    "Pipeline": "ffengine.engine.parallel.pipeline",
    "PipelineTrainer": "ffengine.engine.parallel.trainer",
    "Recipe": "ffengine.engine.run.recipe",
    "Trainer": "ffengine.engine.trainer",
    "TrainingInterrupted": "ffengine.engine.run.stopping",
    "TrainingStopped": "ffengine.engine.run.stopping",
    "env_report": "ffengine.env",
}
__all__ = [
    "Batch", "Callback", "Memory", "Pipeline", "PipelineTrainer", "Recipe", "Trainer",
    "TrainingInterrupted", "TrainingStopped", "__version__", "data", "env_report", "losses",
    "models", "nn",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return load(f"ffengine.{name}")
    if name in _NAMES:
        return getattr(load(_NAMES[name]), name)
    raise AttributeError(f"module 'ffengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
