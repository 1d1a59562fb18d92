"""Arguments checked against the types that their function declares, for constructors that people
call: what is wrong is named in one line before anything is made. Not for what runs in every step.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

F = TypeVar("F", bound=Callable[..., Any])
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False",
                         str: "a word", NoneType: "None", Iterable: "something to iterate over",
                         Callable: "a function", dict: "a dict"}

signature_of = functools.cache(inspect.signature)
MANY: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "words"}


def typed(where: str) -> Callable[[F], F]:
    """Check a function's arguments at every call.

    Args:
        where: what the error begins with, "[where] ...".

    Raises:
        TypeError: at the call, for an argument of another type, one too many or one too few.
    """
    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature_of(function).bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"[{where}] {error}") from None
            declared = hints(function)
            for name, value in given.items():
                check(where, name, value, declared.get(name, Any))
            return function(*args, **kwargs)

        return cast(F, checked)

    return decorate


def check_fields(where: str, made: Any) -> None:
    """TypeError, or ValueError for an unknown word, unless a dataclass's fields are as declared."""
    kind: Any = type(made)
    declared = hints(kind)
    for field in fields(made):
        check(where, field.name, getattr(made, field.name), declared[field.name], words=True)


@functools.cache
def hints(made: Any) -> dict[str, Any]:
    """The declared types of a function's arguments, or of a class's fields, by name."""
    return typing.get_type_hints(made)


def check(where: str, name: str, value: Any, hint: Any, words: bool = False) -> None:
    """TypeError unless a value is of a declared type, ValueError for a word that is not one of
    those declared; see `fits`."""
    if not fits(value, hint, words):
        came = value if isinstance(value, (int, float, str, tuple, list, NoneType)) else (
            type(value).__name__)
        kind = ValueError if words and fits(value, hint) else TypeError
        raise kind(f"[{where}] {name} expected {said(hint)}, got {came!r}")


def at_least(where: str, name: str, value: Any, least: int) -> None:
    """TypeError or ValueError unless a value is a whole number, of `least` or more."""
    check(where, name, value, int)
    if value < least:
        raise ValueError(f"[{where}] {name} expected {least} or more, got {value}")


def fits(value: Any, hint: Any, words: bool = False) -> bool:
    """Whether a value is of a declared type. Whole numbers are numbers, lists do for tuples.

    Args:
        words: of a Literal the value must be one; else only of its kind, and the function refuses
            words that it does not know.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(fits(value, part, words) for part in parts)
    if origin is Literal:
        return value in parts if words else any(type(value) is type(word) for word in parts)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(value) == len(parts) and all(
            fits(v, part, words) for v, part in zip(value, parts, strict=True))
    if origin is Sequence:
        return (hasattr(value, "__len__") and hasattr(value, "__iter__")  # a ModuleList, too
                and not isinstance(value, (str, bytes, Mapping))
                and all(fits(v, parts[0], words) for v in value))
    if origin is Iterable:  # or what is read by index
        return isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def said(hint: Any) -> str:
    """A declared type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys(said(part) for part in parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (tuple, Sequence):
        many = "" if origin is Sequence or parts[-1] is Ellipsis else f"{len(parts)} "
        what = MANY.get(parts[0], f"{getattr(parts[0], '__name__', parts[0])} objects")
        return f"a {'tuple' if origin is tuple else 'list'} of {many}{what}"
    kind = origin or hint
    name = str(getattr(kind, "__name__", kind))
    return WORDS.get(kind, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
