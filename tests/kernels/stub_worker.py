"""Launch every variant of bench/aot_variants.py through Triton's own launcher into a driver that
does nothing, and time what the host does for a launch.

    python -m tests.stub_driver tests.kernels.stub_worker [VARIANT...]

Prints one JSON object: `launches`, by variant [[kernel, grid]...], and `host`, by call of a
back-end's wrapper on given tensors {launches, microseconds, by_triton: by Triton's own call}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from ffengine.kernels import batch_pass, forms, local_pass, weight_update

from bench.aot_variants import VARIANTS
from ffengine.ops import config as c
from ffengine.ops.call import make_call
from ffengine.ops.optim import OptimConfig, OptimState
from ffengine.ops.optimizer_step import step_arguments
from ffengine.ops.params import BatchPassCall, BatchPassTensors, LocalPassTensors
from tests import stub_driver

#: Calls a timing takes the least of, each this often in a row.
ROUNDS, REPEATS = 15, 50


def local_pass_call() -> Callable[[], None]:
    """Stage 1 of ResNet-17, every result."""
    zeros, n, k = torch.zeros, 4, 10
    a = zeros(n, 100, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    held = dict.fromkeys(LocalPassTensors._fields)
    held |= {"a": a, "y": zeros(n).long(), "offsets": zeros(k + 1).long(), "z": a.clone(),
             "g": zeros(n, k), "loss": zeros(n), "coef": zeros(n, k), "da": a.clone(),
             "stats": zeros(n, k, 2)}
    tensors = LocalPassTensors(**held)
    call = make_call(a, c.LocalPassConfig(groups=k), c.Tile(), 1.0, 0, True)
    return lambda: local_pass.local_pass(tensors, call)


def optimizer_call() -> Callable[[], None]:
    weight, m, v = torch.zeros(3, 100, 100, 3, 3)
    tensors, _, call = step_arguments(weight, weight.bfloat16(), OptimState(m, v),
                                      OptimConfig("adamw"), 1.0)
    return lambda: weight_update.optimizer_step(tensors, call)


def batch_pass_call() -> Callable[[], None]:
    """Both sweeps."""
    zeros, n, channels = torch.zeros, 4, 100
    a = zeros(n, channels, 8, 8)
    tensors = BatchPassTensors(a, table=zeros(5, channels), weight=zeros(n, channels),
                               moments=zeros(2, n, channels), z=a.clone(), da=a.clone())
    calls = [BatchPassCall(phase, False, False, False, True, False) for phase in (0, 1)]
    return lambda: [batch_pass.batch_pass(tensors, call) for call in calls] and None


def microseconds(call: Callable[[], None]) -> float:
    """Process time of a call, the least of some rounds."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        found.append(time.process_time() - start)
    return round(min(found) / REPEATS * 1e6, 1)


def by_triton(form: forms.Form, grid: tuple[int], tensors: tuple[Any, ...],
              numbers: tuple[Any, ...], usual: bool = True) -> None:
    form.kernel[grid](*tensors, *numbers, **form.constants, **form.options)


def host_time(driver: stub_driver.Stub, call: Callable[[], None]) -> dict[str, Any]:
    with driver.recorded() as launches:
        call()
    ours, launch = microseconds(call), forms.Form.launch
    forms.Form.launch = by_triton
    try:
        return {"launches": len(launches), "microseconds": ours, "by_triton": microseconds(call)}
    finally:
        forms.Form.launch = launch


def launches_of(driver: stub_driver.Stub, call: Callable[[], None]) -> list[Any]:
    with driver.recorded() as launches:
        call()
    return [[launch.kernel, list(launch.grid)] for launch in launches]


def main() -> None:
    driver = stub_driver.DRIVER
    assert driver is not None
    wanted = sys.argv[1:] or VARIANTS
    print(json.dumps({
        "launches": {name: launches_of(driver, VARIANTS[name]) for name in wanted},
        "host": {name: host_time(driver, call()) for name, call in (
            ("local_pass", local_pass_call), ("optimizer_step", optimizer_call),
            ("batch_pass", batch_pass_call))}}))


if __name__ == "__main__":
    main()
