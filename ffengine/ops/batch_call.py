"""A `batch_pass` kernel call: tensors, flat numbers, the way to a back-end."""

from __future__ import annotations

import torch

from ffengine.ops import backends, library, library_batch_pass
from ffengine.ops.call import _dtype_code
from ffengine.ops.layout import nchw
from ffengine.ops.memory_accounting import declare, is_fake, listeners
from ffengine.ops.params import PHASE_MIDDLE, SWEPT, BatchPassCall, BatchPassTensors
from ffengine.ops.tracing import traced


@library.implements("batch_pass")
def run(backend: str, tensors: BatchPassTensors, call: BatchPassCall) -> None:
    """Hand a call to a kernel back-end; the one place that knows where they live."""
    if traced():
        library_batch_pass.batch_pass(backend, tensors, call)
        return
    if tensors.a.shape[0] == 0:
        return
    a = tensors.a
    if backend == "cpu" and listeners.get():
        declare(cpu_scratch(a, call))
    if is_fake(a):
        return
    if backend == "triton":
        from ffengine.kernels import batch_pass as kernels

        kernels.batch_pass(tensors, call)
        return
    ext = backends.extension()
    assert ext is not None  # resolve() checked
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    numbers = (nchw(a), _dtype_code(a), call)
    if backend == "cpu":
        ext.batch_pass_cpu(pointers[:SWEPT], *numbers)
        return
    stream = torch.cuda.current_stream(a.device).cuda_stream
    if call.phase == PHASE_MIDDLE:
        work = torch.empty(3, a.shape[1], dtype=torch.float64, device=a.device)
        ext.batch_middle_cuda(pointers[:SWEPT], (*pointers[SWEPT:], work.data_ptr()), *numbers,
                              stream)
    else:
        ext.batch_pass_cuda(pointers[:SWEPT], *numbers, stream)


def cpu_scratch(a: torch.Tensor, call: BatchPassCall) -> int:
    """Bytes the C++ kernel's threads hold beside the tensors, for a of this shape and dtype."""
    ext = backends.extension()
    if ext is None:
        return 0
    held: int = ext.batch_pass_scratch_cpu(nchw(a), _dtype_code(a), call)
    return held
