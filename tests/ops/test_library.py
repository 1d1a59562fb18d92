"""The ops as torch.library sees them: schema, fake kernels, tracing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from ffengine.ops import local_pass as op
from ffengine.ops.config import PHASE_FUSED, Dropout, LocalPassConfig, Tile, ce
from ffengine.ops.launch import pack, unpack
from ffengine.ops.local_pass import LocalPassTensors, local_pass, make_call
from ffengine.ops.weight_update import weight_update

CONFIG = LocalPassConfig(groups=4, dropout=Dropout(0.25, seed=2**64 - 3, layer=2, step=9))


def sample(n: int, size: int, layout: torch.memory_format) -> tuple[object, ...]:
    a = torch.randn(n, 8, size, size).contiguous(memory_format=layout)
    tensors = LocalPassTensors(
        a=a, y=torch.zeros(n, dtype=torch.int64), g0=None, h_prev=None, shortcut=None,
        offsets=torch.tensor([0, 2, 4, 6, 8]), z=torch.zeros_like(a), g=torch.zeros(n, 4),
        loss=torch.zeros(n), coef=torch.zeros(n, 4), da=torch.zeros_like(a),
        stats=torch.zeros(n, 4, 2), clock=None)
    call = make_call(a, CONFIG, Tile(), 1.0, PHASE_FUSED, True)
    return ("cpu", *pack(op.run.parts, (tensors, call)))


@pytest.mark.parametrize("size", [1, 4, 5], ids=["pixel", "even", "odd"])
@pytest.mark.parametrize("n", [0, 1, 3], ids=["empty", "one", "three"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last],
                         ids=["dense", "channels_last"])
def test_opcheck(n: int, size: int, layout: torch.memory_format) -> None:
    torch.library.opcheck(torch.ops.ffengine.local_pass.default, sample(n, size, layout))


def test_a_call_survives_its_schema() -> None:
    a = torch.randn(2, 8, 3, 3)
    call = make_call(a, replace(CONFIG, loss=ce()), Tile(4, 16), 1.0, PHASE_FUSED, True)
    tensors = LocalPassTensors(*[a] * 13)
    again = unpack(op.run.kinds, pack(op.run.parts, (tensors, call)))
    assert again == [tensors, call] and type(again[1].pool) is bool


def test_schemas_follow_from_fields() -> None:
    """Names, what is written, what may be absent; a state's place on the device stays behind."""
    assert weight_update.__name__ == "weight_update"  # importing it registers the op
    schema = str(torch.ops.ffengine.weight_update.default._schema)
    assert re.sub(r"\(a\d+!\)", "(!)", schema) == (
        "ffengine::weight_update(str backend, Tensor(!) weight_value, Tensor(!)? weight_state_m, "
        "Tensor(!)? weight_state_v, Tensor(!)? weight_state_m_scale, "
        "Tensor(!)? weight_state_v_scale, Tensor(!)? weight_accumulate, "
        "Tensor(!)? weight_grad_out, Tensor x, Tensor da, Tensor(!)? bias_value, "
        "Tensor(!)? bias_state_m, Tensor(!)? bias_state_v, Tensor(!)? bias_state_m_scale, "
        "Tensor(!)? bias_state_v_scale, Tensor(!)? bias_accumulate, Tensor(!)? bias_grad_out, "
        "int[] ints, float[] floats, str[] words) -> ()")


def test_compiled_equals_eager_on_a_permuted_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tracer cannot guard on the suite's poisoned torch.empty
    a = torch.randn(3, 6, 5, 8).permute(0, 3, 1, 2)
    y = torch.tensor([0, 3, 1])

    def sweep(a: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        r = local_pass(a, y, config=CONFIG, want_da=True, backend="cpu")
        return r.z, r.g, r.loss, r.coef, r.da  # type: ignore[return-value]

    compiled = torch.compile(sweep, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(a, y), sweep(a, y), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_backward_through_the_sweep_explains_itself() -> None:
    a = torch.randn(2, 8, 3, 3, requires_grad=True)
    r = op.local_pass(a, torch.tensor([0, 1]), config=CONFIG)
    assert r.loss is not None
    with pytest.raises(RuntimeError, match="local by design"):
        r.loss.sum().backward()
