"""Joules of a GPU's own counter, through a fake of the driver's library and of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ffengine.devices import energy
from ffengine.profile import record, table
from tests.analysis.profiling import fix_rates, profiled, trainer

HERE = Path(__file__).parent
LIBRARY_CASE = """
    import sys
    sys.modules["pynvml"] = None  # not installed
    import torch
    from types import SimpleNamespace
    from ffengine.devices import energy
    def card(uuid):
        torch.cuda.get_device_properties = lambda d: SimpleNamespace(uuid=uuid)
    torch.cuda.synchronize = lambda d: None
    steps, gpu = [], torch.device("cuda")
    assert type(energy.counter()).__name__ == "_Library"
    card("1-2")
    assert energy.joules(lambda: steps.append(1), gpu, seconds=0.0) == 3.0, "one step, 3 J"
    assert len(steps) == 1
    assert energy.driver_version() == "580.1"
    card("another")
    assert energy.joules(lambda: steps.append(1), gpu) is None and len(steps) == 1
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_drivers_library(tmp_path: Path) -> None:
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / energy.LIBRARY,
                    HERE / "nvml_fake.c"], check=True)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LIBRARY_CASE)],
                          env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
                          capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pynvml whose card takes 500 J between two readings, beside a torch with that card."""
    made = SimpleNamespace(
        readings=iter(range(10**6, 10**8, 500_000)), nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"570.2", nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda card: next(made.readings))
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d=None: None)
    energy.counter.cache_clear()
    yield made
    energy.counter.cache_clear()


def test_the_package(package: SimpleNamespace) -> None:
    steps: list[int] = []
    found = energy.joules(lambda: steps.append(1), torch.device("cuda"), seconds=0.02)
    assert found == pytest.approx(500.0 / len(steps)) and len(steps) > 1
    assert energy.driver_version() == "570.2"


def test_an_error_of_the_step_is_no_missing_counter(package: SimpleNamespace) -> None:
    def step() -> None:
        raise RuntimeError("the step's own")

    with pytest.raises(RuntimeError, match="the step's own"):
        energy.joules(step, torch.device("cuda"))


def test_no_counter(package: SimpleNamespace) -> None:
    package.readings = iter(())
    assert energy.joules(lambda: None, torch.device("cuda")) is None
    assert energy.joules(lambda: None, torch.device("cpu")) is None
    package.nvmlInit = None  # as without a driver
    energy.counter.cache_clear()
    assert type(energy.counter()).__name__ in ("NoneType", "_Library")


def test_a_profile_says_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_rates(monkeypatch)
    monkeypatch.setattr(record.energy, "joules", lambda step, device: (step(), 1.25)[1])
    got = profiled(trainer())
    assert got.values()["phases"][0]["joules"] == 1.25
    assert "A step took 1.25 J of the GPU." in table.text(got)


def test_on_a_cpu_nothing_counts_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_rates(monkeypatch)
    got = profiled(trainer())
    assert got.values()["phases"][0]["joules"] is None and " J " not in table.text(got)
