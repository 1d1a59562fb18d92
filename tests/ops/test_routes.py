"""Where gradients go through relu and pool: the kernels against autograd and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ffengine.ops.routes import BLOCKED, along_routes, routes

SHAPES = [(3, 20, 6, 8), (2, 16, 7, 5), (4, 5, 4, 4), (2, 130, 3, 9), (1, 33, 2, 2), (5, 70)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def laid_out(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Halves, so that windows tie; some below zero, some zeros with a sign."""
    return laid_out((torch.randn(shape) * 2).round().div(2).to(dtype))


def found(a: torch.Tensor, pool: bool, straight: bool, backend: str) -> torch.Tensor:
    size = (*a.shape[:2], *(s // 2 if pool else s for s in a.shape[2:]))
    out = laid_out(torch.full(size, 77, dtype=torch.uint8))
    routes(a, out, pool=pool, straight=straight, backend=backend)
    return out


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_plain_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = drawn(shape, dtype)
    for pool in (False, True) if len(shape) == 4 else (False,):
        for straight in (False, True):
            ours, exact = (found(a, pool, straight, b) for b in ("cpu", "reference"))
            assert torch.equal(ours, exact)
            dz = drawn(tuple(ours.shape), dtype)
            da = [along_routes(ours, dz, shape[1:], pool=pool, backend=b)
                  for b in ("cpu", "reference")]
            assert torch.equal(*da) and da[0].dtype is dtype


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pool", [False, True])
def test_along_routes_is_autograd(pool: bool, backend: str) -> None:
    torch.manual_seed(0)
    a = laid_out(torch.randn(4, 20, 7, 6)).requires_grad_()
    h = F.relu(a)
    z = F.max_pool2d(h, 2) if pool else h
    dz = laid_out(torch.randn_like(z))
    z.backward(dz)
    ours = along_routes(found(a.detach(), pool, False, backend), dz, (20, 7, 6), pool=pool,
                        backend=backend)
    assert a.grad is not None and torch.equal(ours, a.grad)


def test_a_window_below_zero_is_blocked_and_a_slice_may_be_written() -> None:
    a = laid_out(-torch.rand(4, 20, 4, 4))
    whole = laid_out(torch.full((8, 20, 2, 2), 9, dtype=torch.uint8))
    routes(a, whole[2:6], pool=True, straight=False)
    assert (whole[2:6] == BLOCKED).all() and (whole[:2] == 9).all() and (whole[6:] == 9).all()
    routes(a, whole[2:6], pool=True, straight=True)
    assert (whole[2:6] == 0).all()  # relu's flat zeros tie: the first


def test_another_layout_gives_the_same() -> None:
    torch.manual_seed(0)
    a = drawn((3, 20, 6, 6), torch.float32)
    out = torch.empty(3, 20, 3, 3, dtype=torch.uint8)
    routes(a.contiguous(), out, pool=True, straight=False)
    assert torch.equal(out, found(a, True, False, "auto"))


def test_bad_maps_are_refused() -> None:
    a = torch.randn(2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"^\[routes\] out expected torch.uint8 of shape "
                                         r"\(2, 4, 3, 3\), got torch.float32"):
        routes(a, torch.empty(2, 4, 3, 3), pool=True, straight=False)
    with pytest.raises(ValueError, match=r"got torch.uint8 of shape \(2, 4, 6, 6\)$"):
        routes(a, torch.empty(2, 4, 6, 6, dtype=torch.uint8), pool=True, straight=False)
    with pytest.raises(ValueError, match=r"^\[routes\] expected routes and dz of shape \(N, "):
        along_routes(torch.zeros(2, 4, 3, 3, dtype=torch.uint8), torch.randn(2, 4, 6, 6), (4, 6, 6),
                     pool=True)


def test_a_back_end_without_a_kernel_is_refused() -> None:
    a, out = torch.randn(2, 4, 6, 6), torch.zeros(2, 4, 3, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^\[routes\] backend 'cpu' has no kernel for maps of "
                                         r"strides \(144, 36, 6, 1\), \(36, 9, 3, 1\): expected"):
        routes(a, out, pool=True, straight=False, backend="cpu")
    with pytest.raises(ValueError, match=r"^\[routes\] backend 'triton' "):
        along_routes(out, torch.randn(2, 4, 3, 3), (4, 6, 6), pool=True, backend="triton")
