"""Tensors without memory that say they lie on a device: what a dry run (dry_run.py) is made of.

torch's own FakeTensor does the same for a compiler: it costs 60 microseconds an op and 160 MB of
imports. This one has a shape, strides, a dtype, a device and a storage of the right size that holds
nothing, and runs every op on torch's meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ffengine.ops.memory_accounting import tensors_in

META, CPU = torch.device("meta"), torch.device("cpu")
DEVICE_OF = torch.ops.prim.device.default
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class DryTensor(torch.Tensor):
    """A tensor of the meta device that answers with another one."""

    #: What is_fake asks for.
    dry = True
    elem: torch.Tensor
    on: torch.device

    @staticmethod
    def __new__(cls, elem: torch.Tensor, on: torch.device) -> DryTensor:
        made: DryTensor = torch.Tensor._make_subclass(
            cls, elem, False, dispatch_device=True, device_for_backend_keys=on)
        made.elem, made.on = elem, on
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says that it lies."""
        return self.on

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        made: torch.Tensor = memo.setdefault(id(self), self.clone())
        return made


class Dry(TorchDispatchMode):
    """`with Dry(): ...` makes every tensor that comes up inside a dry one."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that torch starts no CUDA for its device

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode_key = Dry._mode_key

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Other modes, a memory meter say, see calls before it."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own way of keeping its compiler out of a mode imports all of it."""
        return False

    def __enter__(self) -> Dry:
        torch._C._ensureCUDADeviceGuardSet()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def with_memory() -> Iterator[None]:
    """Inside, tensors are real again."""
    mode = torch._C._unset_dispatch_mode(Dry._mode_key)
    try:
        yield
    finally:
        if mode is not None:
            torch._C._set_dispatch_mode(mode)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An op on the meta device; its results say that they lie where its operands do, or where it
    was told to put them."""
    if func is DEVICE_OF:
        return args[0].on
    given = list(tensors_in(args, kwargs))
    if "device" in kwargs and kwargs["device"] is not None:
        on = torch.device(kwargs["device"])
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": META}
    else:
        on = next((t for t in given if t.dim()), given[0]).device if given else CPU
        if not given and makes_tensors(func):
            kwargs = {**kwargs, "device": META}
    if on.type == "cuda" and on.index is None:
        on = torch.device("cuda", 0)
    if all(isinstance(t, DryTensor) for t in given):
        made = by_rule(func, args, kwargs)
        if made is not None:
            return _said(made, {}, on)
    known = {id(t.elem): t for t in given if isinstance(t, DryTensor)}
    return _said(func(*map(_meta, args), **{k: _meta(v) for k, v in kwargs.items()}), known, on)


@functools.cache
def makes_tensors(func: Any) -> bool:
    """The op takes a device, and is not told where in its other arguments."""
    return any(argument.name == "device" for argument in func._schema.arguments)


def by_rule(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an elementwise op on dense maps, a layer norm, or an op that makes a map like another,
    gives; None where that takes torch's own rules, most of which are written in Python and import
    its compiler."""
    name = func._schema.name
    if "out" in kwargs:  # an empty one would be made larger
        return kwargs["out"] if kwargs["out"].numel() else None
    if func in CONVOLUTIONS and not args[6 + (func is CONVOLUTIONS[1])]:  # not transposed
        return _convolution(func, args)
    if name in ("aten::mm", "aten::bmm", "aten::addmm"):
        a, b = args[-2:]
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=META)
    if name == "aten::cat":
        return concatenated(*args)
    if name == "aten::avg_pool2d" and list(args[2:]) in ([], [[]], [args[1]]):
        return pooled(*args[:2])
    if kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    if torch.Tag.pointwise in func.tags:
        if func._schema.is_mutable:
            return args[0] if isinstance(args[0], DryTensor) else None
        return elementwise(func, args, kwargs)
    if name in LIKE:
        like = args[0]
        if dense(like):
            return torch.empty_strided(like.shape, like.stride(), device=META,
                                       dtype=kwargs.get("dtype") or like.dtype)
    if name == "aten::native_layer_norm" and args[0].dtype in (torch.float32, torch.float64):
        x, over = args[:2]
        statistics = (*x.shape[:x.dim() - len(over)], *[1] * len(over))
        return tuple(torch.empty(shape, dtype=x.dtype, device=META)
                     for shape in (x.shape, statistics, statistics))
    return None


def pooled(x: torch.Tensor, kernel: Sequence[int]) -> torch.Tensor:
    """A map pooled with the stride of its kernel."""
    size = [n // k for n, k in zip(x.shape[2:], (kernel[0], kernel[-1]), strict=True)]
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=META, memory_format=(
        torch.channels_last if in_channels_last(x) else torch.contiguous_format))


def concatenated(maps: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
    """In channels_last where all of them are; None where they are laid out in different ways."""
    last = [t.dim() == 4 and not t.is_contiguous() for t in maps]
    if len({t.dim() for t in maps}) != 1 or len({t.dtype for t in maps}) != 1 or (
            any(last) and not all(t.is_contiguous(memory_format=torch.channels_last)
                                  for t in maps)):
        return None
    shape = list(maps[0].shape)
    shape[dim] = sum(t.shape[dim] for t in maps)
    return torch.empty(shape, dtype=maps[0].dtype, device=META, memory_format=(
        torch.channels_last if any(last) else torch.contiguous_format))


def elementwise(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A map laid out like its operands; None where they disagree."""
    operands = list(tensors_in(args, kwargs))
    shapes = {t.shape for t in operands if t.dim()}
    shape = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        *shapes)
    strides = {t.stride() for t in operands if t.shape == shape}
    if len(strides) != 1 or not all(dense(t) for t in operands if t.shape == shape):
        return None
    key = (func, *(_kind(value) for value in (*args, *kwargs.items())))
    if key not in _dtypes:
        one = [_one(value) for value in args]
        found = func(*one, **{k: _one(value) for k, value in kwargs.items()})
        if not isinstance(found, torch.Tensor):
            return None
        _dtypes[key] = found.dtype
    return torch.empty_strided(shape, strides.pop(), dtype=_dtypes[key], device=META)


#: Ops that make a map like their first argument.
LIKE = ("aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::clone")
#: What an elementwise op gives, by the dtypes of its operands.
_dtypes: dict[Any, torch.dtype] = {}


def _kind(value: Any) -> Any:
    """What of an operand decides a result's dtype."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim() > 0
    return type(value) if isinstance(value, (bool, int, float)) else str(value)


def _one(value: Any) -> Any:
    """A real tensor of one element in a dry one's place."""
    if isinstance(value, torch.Tensor):
        return torch.ones((1,) * value.dim(), dtype=value.dtype)
    return value


def dense(t: torch.Tensor) -> bool:
    """Its elements lie one after the other, as a row or as a map of channels_last."""
    return t.is_contiguous() or (
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _meta(value: Any) -> Any:
    """What an op takes on the meta device in a dry tensor's place; in a real one's, its like."""
    if isinstance(value, DryTensor):
        return value.elem
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_meta, value))
    return value


def _said(value: Any, known: dict[int, DryTensor], on: torch.device) -> Any:
    """What an op gives, of what it gave on the meta device; an operand is itself."""
    if isinstance(value, DryTensor):
        return value
    if isinstance(value, torch.Tensor):
        found = known.get(id(value))
        return DryTensor(value, on) if found is None else found
    if isinstance(value, (list, tuple)):
        return type(value)(_said(t, known, on) for t in value)
    return value


def _convolution(func: Any, args: Any) -> Any:
    """A convolution of maps, or its gradients: laid out as torch's libraries do, in channels_last
    where one of the operands is."""
    backward = func is CONVOLUTIONS[1]
    x, weight = args[backward:backward + 2]
    stride, padding, dilation = args[3 + backward:6 + backward]
    layout = torch.channels_last if in_channels_last(x) or in_channels_last(weight) else (
        torch.contiguous_format)

    def made(shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(shape, dtype=x.dtype, device=META, memory_format=layout)

    if not backward:
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)]
        return made((x.shape[0], weight.shape[0], *size))
    wanted = args[-1]
    bias = torch.empty(weight.shape[0], dtype=x.dtype, device=META) if wanted[2] else None
    return *(made(shape) if want else None
             for shape, want in zip((x.shape, weight.shape), wanted, strict=False)), bias


def in_channels_last(t: torch.Tensor) -> bool:
    """By its strides, as torch tells the two layouts apart where both could be meant."""
    least = 0
    for d in (1, 3, 2, 0):
        if t.stride(d) < least or (d == 0 and least == t.stride(1)):
            return False
        least = t.stride(d) * max(t.shape[d], 1)
    return True
