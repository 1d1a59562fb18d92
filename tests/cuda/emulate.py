"""Runs the CUDA kernels on the CPU: their own source, compiled by g++ against the headers in
emulator/, with launches and shared memory rewritten into calls of them."""

from __future__ import annotations

import atexit
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from ffengine.ops import backends
from ffengine.ops.call import make_call
from ffengine.ops.config import PHASE_FUSED, LocalPassConfig, Tile
from ffengine.ops.layout import nchw
from ffengine.ops.optim import DTYPE_CODES, OptimCall
from ffengine.ops.params import (
    PHASE_MIDDLE,
    BatchPassCall,
    LinearCall,
    LocalPassCall,
    LocalPassTensors,
    StepCall,
)

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LAUNCH = re.compile(
    r"((\w+)(?:<[^<>;]*>)?)\s*<<<(.*?),\s*([\w.]+),\s*(\w+),\s*(\w+)>>>\((.*?)\);", re.S)
#: What each emulated library is made of, beside emulator/NAME_entry.cpp.
SOURCES = {"local": ("local_pass.cu", "local_pass_cluster.cu"),
           "batch": ("batch_pass.cu", "batch_middle.cu"), "linear": ("linear_step.cu",),
           "optimizer": ("weight_update.cu", "compressed_step.cu")}


class Device(NamedTuple):
    """What calls are planned by (csrc/cuda/plan.h: DeviceCaps); shared: bytes a block may have."""

    major: int
    multiprocessors: int
    l2_bytes: int
    shared: int


#: Little enough of everything that small calls reach every branch.
SMALL_AMPERE, SMALL_HOPPER = Device(8, 4, 1 << 20, 99 << 10), Device(9, 4, 1 << 20, 64 << 10)
A100, H100 = Device(8, 108, 40 << 20, 163 << 10), Device(9, 132, 50 << 20, 227 << 10)
RTX5090 = Device(12, 170, 96 << 20, 99 << 10)


class Plan(NamedTuple):
    """The one-read kernel's (csrc/cuda/plan.h: ClusterPlan); blocks 0: two sweeps."""

    blocks: int
    vector: int
    slab: int
    tile_bytes: int
    shared_bytes: int
    width: int
    lanes: int


class Launch(NamedTuple):
    """A kernel's launch: grid (x, y, z), threads and dynamic shared bytes a block."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int


def translate(source: str) -> str:
    """CUDA C++ to plain C++ with calls of the emulator."""
    text = re.sub(r"extern __shared__ __align__\(16\) unsigned char (\w+)\[\];",
                  r"unsigned char* \1 = emulator::dynamic_shared();", source)
    text = text.replace("__shared__ ", "static ")
    text = text.replace("defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900", "1")
    text = LAUNCH.sub(r'emulator::launch("\2", reinterpret_cast<const void*>(&\1), \3, \4, \5, '
                      r"[=] { \1(\7); });", text)
    text = re.sub(r"cudaLaunchKernelEx\((\S+), (\w+)",
                  r'emulator::launch_config("\2", \1, \2', text)
    return text.replace('#include "../', f'#include "{CSRC}/')


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """One of SOURCES, built on first use."""
    folder = Path(tempfile.mkdtemp(prefix="ffengine-emulated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for header in (*CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cuh")):
        (folder / header.name).write_text(translate(header.read_text()))
    for source in SOURCES[name]:
        (folder / f"{source}.cpp").write_text(translate((CSRC / "cuda" / source).read_text()))
    done = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas",
         f"-I{HERE / 'emulator'}", f"-I{folder}", f"-I{CSRC}",
         str(HERE / "emulator" / f"{name}_entry.cpp"), "-o", str(folder / "emulated.so")],
        check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    found = ctypes.CDLL(str(folder / "emulated.so"))
    found.emulated_failure.restype = found.emulated_launch.restype = ctypes.c_char_p
    return found


def addresses(*given: int) -> Any:
    return (ctypes.c_void_p * len(given))(*(one or None for one in given))


def integers(*given: int) -> Any:
    """Unsigned 64-bit numbers keep their bits."""
    return (ctypes.c_int64 * len(given))(*(one - (one >= 1 << 63) * (1 << 64) for one in given))


def reals(*given: float) -> Any:
    return (ctypes.c_double * len(given))(*given)


class Extension:
    """ffengine._C as the ops call it, its CUDA functions run by the emulator.

    Attributes:
        device: what the calls plan by.
        dry: launches are checked and listed, nothing runs: any address will do.
        calls, plans, launches: the functions called, local_pass's plans, the last call's launches.
    """

    has_cuda = True

    def __init__(self, device: Device = SMALL_AMPERE) -> None:
        self.device, self.dry = device, False
        self.calls: list[str] = []
        self.plans: list[Plan] = []
        self.launches: list[Launch] = []
        self._real = backends.extension()

    def __getattr__(self, name: str) -> Any:
        """The rest is the CPU's."""
        return getattr(self._real, name)

    def local_pass_cuda(self, tensors: Sequence[int], shape: Sequence[int], dtype: int,
                        call: LocalPassCall, stream: int) -> None:
        c, planned = call, integers(*[0] * len(Plan._fields))
        self._run("local", "local_pass", addresses(*tensors), integers(
            *shape, c.groups, c.channels_last, c.equal_groups, dtype, c.phase, c.goodness, c.norm,
            c.norm_rms, c.norm_per_group, c.straight_through, c.pool, c.dropout_seed,
            c.dropout_layer, c.dropout_step, c.dropout_threshold, c.loss, c.start, c.half,
            c.half_start, c.z_channels),
            reals(c.norm_eps, c.blend, c.keep_scale, c.p0, c.p1, c.p2, c.scale, c.da_scale),
            integers(*self.device), planned)
        self.plans.append(Plan(*planned))

    def batch_pass_cuda(self, tensors: Sequence[int], shape: Sequence[int], dtype: int,
                        call: BatchPassCall, stream: int) -> None:
        c = call
        sweep = (*shape, dtype, c.phase, c.channels_last, c.pool, c.norm_first, c.squares,
                 c.straight_through)
        if c.phase != PHASE_MIDDLE:
            self._run("batch", "batch_pass", addresses(*tensors), integers(*sweep),
                      integers(*self.device))
            return
        self._run("batch", "batch_middle", addresses(*tensors), integers(
            *sweep, c.groups, c.equal_groups, c.goodness, c.loss, c.training, c.use_running,
            c.pixels, c.pixels_z),
            reals(c.momentum, c.eps, c.p0, c.p1, c.p2, c.scale, c.da_scale))

    def linear_prepare_cuda(self, tensors: Sequence[int], shape: Sequence[int], dtype: int,
                            call: LinearCall, stream: int) -> None:
        self._run("linear", "linear_prepare", addresses(*tensors), integers(*shape), dtype,
                  int(call.rms), ctypes.c_double(call.eps))

    def linear_finish_cuda(self, tensors: Sequence[int], shape: Sequence[int], dtype: int,
                           call: LinearCall, stream: int) -> None:
        self._run("linear", "linear_finish", addresses(*tensors), integers(*shape), dtype,
                  ctypes.c_int64(call.chunk))

    def optimizer_step_cuda(self, tensors: Sequence[int], shape: Sequence[int], dtype: int,
                            call: StepCall, stream: int) -> None:
        grad, weight, m, v, _, _, half, row = tensors
        self._run("optimizer", "optimizer_step", addresses(weight, m, v, grad, half, row),
                  integers(*shape, dtype, call.half_dtype), ctypes.c_double(call.inv_scale),
                  *optim_numbers(call.optim))

    def compressed_step_cuda(self, tensors: Sequence[int], shape: Sequence[int], dtype: int,
                             call: StepCall, stream: int) -> None:
        grad, weight, m, v, m_scale, v_scale, half, row = tensors
        self._run("optimizer", "compressed_step",
                  addresses(weight, m, v, grad, half, row, m_scale, v_scale),
                  integers(*shape, dtype, call.half_dtype, call.format, call.bf16_weight,
                           call.seed, call.stream), ctypes.c_double(call.inv_scale),
                  *optim_numbers(call.optim))

    def _run(self, name: str, function: str, *arguments: Any) -> None:
        """ValueError of what a device or the kernels' own checks refuse."""
        self.calls.append(function)
        found = library(name)
        found.emulate_dry(self.dry)
        status = getattr(found, f"emulate_{function}")(*arguments)
        self.launches = list(launches(found))
        if status < 0:
            raise ValueError(found.emulated_failure().decode())


def optim_numbers(o: OptimCall) -> tuple[Any, Any]:
    """Integers and reals, in the order of emulator/optimizer_entry.cpp."""
    return (integers(o.kind, o.nesterov, o.step),
            reals(o.lr, o.weight_decay, o.beta1, o.beta2, o.eps, o.momentum))


def launches(found: ctypes.CDLL) -> Iterator[Launch]:
    """What a library's last call launched."""
    numbers = integers(*[0] * 6)
    for i in range(1_000_000):
        name = found.emulated_launch(i, numbers)
        if name is None:
            return
        x, y, z, threads, shared, cluster = numbers
        yield Launch(name.decode(), (x, y, z), threads, shared, cluster)


def install(monkeypatch: pytest.MonkeyPatch, device: Device = SMALL_AMPERE) -> Extension:
    """Lets backend="cuda" take CPU tensors and run emulated, until the test's end."""
    extension, why_not = Extension(device), backends.why_not

    def reason(backend: str, where: str, dtype: torch.dtype) -> str | None:
        return why_not(backend, where, dtype) if backend != "cuda" or dtype is torch.float64 \
            else None

    monkeypatch.setattr(backends, "extension", lambda: extension)
    monkeypatch.setattr(backends, "why_not", reason)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    return extension


#: An address that is aligned to everything and read by nobody.
ANYWHERE = 1 << 20


def planned(device: Device, shape: tuple[int, ...], config: LocalPassConfig,
            layout: torch.memory_format = torch.contiguous_format,
            dtype: torch.dtype = torch.float32, phase: int = PHASE_FUSED) -> Extension:
    """After a call of local_pass for z, loss and da on this device; only its launches are checked,
    so shapes may be of any size."""
    extension = Extension(device)
    extension.dry = True
    a = torch.empty(shape, device="meta", dtype=dtype).contiguous(memory_format=layout)
    there = dict.fromkeys(("a", "y", "offsets", "z", "g", "loss", "coef", "da", "stats"), ANYWHERE)
    extension.local_pass_cuda(
        [there.get(name, 0) for name in LocalPassTensors._fields], nchw(a), DTYPE_CODES[dtype],
        make_call(a, config, Tile(), 1.0, phase, phase == PHASE_FUSED), 0)
    return extension
