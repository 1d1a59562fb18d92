"""Which back-end runs on which GPU, by fakes of the GPU, its driver and the build."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from ffengine.cli import main
from ffengine.ops import backends

SHIPPED = "75-real 80-real 87-real 90-real 100"


@pytest.mark.parametrize(("architectures", "device", "driver", "reason"), [
    (SHIPPED, (7, 5), 13000, None),
    (SHIPPED, (8, 0), 13000, None),
    (SHIPPED, (8, 6), 13000, None),  # sm_80's code
    (SHIPPED, (8, 7), 13000, None),
    (SHIPPED, (9, 0), 13000, None),
    (SHIPPED, (10, 3), 13000, None),
    (SHIPPED, (12, 0), 13000, None),  # PTX of 100
    (SHIPPED, (11, 0), 13010, None),
    (SHIPPED, (12, 0), 0, None),
    (SHIPPED, (7, 0), 13000, "the device is sm_70, the CUDA kernels need sm_75 or newer"),
    (SHIPPED, (6, 1), 13000, "the device is sm_61, the CUDA kernels need sm_75 or newer"),
    ("80-real 90-real", (7, 5), 13000, "this build has 80-real 90-real, the device is sm_75: build "
     "with CMAKE_CUDA_ARCHITECTURES=75"),
    ("90-real", (8, 9), 13000, "this build has 90-real, the device is sm_89: build with "
     "CMAKE_CUDA_ARCHITECTURES=89"),
    # code of sm_80 does not run on an Orin, nor an Orin's elsewhere
    ("80-real", (8, 7), 13000, "this build has 80-real, the device is sm_87: build with "
     "CMAKE_CUDA_ARCHITECTURES=87"),
    ("87-real", (8, 9), 13000, "this build has 87-real, the device is sm_89: build with "
     "CMAKE_CUDA_ARCHITECTURES=89"),
    ("86-real", (8, 0), 13000, "this build has 86-real, the device is sm_80: build with "
     "CMAKE_CUDA_ARCHITECTURES=80"),
    ("90a-real", (10, 0), 13000, "this build has 90a-real, the device is sm_100: build with "
     "CMAKE_CUDA_ARCHITECTURES=100"),
    ("90a", (9, 0), 13000, None),
    ("100f-real", (10, 3), 13000, None),
    ("80-virtual", (9, 0), 13000, None),
    ("90", (8, 0), 13000, "this build has 90, the device is sm_80: build with "
     "CMAKE_CUDA_ARCHITECTURES=80"),
    ("", (9, 0), 13000, "this build has no code, the device is sm_90: build with "
     "CMAKE_CUDA_ARCHITECTURES=90"),
    ("everything", (9, 0), 13000, None),  # no number to judge by
    (SHIPPED, (9, 0), 12080, "the driver supports CUDA 12.8, this build needs 13.0: update the "
     "driver, or build with CUDA 12"),
])
def test_device_reason(architectures: str, device: tuple[int, int], driver: int,
                       reason: str | None) -> None:
    assert backends.device_reason(architectures, device, driver, 13000) == reason


def test_ptx_newer_than_the_driver_is_no_code() -> None:
    assert backends.device_reason("80-real", (8, 0), 13000, 13020) is None
    assert backends.device_reason("80", (9, 0), 13020, 13020) is None
    assert backends.device_reason("80", (9, 0), 13000, 13020) == (
        "this build has 80, the device is sm_90: build with CMAKE_CUDA_ARCHITECTURES=90")


@pytest.mark.parametrize(("torch_cuda", "driver", "reason"), [
    (None, 0, "this torch was built without CUDA"),
    ("13.0", 0, "no CUDA device"),
    ("13.0", 13000, "no CUDA device"),
    ("12.8", 11040, "the driver supports CUDA 11.4, this torch needs 12.8: update the driver"),
])
def test_no_gpu_reason(torch_cuda: str | None, driver: int, reason: str) -> None:
    assert backends.no_gpu_reason(torch_cuda, driver) == reason


class Fake:
    """A machine with a GPU of this capability, and a build for these architectures."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def __call__(self, capability: tuple[int, int], architectures: str = SHIPPED,
                 driver: int = 13000, has_cuda: bool = True, triton: bool = True) -> None:
        built = SimpleNamespace(has_cuda=has_cuda, build_info=lambda: {
            "cuda_architectures": architectures, "cuda_toolkit": "13.0.88"})
        find = backends.importlib.util.find_spec
        for owner, name, value in (
                (backends, "extension", lambda: built),
                (backends, "driver_version", lambda: driver),
                (backends.importlib.util, "find_spec", lambda word: find(word) if triton else None),
                (torch.cuda, "is_available", lambda: True),
                (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "device_count", lambda: 1),
                (torch.cuda, "get_device_name", lambda: "a GPU that no row was measured on"),
                (torch.cuda, "get_device_capability", lambda _: capability)):
            self.patch.setattr(owner, name, value)
        forget()


def forget() -> None:
    for cached in (backends._gpu, backends._build_reason, backends._auto):
        cached.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    yield Fake(monkeypatch)
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(("machine", "chosen"), [
    ({"capability": (9, 0)}, "triton"),
    ({"capability": (9, 0), "triton": False}, "cuda"),  # a machine without Triton
    ({"capability": (7, 5)}, "cuda"),
    ({"capability": (8, 7), "architectures": "80-real", "triton": False}, "reference"),
    ({"capability": (7, 0)}, "reference"),
    ({"capability": (9, 0), "driver": 12080, "triton": False}, "reference"),
    ({"capability": (9, 0), "has_cuda": False, "triton": False}, "reference"),
], ids=str)
def test_auto_passes_on(machine: dict[str, object], chosen: str, fake: Fake) -> None:
    fake(**machine)  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.resolve("local_pass", "auto", "cuda", dtype) == chosen


@pytest.mark.parametrize(("backend", "machine", "why"), [
    ("triton", {"capability": (7, 5)}, "the device is sm_75, Triton needs sm_80 or newer"),
    ("triton", {"capability": (9, 0), "triton": False}, "triton is not installed"),
    ("cuda", {"capability": (7, 0)}, "the device is sm_70, the CUDA kernels need sm_75 or newer"),
    ("cuda", {"capability": (7, 5), "architectures": "80-real 90-real"},
     "this build has 80-real 90-real, the device is sm_75: build with "
     "CMAKE_CUDA_ARCHITECTURES=75"),
    ("cuda", {"capability": (9, 0), "driver": 12080},
     "the driver supports CUDA 12.8, this build needs 13.0: update the driver, or build with CUDA "
     "12"),
    ("cuda", {"capability": (9, 0), "has_cuda": False},
     "the CUDA kernels are not built: install with nvcc on the PATH or CUDA_HOME set"),
], ids=str)
def test_a_backend_asked_for_says_why_not(backend: str, machine: dict[str, object], why: str,
                                          fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(**machine)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as raised:
        backends.resolve("local_pass", backend, "cuda", torch.float32)
    said = str(raised.value)
    assert said.startswith(f"[local_pass] backend '{backend}' cannot run here: {why}; usable: ")
    assert main(["plan", "deeperforward/tinycnn", "--device", "cuda", "--backend", backend]) == 2
    out, err = capsys.readouterr()
    assert not out and why in err and err.count("\n") == 1


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(backends, "driver_version", lambda: 11040)
    assert main(["plan", "deeperforward/tinycnn", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "ffengine: [cli] --device cuda cannot run here: the driver supports CUDA 11.4, this torch "
        "needs 12.8: update the driver; usable: cpu\n")
