"""Denormal numbers are zeros inside a step, on every thread, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import ffengine as ff
from ffengine.engine.denormals import flushed
from ffengine.ops import backends

CPU = torch.device("cpu")
#: Enough numbers that every thread computes some.
MANY = 1 << 20

pytestmark = pytest.mark.skipif(backends.extension() is None, reason="needs the C++ extension")


def survivors() -> int:
    """How many of MANY denormal products are not zero."""
    return int((torch.full((MANY,), 1e-20) * 1e-20).count_nonzero())


def test_flushed_is_for_all_threads_and_ends() -> None:
    assert survivors() == MANY
    with flushed(CPU):
        assert survivors() == 0
        with flushed(CPU):
            assert survivors() == 0
        assert survivors() == 0
    assert survivors() == MANY
    with pytest.raises(RuntimeError, match="ends all the same"), flushed(CPU):
        raise RuntimeError("ends all the same")
    assert survivors() == MANY


COUNTS = """
import threading, torch
from ffengine.engine.denormals import flushed
from ffengine.ops import backends
torch.set_num_threads(1)
def count():
    with flushed(torch.device("cpu")):
        print(backends.extension().num_threads())
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


def test_a_new_thread_computes_on_as_many_cores_as_torch_was_told() -> None:
    """The number changes the order of sums, and so the results."""
    done = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "3"}, check=True)
    assert done.stdout == "1\n"


def test_a_device_that_needs_nothing_changes_nothing() -> None:
    with flushed(torch.device("meta")):
        assert survivors() == MANY


def test_a_step_computes_without_denormals(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ff.models.create("sn/mlp", layers=(20, 10), image_size=8)
    trainer = ff.Trainer(net, batch_size=8, progress=False)
    seen, train = [], trainer.schedule.train

    def watched(*args: Any) -> Any:
        seen.append(survivors())
        return train(*args)

    monkeypatch.setattr(trainer.schedule, "train", watched)
    trainer.step(torch.rand(8, *net.in_shape), torch.arange(8) % 10)
    assert seen == [0] and survivors() == MANY
