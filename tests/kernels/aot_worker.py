"""Compile, for a GPU that need not be there, exactly the kernels that calls on it would launch.

Run as `python -m tests.kernels.aot_worker ARCH [VARIANT...]` in its own process (the interpreter
cannot share one); prints a JSON list of {variant, kernel, registers, spills, loads, stores}, or
with --batches the number of forms one layer compiles to over many batches. Launches are
recorded instead of run: Triton's own binder sees the real arguments, so the specialisation, the
divisibility attributes and the options are those of a real call.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from ffengine.kernels import linear_step, weight_update
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from ffengine.ops import config as c
from ffengine.ops import local_pass as op
from tests.kernels import aot_batch_pass

COMPILED: list[Any] = []
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


def sweep(shape: tuple[int, ...], config: c.LocalPassConfig, dtype: torch.dtype = torch.float32,
          channels_last: bool = False, tile: c.Tile = op.WHOLE) -> None:
    """One local_pass of every result, through the op's own argument layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    n, k = shape[0], len(config.offsets(shape[1])) - 1
    h_prev = torch.zeros_like(a) if config.blend != 1.0 else None
    op._run_kernel(op._Request(
        a, torch.zeros(n, dtype=torch.int64), config, torch.zeros(n, k), h_prev, None, True, True,
        tile, op._pooled_shape(shape, config), 1.0), "triton")


def step(kind: str, count: int = 2) -> None:
    """One optimizer step."""
    optim = SimpleNamespace(kind=kind, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                            momentum=0.9, nesterov=True)
    weight_update.optimizer_step(*torch.zeros(4, 4096), optim=optim, step=count, inv_scale=1.0)


def surround(dtype: torch.dtype, n: int = 64, scaled: bool = True) -> None:
    """linear_step's two passes around a tile's local_pass, 784 -> 512."""
    x, a = torch.zeros(n, 784, dtype=dtype), torch.zeros(n, 512, dtype=dtype)
    bias, scale, norm = torch.zeros(512), torch.zeros(n), c.Norm("length")
    if scaled:
        linear_step.prepare(x, a, a, bias, scale, norm)
    else:
        linear_step.prepare(x, x, torch.zeros_like(x), None, None, norm)
    linear_step.finish(a, scale if scaled else None, torch.zeros(-(-n // 64), 512), 64)


DROP = c.Dropout(0.2, 1, 2, 3)
CONV, LINEAR = (2, 128, 16, 16), (2, 2048)
VARIANTS = {
    "group-fp32": lambda: sweep(CONV, c.LocalPassConfig(groups=8)),
    "group-bf16": lambda: sweep(CONV, c.LocalPassConfig(groups=8), torch.bfloat16),
    "dropout-fp32": lambda: sweep(CONV, c.LocalPassConfig(groups=8, dropout=DROP)),
    "dropout-nhwc-bf16": lambda: sweep(
        CONV, c.LocalPassConfig(groups=8, dropout=DROP), torch.bfloat16, True),
    "dropout-pool-nhwc-fp32": lambda: sweep(
        CONV, c.LocalPassConfig(groups=8, dropout=DROP, pool="max2", goodness="mean_sq",
                                loss=c.cwg()), channels_last=True),
    "pool-sum-fp32": lambda: sweep(
        CONV, c.LocalPassConfig(groups=8, pool="max2", goodness="sum_sq", loss=c.sparsemax())),
    "group-nhwc-fp32": lambda: sweep(CONV, c.LocalPassConfig(groups=8, loss=c.cwc()),
                                     channels_last=True),
    "length-linear-fp16": lambda: sweep(
        LINEAR, c.LocalPassConfig(groups=1, goodness="sum_sq", loss=c.symba(),
                                  norm=c.Norm("length")), torch.float16),
    "blend-linear-fp32": lambda: sweep(
        LINEAR, c.LocalPassConfig(groups=1, goodness="mean_sq", loss=c.threshold(), blend=0.7,
                                  norm=c.Norm("length", length="l2"))),
    "unequal-k1000-fp32": lambda: sweep(
        (2, 1024, 4, 4), c.LocalPassConfig(groups=(*range(1000), 1024), norm=c.Norm("layer"),
                                           loss=c.pvn())),
    "linear-step-fp32": lambda: surround(torch.float32),
    "linear-step-bf16": lambda: surround(torch.bfloat16, scaled=False),
    "adamw": lambda: step("adamw"),
    "sgd": lambda: step("sgd"),
}

VARIANTS |= aot_batch_pass.VARIANTS



def describe(variant: str, kernel: Any, folder: Path) -> dict[str, Any]:
    """Resource usage from the machine code and memory instructions from the PTX."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOL, "--dump-resource-usage", cubin], capture_output=True, text=True,
                           check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    ptx = kernel.asm["ptx"]
    return {
        "variant": variant, "kernel": kernel.metadata.name, "registers": int(fields["REG"]),
        "spills": int(fields["STACK"]) + int(fields["LOCAL"]), "shared": int(fields["SHARED"]),
        "loads": re.findall(r"ld\.global[\w.:]*", ptx),
        "stores": re.findall(r"st\.global[\w.:]*", ptx),
    }


def specialisations() -> dict[str, int]:
    """Compiled forms per kernel when batch, tile, seed and step vary and the layer does not."""
    for n, value in ((1, 0), (2, 1), (3, 16), (16, 2**31 + 1), (33, 2**32 - 1)):
        drop = c.Dropout(0.2 + 0.01 * n, value << 16, value, value)
        sweep((n, 128, 8, 8), c.LocalPassConfig(groups=8, dropout=drop), tile=c.Tile(n, 4 * n))
        step("adamw", n)
        surround(torch.float32, 64 * n)
    forms: dict[str, set[str]] = {}
    for kernel in COMPILED:
        forms.setdefault(kernel.metadata.name, set()).add(kernel.metadata.hash)
    return {name: len(hashes) for name, hashes in forms.items()}


def main() -> None:
    target_arch(int(sys.argv[1]))
    if sys.argv[2:] == ["--batches"]:
        print(json.dumps(specialisations()))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in sys.argv[2:] or VARIANTS:
            COMPILED.clear()
            VARIANTS[variant]()
            rows += [describe(variant, kernel, Path(folder)) for kernel in COMPILED]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
