"""A kernel that is wrong on purpose: whether a memory checker looks at Triton's kernels at all."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def planted_kernel(p_x, p_out):
    """out = x[1], where x has one element."""
    tl.store(p_out, tl.load(p_x + 1))
