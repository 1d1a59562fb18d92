"""Whether torch records what is called."""

from __future__ import annotations

import torch


def traced() -> bool:
    """torch.compile, torch.export or torch.jit.trace records the operations that run now: what
    torch does not see of a call would be missing where the record is run."""
    return torch.compiler.is_compiling() or bool(
        torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
