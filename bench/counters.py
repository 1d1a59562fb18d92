"""Exact counters of this tree: what a change may not move without a new baseline.

    python -m bench.counters [--json FILE] [--parts memory,triton] [--device cuda] [--small]

Six parts, each with what its numbers depend on beside the code (`needs`):
  memory       bytes of a training step: planned; metered at the peak, by kind
  launches     kernels of ours and ops of the library that the same step calls
  bytes_moved  what each op declares that it must move
  extra_bytes  what each op declares that it holds beside its arguments
  triton       registers, spills, shared memory, loads and stores of each kernel and architecture
  nvcc         the same of the CUDA kernels in the built extension
Seconds are never here: see bench/timing.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import declared, machine_code, results, steps
from ffengine.env import instruction_set
from ffengine.ops import backends

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 87, 100)
PARTS = ("memory", "launches", "bytes_moved", "extra_bytes", "triton", "nvcc")

Part = dict[str, Any]
#: Most a step may hold, as a part of its plan.
PLANNED = 1.02


def processor() -> str:
    """What packing buffers depend on, ours and the library's: instruction sets and inner caches."""
    caches = [Path(f"/sys/devices/system/cpu/cpu0/cache/index{i}/size") for i in (0, 2)]
    inner = "/".join(c.read_text().strip() for c in caches if c.exists())
    return f"{platform.machine()} {instruction_set()} {inner}".strip()


def device_needs(device: str) -> dict[str, str]:
    """What a step's bytes and launches depend on."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {"processor": processor(), "torch": torch.__version__}


def collect(parts: tuple[str, ...] = PARTS, device: str = "cpu",
            full: bool = True) -> dict[str, Part]:
    """The parts by name; compilers run beside the steps. full: also networks at papers' sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(2) as pool:
            compiled = pool.map(compile_triton, ARCHITECTURES if "triton" in parts else ())
            found: dict[str, Part] = {}
            if "memory" in parts or "launches" in parts:
                found |= of_steps(parts, device, full)
            if "bytes_moved" in parts:
                found["bytes_moved"] = {"needs": {}, "rows": dict(declared.moved())}
            if "extra_bytes" in parts:
                found["extra_bytes"] = {"needs": {"processor": processor()},
                                        "rows": dict(declared.extra())}
            if "nvcc" in parts:
                found["nvcc"] = nvcc_part()
            if "triton" in parts:
                found["triton"] = triton_part(compiled)
    finally:
        torch.set_num_threads(threads)
    return {name: found[name] for name in parts}


def of_steps(parts: tuple[str, ...], device: str, full: bool) -> dict[str, Part]:
    """Memory and launches: two views of the same steps; a step that fails fails in both."""
    rows = dict(steps.rows(device, full))
    found: dict[str, Part] = {}
    for part in ("memory", "launches"):
        if part in parts:
            found[part] = {"needs": device_needs(device), "rows": {
                name: row.get(part, row) for name, row in rows.items()}}
    return found


def quiet_environment(tree: Path = ROOT) -> dict[str, str]:
    """The environment of a process that compiles or counts: a tree first, and no interpreter."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(tree), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path}


def compile_triton(arch: int) -> list[dict[str, Any]] | str:
    """Every kernel for one architecture, compiled anew in a process of its own; or why not."""
    if find_spec("triton") is None:
        return "triton is not installed"
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run([sys.executable, "-m", "bench.aot", str(arch)], text=True, cwd=ROOT,
                              capture_output=True, check=False,
                              env={**quiet_environment(), "TRITON_CACHE_DIR": cache})
    if done.returncode:
        return " ".join(done.stderr.strip().splitlines()[-1:])
    return list(json.loads(done.stdout.splitlines()[-1]))


def triton_part(compiled: Iterator[list[dict[str, Any]] | str]) -> Part:
    if find_spec("triton") is None:
        return {"needs": {}, "absent": "triton is not installed"}
    rows: dict[str, Any] = {}
    for arch, kernels in zip(ARCHITECTURES, compiled, strict=True):
        if isinstance(kernels, str):
            rows[f"sm_{arch}"] = {"failed": kernels}
            continue
        for kernel in kernels:
            name = unique(rows, f"sm_{arch} {kernel.pop('variant')} {kernel.pop('kernel')}")
            rows[name] = kernel
    return {"needs": {"triton": version("triton")}, "rows": rows}


def unique(rows: dict[str, Any], name: str) -> str:
    """A call may launch a kernel in several forms."""
    count = 1
    while (numbered := name if count == 1 else f"{name} #{count}") in rows:
        count += 1
    return numbered


def nvcc_part() -> Part:
    ext = backends.extension()
    if ext is None or ext.__file__ is None:
        return {"needs": {}, "absent": "the C++ kernels are not built"}
    compiler = machine_code.compiler(Path(ext.__file__))
    if compiler is None or not ext.has_cuda:
        return {"needs": {}, "absent": "the extension was built without CUDA kernels"}
    if machine_code.tool() is None:
        return {"needs": {}, "absent": "there is no cuobjdump"}
    architectures = str(ext.build_info()["cuda_architectures"])
    return {"needs": {"nvcc": compiler, "architectures": architectures},
            "rows": machine_code.kernels(Path(ext.__file__))}


def failures(parts: dict[str, Part]) -> list[str]:
    """A line for each row that has no counters, or whose step held more than its plan says."""
    rows = [(part, name, row) for part, content in parts.items()
            for name, row in content.get("rows", {}).items()]
    return [f"{part}: {name}: failed: {row['failed']}" for part, name, row in rows
            if "failed" in row] + [
        f"{part}: {name}: failed: {row['peak_bytes']} bytes metered, {row['planned_bytes']} planned"
        for part, name, row in rows
        if row.get("peak_bytes", 0) > PLANNED * row.get("planned_bytes", math.inf)]


def write(path: Path, parts: dict[str, Part], device: str = "cpu") -> None:
    results.write(path, "counters", {"device": device, "parts": parts})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true",
                        help="steps of the small networks alone")
    args = parser.parse_args(argv)
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        print(f"bench.counters: [bench] --parts expected some of {', '.join(PARTS)}, got "
              f"{', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    parts = collect(tuple(args.parts.split(",")), args.device, not args.small)
    if args.json is not None:
        write(args.json, parts, args.device)
    for name, part in parts.items():
        print(f"{name}: " + (part["absent"] if "absent" in part else f"{len(part['rows'])} rows"))
    failed = failures(parts)
    print("\n".join(failed)) if failed else None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
