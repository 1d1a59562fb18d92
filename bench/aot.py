"""Compile, for a GPU that need not be there, exactly the kernels that calls on it would launch.

Run as `python -m bench.aot ARCH [VARIANT...]` in its own process (Triton's interpreter cannot share
one); prints a JSON list of {variant, kernel, counters of bench/machine_code.py}, or with --batches
the number of forms one layer compiles to over many batches.
Launches are recorded instead of run: Triton's own binder sees the real arguments, so the
specialisation, the divisibility attributes and the options are those of a real call.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from bench import machine_code
from bench.aot_variants import VARIANTS, compressed, step, surround, sweep
from ffengine.ops import config as c

COMPILED: list[Any] = []


def target_arch(arch: int) -> None:
    """Make `arch` the active device and record compiled kernels instead of launching them."""
    target = GPUTarget("cuda", arch, 32)
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0,
        get_current_stream=lambda device: 0))

    def compile_only(self: JITFunction, grid: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> None:
            assert kwargs["enable_fp_fusion"] is True
            COMPILED.append(self.run(*args, grid=grid, warmup=True, **kwargs))
        return record

    JITFunction.__getitem__ = compile_only


def describe(variant: str, kernel: Any, folder: Path) -> dict[str, Any]:
    """Resource usage from the machine code and memory instructions from the PTX."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    ((_, usage),) = machine_code.usages(cubin)
    return {
        "variant": variant, "kernel": kernel.metadata.name, **usage,
        "shared": kernel.metadata.shared,  # what a launch asks for; the cubin has the static part
        **machine_code.counted(machine_code.ptx_accesses(kernel.asm["ptx"]))}


def compile_all(arch: int, variants: list[str]) -> list[dict[str, Any]]:
    """One row a kernel of the named variants (default: all)."""
    target_arch(arch)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants or VARIANTS:
            COMPILED.clear()
            VARIANTS[variant]()
            rows += [describe(variant, kernel, Path(folder)) for kernel in COMPILED]
    return rows


def specialisations(arch: int) -> dict[str, int]:
    """Compiled forms per kernel when batch, tile, seed and step vary and the layer does not."""
    target_arch(arch)
    for n, value in ((1, 0), (2, 1), (3, 16), (16, 2**31 + 1), (33, 2**32 - 1)):
        drop = c.Dropout(0.2 + 0.01 * n, value << 16, value, value)
        sweep((n, 128, 8, 8), c.LocalPassConfig(groups=8, dropout=drop), tile=c.Tile(n, 4 * n))
        step("adamw", n)
        compressed("8bit", torch.bfloat16, value, value << 16)
        surround(torch.float32, 64 * n)
    forms: dict[str, set[str]] = {}
    for kernel in COMPILED:
        forms.setdefault(kernel.metadata.name, set()).add(kernel.metadata.hash)
    return {name: len(hashes) for name, hashes in forms.items()}


def main() -> None:
    arch, wanted = int(sys.argv[1]), sys.argv[2:]
    if wanted == ["--batches"]:
        print(json.dumps(specialisations(arch)))
    else:
        print(json.dumps(compile_all(arch, wanted)))


if __name__ == "__main__":
    main()
