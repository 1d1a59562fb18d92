"""Runs the CUDA kernels on the CPU: their own source, compiled by g++ against the
headers in emulator/, with launches and shared memory rewritten into calls of them."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ffengine.ops.batch_call import BatchPassCall, BatchPassTensors
from ffengine.ops.layout import nchw
from ffengine.ops.local_pass import LocalPassCall, LocalPassTensors
from ffengine.ops.optim import OptimCall, OptimConfig, OptimState, compressed_call

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LAUNCH = re.compile(
    r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?),\s*([\w.]+),\s*(\w+),\s*(\w+)>>>\((.*?)\);", re.S)


def translate(source: str) -> str:
    """CUDA C++ to plain C++ with calls of the emulator."""
    text = re.sub(r"extern __shared__ __align__\(16\) unsigned char (\w+)\[\];",
                  r"unsigned char* \1 = emulator::dynamic_shared();", source)
    text = text.replace("__shared__ ", "static ")
    text = text.replace("defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900", "1")
    text = LAUNCH.sub(r"emulator::launch(\2, \3, \4, [=] { \1(\6); });", text)
    text = re.sub(r'#include "(\w+\.(?:h|cuh))"', rf'#include "{CSRC}/cuda/\1"', text)
    return text.replace('#include "../', f'#include "{CSRC}/')


def build(folder: Path, names: tuple[str, ...] = ("local_pass.cu", "local_pass_cluster.cu"),
          entry: str = "entry.cpp") -> ctypes.CDLL:
    for name in names:
        (folder / f"{name}.cpp").write_text(translate((CSRC / "cuda" / name).read_text()))
    library = folder / "emulated.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas",
         f"-I{HERE / 'emulator'}", f"-I{folder}", f"-I{CSRC}", str(HERE / "emulator" / entry),
         "-o", str(library)], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def numbers(t: LocalPassTensors, call: LocalPassCall) -> list[int]:
    """The integers of a call, in the order of emulator/entry.cpp."""
    n, c, *spatial = t.a.shape
    h, w = spatial if len(spatial) == 2 else (1, t.a[0, 0].numel() if n else 1)
    dtype = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[t.a.dtype]
    seed = call.dropout_seed - (2**64 if call.dropout_seed >= 2**63 else 0)
    return [n, c, h, w, call.groups, call.channels_last, call.equal_groups, dtype, call.phase,
            call.goodness, call.norm, call.norm_rms, call.norm_per_group, call.straight_through,
            call.pool, seed, call.dropout_layer, call.dropout_step, call.dropout_threshold,
            call.loss, call.start, call.half, call.half_start, call.z_channels]


def run(library: ctypes.CDLL, t: LocalPassTensors, call: LocalPassCall, major: int,
        shared: int, dry: bool = False) -> int:
    """One call as on a device of this capability (`dry`: only planned).

    Returns the blocks of its cluster, 0 for two sweeps.
    """
    reals = [call.norm_eps, call.blend, call.keep_scale, call.p0, call.p1, call.p2, call.scale,
             call.da_scale]
    pointers: list[Any] = [None if x is None else x.data_ptr() for x in t]
    ints = numbers(t, call)
    return int(library.emulate((ctypes.c_void_p * len(pointers))(*pointers),
                               (ctypes.c_int64 * len(ints))(*ints),
                               (ctypes.c_double * len(reals))(*reals), major, shared, dry))


def run_batch(library: ctypes.CDLL, t: BatchPassTensors, call: BatchPassCall) -> None:
    """One phase of batch_pass."""
    dtype = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[t.a.dtype]
    ints = [*nchw(t.a), dtype, call.phase, call.channels_last, call.pool, call.norm_first,
            call.squares, call.straight_through]
    pointers: list[Any] = [None if x is None else x.data_ptr() for x in t]
    library.emulate_batch((ctypes.c_void_p * 9)(*pointers), (ctypes.c_int64 * len(ints))(*ints))


def optim_numbers(o: OptimCall) -> tuple[Any, Any]:
    """Integers and reals, in the order of emulator/optimizer_entry.cpp."""
    reals = (o.lr, o.weight_decay, o.beta1, o.beta2, o.eps, o.momentum)
    return (ctypes.c_int64 * 3)(o.kind, o.nesterov, o.step), (ctypes.c_double * 6)(*reals)


def run_step(library: ctypes.CDLL, weight: int, m: int, v: int, grad: int, numel: int,
             inv_scale: float, call: OptimCall) -> None:
    """One optimizer step in fp32 on tensors at these addresses, 0 where there is none."""
    library.emulate_step((ctypes.c_void_p * 4)(weight, m, v, grad), ctypes.c_int64(numel),
                         ctypes.c_double(inv_scale), *optim_numbers(call))


def run_compressed(library: ctypes.CDLL, weight: torch.Tensor, grad: torch.Tensor,
                   state: OptimState, optim: OptimConfig, inv_scale: float) -> None:
    """One step on rounded weights or states."""
    call = compressed_call(weight, state, optim)
    tensors = (weight, grad, state.m, state.v, state.m_scale, state.v_scale)
    pointers: list[Any] = [None if x is None else x.data_ptr() for x in tensors]
    seed = call.seed - 2**64 * (call.seed >> 63)
    library.emulate_compressed(
        (ctypes.c_void_p * 6)(*pointers),
        (ctypes.c_int64 * 5)(weight.numel(), call.format, call.bf16_weight, seed, call.stream),
        ctypes.c_double(inv_scale), *optim_numbers(call.optim))
