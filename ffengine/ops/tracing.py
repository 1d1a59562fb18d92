"""Whether torch records what is called."""

from __future__ import annotations

import contextlib

import torch

_AS_IS: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


def unrecorded() -> contextlib.AbstractContextManager[object]:
    """torch.no_grad(), where autograd records: in a step it does not, and the block takes 1 us."""
    return torch.no_grad() if torch.is_grad_enabled() else _AS_IS


def traced() -> bool:
    """torch.compile, torch.export or torch.jit.trace records the operations that run now: what
    torch does not see of a call would be missing where the record is run."""
    return torch.compiler.is_compiling() or bool(
        torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
