"""The memory meter: live storage bytes by lifetime, at dispatch level, on any device.

Every storage that appears while the meter is on is counted from its first use to its death, under
parameter / state / gradient / feature; scratch is what lives only inside one call: packing buffers
that kernels declare, and temporaries that a library op allocates and frees again, which are
measured once per signature (on the CPU from the allocator's own events).
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# The profiler would otherwise print two lines a measurement; read when its library starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ffengine.engine.memory.dry_tensor import with_memory
from ffengine.ops import memory_accounting
from ffengine.ops.memory_accounting import is_fake, listening, tensors_in

KINDS = ("parameter", "state", "gradient", "feature", "scratch")
#: Ops that take working memory of their own; everything else allocates its outputs only.
LIBRARY_OPS = ("conv", "mm", "addmm", "bmm", "linear", "group_norm", "layer_norm", "_softmax",
               "pool", "mkldnn", "fused_adam", "foreach")

#: Ops that read one dtype and write another without a copy of their own.
CONVERSIONS = ("copy", "_like", "new_")

#: Peak bytes inside a library op, by signature; a profile costs milliseconds, so all meters share.
_inside: dict[Any, int] = {}
#: The same as a dry run expects them.
_expected: dict[Any, int] = {}
#: The same at two numbers of samples, by the signature of one: bytes lie on a line between them.
_lines: dict[Any, tuple[int, ...]] = {}
#: Output pixels of a call from which the library's choice of kernel no longer changes (measured on
#: AVX-512 and AMX: the last change is at 64).
SETTLED_PIXELS = 256

#: Told (live bytes by kind, bytes inside the call that runs) at every change that a meter made in
#: this context sees.
listeners: ContextVar[tuple[Callable[[dict[str, int], int], None], ...]] = ContextVar(
    "meter's listeners", default=())
#: torch's profiler is one for all threads.
_profiler = threading.RLock()


@dataclass
class MemoryReport:
    """Bytes live at the moment of the peak, by kind, and their sum."""

    peak_bytes: int = 0
    at_peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def floor_bytes(self) -> int:
        return self.at_peak["parameter"] + self.at_peak["state"]

    @property
    def working_bytes(self) -> int:
        return self.peak_bytes - self.floor_bytes


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`with MemoryMeter(parameter=..., state=...) as meter:` … `meter.report.peak_bytes`.

    Args:
        known: tensors live at the start, by kind; a batch given to the step is a "feature".
    """

    def __init__(self, **known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report = MemoryReport()
        self._listeners = listeners.get()
        self._kernels = listening(self._note)
        self._live = dict.fromkeys(KINDS, 0)
        self._refs: dict[int, Any] = {}
        for kind, tensors in known.items():
            for tensor in tensors:
                self.track(tensor, kind)

    def track(self, tensor: torch.Tensor, kind: str = "feature") -> None:
        """Count a tensor's storage under `kind` until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._refs or storage.nbytes() == 0:
            return
        size = storage.nbytes()
        self._live[kind] += size

        def died(_: Any, key: int = key, kind: str = kind, size: int = size) -> None:
            if self._refs.pop(key, None) is not None:
                self._live[kind] -= size
                self._note()

        self._refs[key] = weakref.ref(storage, died)
        self._note()

    @property
    def live_bytes(self) -> int:
        """What is live now."""
        return sum(self._live.values())

    def _note(self, inside: int = 0) -> None:
        for tell in self._listeners:
            tell(self._live, inside)
        total = self.live_bytes + inside
        if total > self.report.peak_bytes:
            self.report.peak_bytes = total
            self.report.at_peak = {**self._live, "scratch": self._live["scratch"] + inside}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own way of keeping its compiler out of a meter imports all of it, 160 MB."""
        return False

    def __enter__(self) -> MemoryMeter:
        if "torch._dynamo" in sys.modules:
            keep_the_compiler_out()
        self._kernels.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._kernels.__exit__(*exc)
        self._listeners = ()  # of what dies later

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in(args, kwargs))
        for t in given:
            self.track(t)
        name = func.name()
        if any(word in name for word in LIBRARY_OPS) or casts(name, args, kwargs):
            out = self._library_call(func, args, kwargs, dry=any(map(is_fake, given)))
        else:
            out = func(*args, **kwargs)
        for t in tensors_in(out):
            self.track(t, memory_accounting.kind.get())
        return out

    def _library_call(self, func: Any, args: Any, kwargs: Any, dry: bool) -> Any:
        """Run a library op; its inside is measured at the first call of a signature."""
        key = (func.name(), *(signature(leaf) for leaf in tree_leaves((args, kwargs))))
        if dry:
            out = func(*args, **kwargs)
            if key not in _expected:
                _expected[key] = expected_inside(func, args, kwargs, out)
            self._note(_expected[key])
            return out
        if key not in _inside:
            out, _inside[key] = call_measured(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        self._note(_inside[key])
        return out


@functools.cache
def keep_the_compiler_out() -> None:
    """What a meter does is not for torch.compile, where somebody uses it."""
    disable: Any = torch.compiler.disable
    MemoryMeter.__torch_dispatch__ = disable(  # type: ignore[method-assign]
        MemoryMeter.__torch_dispatch__)


def casts(name: str, args: Any, kwargs: Any) -> list[int]:
    """Bytes of the copies that a CPU op makes of operands in another dtype than it computes in:
    elementwise ops on two dtypes, reductions into a wider one. Empty for any other op."""
    operands = [t for t in tensors_in(args, kwargs) if t.dim() and t.is_floating_point()]
    wanted = [t.dtype for t in operands] + [d for d in (kwargs.get("dtype"),) if d is not None]
    if len(set(wanted)) < 2 or operands[0].device.type != "cpu" or any(
            word in name for word in CONVERSIONS):
        return []
    common = functools.reduce(torch.promote_types, wanted)
    written = [operands[0]] if name.split(".")[0].endswith("_") else []
    return [t.numel() * common.itemsize for t in (*operands, *written) if t.dtype is not common]


def signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type)
    return leaf if isinstance(leaf, (int, float, str, bool, type(None))) else str(leaf)


def call_measured(func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
    """(result, peak bytes the call held beside everything live before it, outputs included)."""
    device = next((t.device for t in tensors_in(args, kwargs)), torch.device("cpu"))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = func(*args, **kwargs)
        return out, torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return func(*args, **kwargs), 0
    with allocator_events() as events:
        out = func(*args, **kwargs)
    return out, events.peak


def expected_inside(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """`call_measured`'s bytes for a call on dry tensors that answered `out`.

    Measured on zeros; a call on maps, on few samples where more would not change it. On a GPU the
    library's workspace is not part of a dry run: `allocated` shows it.
    """
    outputs = list(tensors_in(out))
    given = {t.untyped_storage()._cdata for t in tensors_in(args, kwargs)}
    results = sum(t.numel() * t.element_size() for t in outputs
                  if t.untyped_storage()._cdata not in given)  # else it was written in place
    if any(t.device.type != "cpu" for t in outputs):
        return results
    copies = casts(func.name(), args, kwargs)
    if copies:
        return sum(copies) + results
    first = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if first is None or first.dim() != 4 or not outputs:
        return _on_zeros(func, args, kwargs, None)
    n = first.shape[0]
    few = max(2, -(-SETTLED_PIXELS // max(math.prod(outputs[0].shape[2:]), 1)))
    if n <= 2 * few:
        return _on_zeros(func, args, kwargs, None)
    key = (func.name(), *(
        (tuple(t.shape[1:]), t.stride()[1:], t.dtype) if _batched(func, t, i) else signature(t)
        for i, t in enumerate((*args, *kwargs.values()))))
    if key not in _lines:
        _lines[key] = tuple(_on_zeros(func, args, kwargs, k) for k in (few, 2 * few))
    low, high = _lines[key]
    return low + (high - low) * (n - few) // few


def _batched(func: Any, t: Any, position: int | None) -> bool:
    """The argument has the batch's extent: the second one of a forward convolution is its weight.
    """
    return isinstance(t, torch.Tensor) and t.dim() == 4 and (
        position == 0 or (position == 1 and "backward" in func.name()) or "pool" in func.name())


def _on_zeros(func: Any, args: Any, kwargs: Any, samples: int | None) -> int:
    """`call_measured` on zeros like dry tensors; `samples`: the batch's extent, cut to these."""
    def made(t: Any, position: int | None) -> Any:
        if isinstance(t, (list, tuple)):
            return [made(each, position) for each in t]
        if not isinstance(t, torch.Tensor):
            return t
        size = (samples, *t.shape[1:]) if samples and _batched(func, t, position) else t.shape
        return torch.empty_strided(size, t.stride(), dtype=t.dtype).zero_()

    with with_memory(), torch.no_grad():
        real = [made(t, i) for i, t in enumerate(args)]
        named = {k: made(t, None) for k, t in kwargs.items()}
        func(*real, **named)
        return call_measured(func, real, named)[1]


class allocator_events:
    """Peak of the CPU allocator's live bytes inside the block, relative to its start.

    Of this thread's allocations; another thread's block waits until this one ends.
    """

    def __init__(self) -> None:
        self.peak = 0
        # torch.profiler's would import torch's compile stack
        self._profile: Any = torch.autograd.profiler.profile(profile_memory=True)

    def __enter__(self) -> allocator_events:
        _profiler.acquire()
        self._profile.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            self._profile.__exit__(*exc)
        finally:
            _profiler.release()
        results = self._profile.kineto_results
        live = 0
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in results.events()
                              if e.name() == "[memory]"):
            live += size
            self.peak = max(self.peak, live)
