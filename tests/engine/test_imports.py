"""What training imports: not torch's compile stack, 160 MB and two seconds of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINS = """
import sys
import torch
import ffengine
from ffengine.engine.run.evaluation import accuracy
from ffengine.engine.inputs import rows_of
from ffengine.engine.memory.plan import one_tile
from ffengine.engine.memory.plans import TrainingPlan
from tests.models.every import batch, network, trainer

for name in ("cafo/cnn", "cff/adaptive", "deeperforward/resnet17", "fflib/ffnn", "fflib/ffrnn",
             "hinton/peer-norm", "sn/cifar10", "sn/mlp", "trifecta/shallow", "bp/sn/mlp"):
    net = network(name)
    x, y = batch(net)
    t = trainer(net)
    t.planning._made[8] = TrainingPlan(((0, one_tile(range(len(net.layers)), rows_of(net, 8))),))
    t.step(x, y)
    t.meter_next()
    t.step(x, y)
    assert t.peak_bytes > t.floor_bytes, name
    accuracy(net, [(x, y)])
    net(x)
print([m for m in ("torch._dynamo", "torch._inductor", "sympy", "ffengine.analysis.watching")
       if m in sys.modules])
"""


def test_training_leaves_torchs_compiler_out() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINS], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-2000:]
