"""The way from an op to what computes it.

`recorded` makes a function one op of torch.library, which torch.compile and torch.export trace in
place of what it does; the op's schema follows from the fields of the function's arguments.
`launch` hands a kernel call to its back-end, or only tells what the call would hold.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import torch

from ffengine.ops import backends
from ffengine.ops.config import ASIDE, UNSIGNED, WRITTEN
from ffengine.ops.memory_accounting import declare, is_fake, listeners
from ffengine.ops.optim import DTYPE_CODES
from ffengine.ops.tracing import traced

Tensors = tuple[torch.Tensor | None, ...]
Function = TypeVar("Function", bound=Callable[..., None])
#: torch leaves Library without annotations.
_library: Any = torch.library.Library("ffengine", "FRAGMENT")  # type: ignore[no-untyped-call]
#: C++ kernels whose threads hold memory beside the tensors.
_HOLDING = frozenset({"local_pass", "batch_pass", "weight_update"})
#: Triton's modules and functions, where both are not named as the kernel is.
_TRITON = {"optimizer_step": ("weight_update", "optimizer_step"),
           "compressed_step": ("weight_update", "optimizer_step"),
           "linear_prepare": ("linear_step", "prepare"),
           "linear_finish": ("linear_step", "finish")}


def compiled() -> ModuleType:
    """The C++ module, where `resolve` found one of its back-ends."""
    found = backends.extension()
    assert found is not None
    return found


def launch(kernel: str, backend: str, tensors: Tensors, sizes: tuple[int, ...], call: Any) -> None:
    """Run a kernel of a back-end; on tensors without memory, only tell what it would hold.

    Args:
        kernel: `KERNEL_cpu` and `KERNEL_cuda` of csrc/bindings.cpp, KERNEL of a Triton module.
        tensors: in the kernel's order; the first is of the dtype that it computes on.
        sizes, call: its numbers; Triton's kernels take tensors and call.
    """
    first = tensors[0]
    assert first is not None
    if backend == "cpu" and kernel in _HOLDING and listeners.get():
        declare(scratch(kernel, [t is not None for t in tensors], sizes, first.dtype, call))
    if is_fake(first):
        return
    if backend == "triton":
        _triton(kernel)(tensors, call)
        return
    function = getattr(compiled(), f"{kernel}_{backend}")
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    if backend == "cpu":
        function(addresses, sizes, DTYPE_CODES[first.dtype], call)
    else:
        function(addresses, sizes, DTYPE_CODES[first.dtype], call,
                 torch.cuda.current_stream(first.device).cuda_stream)


def scratch(kernel: str, present: list[bool], sizes: tuple[int, ...], dtype: torch.dtype,
            call: Any) -> int:
    """Bytes that the C++ kernel's threads hold beside the tensors, of which `present` are there."""
    extension = backends.extension()
    if extension is None:
        return 0
    held: int = getattr(extension, f"{kernel}_scratch_cpu")(
        present, sizes, DTYPE_CODES[dtype], call)
    return held


@functools.cache
def _triton(kernel: str) -> Callable[[Any, Any], None]:
    module, name = _TRITON.get(kernel, (kernel, kernel))
    found: Callable[[Any, Any], None] = getattr(
        importlib.import_module(f"ffengine.kernels.{module}"), name)
    return found


def recorded(op: str) -> Callable[[Function], Function]:
    """Decorator of a function of a back-end's name and structures that returns nothing.

    While torch records, a call becomes torch.ops.ffengine.OP of the structures' parts: tensors by
    name, then whole numbers, floats and words. It runs the function on structures put together
    anew, so that only what is in Written tensors comes back. Structures are NamedTuples and
    dataclasses of tensors, numbers, words and structures, without what their fields mark ASIDE.
    (Registered with define and impl: torch's own decorator costs 9 us a call.)
    """
    def register(function: Function) -> Function:
        hints = [h for name, h in get_type_hints(function, include_extras=True).items()
                 if name not in ("backend", "return")]
        parts = tuple(part for i, hint in enumerate(hints) for part in _parts(hint, (i,)))
        _library.define(f"{op}({_schema(parts)}) -> ()")

        @torch.no_grad()
        def run(backend: str, *values: Any) -> None:
            function(backend, *unpack(hints, values))

        _library.impl(op, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ffengine::{op}", _nothing, lib=_library)

        @functools.wraps(function)
        def call(backend: str, *structures: Any) -> None:
            if traced():
                getattr(torch.ops.ffengine, op)(backend, *pack(parts, structures))
            else:
                function(backend, *structures)

        call.kinds, call.parts = hints, parts  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]
    return register


def _nothing(*_: Any) -> None:
    """All that a recorded op does to tensors without memory."""


class Part(NamedTuple):
    """A tensor, list, number, word or, kind bool, presence in structures."""

    path: tuple[int | str, ...]
    kind: type
    mark: str
    optional: bool


def pack(parts: Sequence[Part], structures: tuple[Any, ...]) -> list[Any]:
    """What the registered op takes of the structures, the back-end's name aside."""
    slots: list[Any] = []
    ints: list[int] = []
    floats: list[float] = []
    words: list[str] = []
    for path, kind, mark, _ in parts:
        value: Any = structures
        for step in path:
            if value is not None:
                value = value[step] if isinstance(step, int) else getattr(value, step)
        if kind is torch.Tensor:
            slots.append(value)
        elif kind is list:
            slots.append([value] if isinstance(value, int) else list(value or ()))
        elif kind is bool:
            ints.append(int(value is not None))
        elif kind is float:
            floats.append(0.0 if value is None else value)
        elif kind is str:
            words.append(value or "")
        else:
            whole = int(value or 0)
            ints.append(whole - 2**64 if mark == UNSIGNED and whole >= 2**63 else whole)
    return [*slots, ints, floats, words]


def unpack(kinds: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The inverse of `pack`: structures of these kinds."""
    *slots, ints, floats, words = values
    take = {torch.Tensor: iter(slots), int: iter(ints), float: iter(floats), str: iter(words)}
    return [_build(kind, take) for kind in kinds]


class Kind(NamedTuple):
    """What an annotation says: torch.Tensor, list, int, bool, float, str, tuple or a structure."""

    of: Any
    mark: str = ""
    optional: bool = False
    #: Of a tuple or a structure.
    inside: tuple[tuple[int | str, Any], ...] = ()


@functools.cache
def _kind(hint: Any) -> Kind:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(args[0])._replace(mark=args[1])
    if origin is Literal:
        return Kind(str)
    if origin is tuple:
        return Kind(tuple, inside=tuple(enumerate(args)))
    if args and args[0] is int:  # one number, or several
        several = len(args) > 1 and args[1] is not type(None)
        return Kind(list if several else int, optional=type(None) in args)
    if args:  # the first of a union; a Loss, where it may be a function too
        return _kind(args[0])._replace(optional=type(None) in args)
    names = [f.name for f in fields(hint)] if is_dataclass(hint) else getattr(hint, "_fields", ())
    hints = get_type_hints(hint, include_extras=True) if names else {}
    return Kind(hint, inside=tuple((name, hints[name]) for name in names
                                   if _mark(hints[name]) != ASIDE))


def _mark(hint: Any) -> str:
    return str(get_args(hint)[1]) if get_origin(hint) is Annotated else ""


def _parts(hint: Any, path: tuple[int | str, ...], optional: bool = False) -> Iterator[Part]:
    kind = _kind(hint)
    optional = optional or kind.optional
    if kind.optional and kind.of is not torch.Tensor:
        yield Part(path, bool, "", True)
    if not kind.inside:
        yield Part(path, int if kind.of is bool else kind.of, kind.mark, optional)
    for name, inner in kind.inside:
        yield from _parts(inner, (*path, name), optional)


def _schema(parts: Sequence[Part]) -> str:
    """Of a tensor that is written its own alias set, torch's word for what an op mutates."""
    slots = []
    for i, part in enumerate(parts):
        name = "_".join(step for step in part.path if isinstance(step, str))
        if part.kind is torch.Tensor:
            slots.append(f"Tensor{f'(a{i}!)' * (part.mark == WRITTEN)}{'?' * part.optional} {name}")
        elif part.kind is list:
            slots.append(f"int[] {name}")
    return ", ".join(["str backend", *slots, "int[] ints", "float[] floats", "str[] words"])


def _build(hint: Any, take: dict[Any, Iterator[Any]]) -> Any:
    """A part or structure of what the lists of `pack` hold next."""
    kind = _kind(hint)
    if kind.of is torch.Tensor:
        return next(take[torch.Tensor])
    if kind.of is list:
        several = next(take[torch.Tensor])
        return several[0] if len(several) == 1 else tuple(several)
    there = not kind.optional or next(take[int])
    if kind.inside:
        values: dict[Any, Any] = {name: _build(inner, take) for name, inner in kind.inside}
        if not there:
            return None
        return tuple(values.values()) if kind.of is tuple else kind.of(**values)
    value = next(take[int if kind.of is bool else kind.of])
    if kind.mark == UNSIGNED:
        value %= 2**64
    return kind.of(value) if there else None
