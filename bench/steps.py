"""One training step of every network, counted: bytes by the plan and the meter, and launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ffengine as ff
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.memory.plan import Plan
from ffengine.engine.memory.plans import Memory
from ffengine.ops import backends
from tests.models import every

#: Rows of a batch for the small forms of every network.
BATCH = 8
#: Networks at their papers' sizes: (model, batch, settings of the trainer).
FULL: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("deeperforward/resnet17", 32, {"precision": "fp32"}),
    ("deeperforward/resnet17", 32, {"precision": "bf16"}),
    ("deeperforward/resnet17", 32, {"precision": "fp32", "memory_budget": "395MB"}),
    ("deeperforward/resnet17", 32, {"precision": "fp32", "states": "bf16"}),
    ("deeperforward/resnet17", 32, {"precision": "fp32", "states": "8bit"}),
    ("deeperforward/resnet17", 32, {"precision": "bf16", "states": "8bit", "weights": "bf16"}),
    ("fflib/ffnn", 128, {"precision": "fp32"}),
    ("sn/mlp", 128, {"precision": "fp32"}),
    ("cwcomp/cfse", 32, {"precision": "fp32"}),
)
#: Library calls that start nothing: views and allocations.
IDLE = ("aten::empty", "aten::new_empty", "aten::resize_")

Row = dict[str, Any]


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is on, calls of the extension's kernels and of the library's ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.library: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        if not func.is_view and not func.name().startswith(IDLE):
            self.library[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Launches:
        self._extension = backends.extension
        found = self._extension()
        if found is not None:
            counting = _Counting(found, self.kernels)
            backends.extension = lambda: counting  # type: ignore[assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        backends.extension = self._extension


class _Counting:
    """The extension module, each call of a kernel counted."""

    def __init__(self, module: ModuleType, counts: Counter[str]) -> None:
        self._module, self._counts = module, counts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name.endswith(("_cpu", "_cuda")) and "scratch" not in name:
            self._counts[name] += 1
        return found


def rows(device: str = "cpu", full: bool = True) -> Iterator[tuple[str, Row]]:
    """(name, {"memory": ..., "launches": ...} or {"failed": reason}) of every network.

    full: also at the papers' sizes.
    """
    for model in every.NAMES:
        planned = not model.startswith("bp/")
        for precision in ("fp32", "bf16"):
            for leanest in (False, True) if planned else (False,):
                yield (f"{model} small {precision} batch {BATCH}{' leanest' * leanest}",
                       _tried(model, BATCH, {"precision": precision}, every.options(model),
                              leanest, device))
    for model, batch, settings in FULL if full else ():
        said = " ".join([settings["precision"], *(
            f"{k} {v}" for k, v in settings.items() if k != "precision")])
        yield f"{model} {said} batch {batch}", _tried(model, batch, settings, {}, False, device)


def _tried(*what: Any) -> Row:
    try:
        return counted(*what)
    except Exception as reason:  # a network that cannot step is a failing row, never a missing one
        return {"failed": f"{type(reason).__name__}: {' '.join(str(reason).split())}"[:300]}


def counted(model: str, batch: int, settings: dict[str, Any], options: dict[str, Any],
            leanest: bool = False, device: str = "cpu") -> Row:
    """The second step of a network, whose states are there, under the meter, and the third under
    the counters, which would see the meter's own measuring.

    Args:
        settings: of the trainer.
        options: constructor arguments of the model.
        leanest: by the plan with the lowest peak, not by the trainer's own choice.
    """
    kept = {name: settings[name] for name in ("states", "weights") if name in settings}
    others = {name: value for name, value in settings.items() if name not in kept}

    def trainer(plan: Plan | None = None) -> ff.Trainer:
        torch.manual_seed(0)
        # costs measured here would choose other plans from run to run
        return ff.Trainer(ff.models.create(model, **options), epochs=2, lr=1e-3, batch_size=batch,
                          device=device, progress=False, **others,
                          memory=Memory(**kept, costs="modelled", plan=plan))

    made = trainer()
    if leanest:
        made = trainer(plan=made.planning.planner(batch).smallest())
    x, y = (t.to(device) for t in every.batch(made.net, batch))
    made.step(x, y)
    with MemoryMeter(parameter=made.net.parameters(), state=made.optimizer.state_tensors(),
                     feature=[x, y]) as meter:
        made.step(x, y)
    with Launches() as launches:
        made.step(x, y)
    plan: Plan | None = made.plan
    memory = {"peak_bytes": meter.report.peak_bytes, **meter.report.at_peak}
    if plan is not None and made.schedule.planned:
        memory["planned_bytes"] = plan.peak_bytes
    kernels = sum(launches.kernels.values())
    if device == "cuda":
        kernels = device_kernels(made, x, y)
        memory["allocated_bytes"] = allocated(made, x, y)
    return {"memory": memory,
            "launches": {"kernels": kernels, "library_ops": sum(launches.library.values())}}


def device_kernels(made: ff.Trainer, x: torch.Tensor, y: torch.Tensor) -> int:
    """Kernels that a step starts on the GPU, the library's among them."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        made.step(x, y)
        torch.cuda.synchronize()
    return sum(e.device_type() == DeviceType.CUDA and not e.name().startswith(("Memcpy", "Memset"))
               for e in seen.profiler.kineto_results.events())


def allocated(made: ff.Trainer, x: torch.Tensor, y: torch.Tensor) -> int:
    """The allocator's own peak of a step, from what stays between steps."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    made.step(x, y)
    return torch.cuda.max_memory_allocated()
