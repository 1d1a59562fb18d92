"""Dry tensors have the shape, strides, dtype and bytes of real ones, and import no compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ffengine.engine.memory.dry_tensor import Dry, DryTensor, with_memory
from ffengine.ops.memory_accounting import is_fake

LAST = torch.channels_last


def maps(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype).contiguous(
        memory_format=LAST if last else torch.contiguous_format)


def half(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.bfloat16)


#: Each makes its operands itself, so that it runs on real and on dry ones alike.
OPS: dict[str, Callable[[], object]] = {
    "widened": lambda: maps(4, 3, dtype=torch.bfloat16) + maps(4, 3),
    "scalar": lambda: half(maps(4, 3)) * 2.0,
    "compared": lambda: maps(4, 3) >= 0,
    "broadcast": lambda: maps(4, 3, 2, 2, last=True) * maps(3, 1, 1),
    "two layouts": lambda: maps(4, 3, 2, 2, last=True) + maps(4, 3, 2, 2),
    "integers": lambda: maps(5, dtype=torch.int64) / 2,
    "shifted": lambda: maps(5, dtype=torch.int64) >> 1,
    "written over": lambda: maps(4, 3, 2, 2, last=True).mul_(2).add_(maps(3, 1, 1)),
    "like": lambda: torch.zeros_like(maps(4, 3, 2, 2, last=True), dtype=torch.float64),
    "every other": lambda: torch.empty_like(maps(4, 6)[:, ::2]),
    "cloned": lambda: maps(4, 3, 2, 2).clone(memory_format=LAST),
    "side by side": lambda: torch.cat([maps(2, 3, 2, 2, last=True)] * 2, 1),
    "layouts apart": lambda: torch.cat([maps(2, 3, 2, 2, last=True), maps(2, 3, 2, 2)], 1),
    "pooled": lambda: F.avg_pool2d(maps(2, 3, 5, 4, last=True), 2),
    "strided pool": lambda: F.avg_pool2d(maps(2, 3, 5, 4), 3, 1),
    "layer norm": lambda: F.layer_norm(maps(4, 3, 2, 2, last=True), (3, 2, 2)),
    "convolved": lambda: F.conv2d(maps(2, 3, 8, 8), maps(5, 3, 3, 3), stride=2, padding=1),
    "convolved, last": lambda: F.conv2d(maps(2, 3, 8, 8, last=True), maps(5, 3, 3, 3), padding=1),
    "gradients": lambda: torch.ops.aten.convolution_backward(
        maps(2, 5, 8, 8, last=True), maps(2, 3, 8, 8, last=True), maps(5, 3, 3, 3), [5], [1, 1],
        [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]),
    "constant": lambda: torch.tensor([1.0, 2.0]),
    "product": lambda: maps(4, 3) @ maps(3, 5),
    "product into": lambda: torch.addmm(maps(5), maps(4, 3), maps(3, 5), out=maps(4, 5)),
    "rows": lambda: maps(6, 4)[1:3].t(),
}


def told(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.untyped_storage().nbytes()
    return [told(t) for t in value] if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_what_it_gives_on_real_tensors(name: str) -> None:
    real = OPS[name]()
    with Dry():
        dry = OPS[name]()
    assert told(dry) == told(real)
    for t in dry if isinstance(dry, tuple) else (dry,):
        assert isinstance(t, DryTensor)
        assert is_fake(t)
        assert t.device.type == "cpu"


def test_what_is_written_over_is_the_operand() -> None:
    with Dry():
        t = torch.ones(3)
        assert t.add_(1) is t
        assert t[1:].untyped_storage()._cdata == t.untyped_storage()._cdata


def test_a_gpu_that_is_not_there() -> None:
    with Dry():
        t = torch.zeros(4, device="cuda").to(torch.bfloat16)
    assert t.device == torch.device("cuda", 0)
    assert t.element_size() * t.numel() == 8


def test_real_tensors_inside() -> None:
    with Dry():
        with with_memory():
            assert type(torch.ones(1)) is torch.Tensor
        assert isinstance(torch.ones(1), DryTensor)
    assert type(torch.ones(1)) is torch.Tensor


def test_planning_imports_no_compiler() -> None:
    code = ("import sys, ffengine as ff\n"
            "net = ff.models.create('deeperforward/resnet17', planes=(10, 20, 40, 80),\n"
            "                       image_size=8)\n"
            "trainer = ff.Trainer(net, epochs=1, lr=1e-3, progress=False)\n"
            "print(trainer.plan_for(8).peak_bytes)\n"
            "print(sorted({'sympy', 'torch._dynamo'} & set(sys.modules)))\n")
    out = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
