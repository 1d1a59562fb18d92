"""Label encodings: what a label looks like in an input, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ffengine.nn import Concat, LabelChannel, LabelEncoding, LinearHead, Overlay

K, N = 4, 3
IMAGE = (2, 3, 3)


def made() -> list[LabelEncoding]:
    torch.manual_seed(0)
    return [Overlay(K, IMAGE), Overlay(K, IMAGE, value=0.5), Overlay(K, IMAGE, value="max"),
            Concat(K, IMAGE), LabelChannel(K, IMAGE)]


every = pytest.mark.parametrize("encoding", made(), ids=[
    "overlay", "overlay-half", "overlay-max", "concat", "channel"])


def images() -> torch.Tensor:
    return torch.rand(N, *IMAGE, generator=torch.Generator().manual_seed(1)) + 0.1


@every
def test_base_and_mark_share_no_element(encoding: LabelEncoding) -> None:
    x = images()
    base, mark = encoding.base(x), encoding.mark(torch.eye(K)[:N])
    assert base.shape == mark.shape == (N, *encoding.shape)
    assert not (base.bool() & mark.bool()).any()
    assert torch.equal(encoding(x, torch.arange(N)), base + mark * encoding.scale(x))


@every
def test_labels_and_their_rows_are_the_same(encoding: LabelEncoding) -> None:
    x, y = images(), torch.tensor([2, 0, 3])
    before = x.clone()
    assert torch.equal(encoding(x, y), encoding(x, F.one_hot(y, K).float()))
    soft = torch.rand(N, K)
    expected = sum(soft[:, k, None] * (encoding(x, torch.full((N,), k)) - encoding.base(x))
                   .flatten(1) for k in range(K))
    torch.testing.assert_close((encoding(x, soft) - encoding.base(x)).flatten(1), expected)
    inverse = encoding(x, 1.0 - F.one_hot(y, K))
    assert torch.equal(inverse, encoding.base(x) + encoding.mark(
        (1.0 - F.one_hot(y, K)) * encoding.scale(x)))
    assert torch.equal(before, x)
    assert encoding(x.double(), y).dtype is torch.float64


def test_overlay() -> None:
    x = images()
    shown = Overlay(K, IMAGE, value=0.5)(x, torch.tensor([2, 0, 3]))
    assert torch.equal(shown[:, :K], 0.5 * F.one_hot(torch.tensor([2, 0, 3]), K))
    assert torch.equal(shown[:, K:], x.flatten(1)[:, K:])
    top = Overlay(K, IMAGE, value="max")(x, torch.tensor([2, 0, 3]))
    assert top[0, 2] == x.max() and Overlay(K, IMAGE, value="max").scale(x[:0]) == 1.0
    assert torch.equal(Overlay(K, IMAGE, neutral_value=0.2).neutral(x)[:, :K],
                       torch.full((N, K), 0.2))
    assert torch.equal(Overlay(K, IMAGE).blank(x), x.flatten(1))


def test_concat() -> None:
    x, y = images(), torch.tensor([2, 0, 3])
    encoding = Concat(K, IMAGE)
    assert torch.equal(encoding(x, y), torch.cat([x.flatten(1), F.one_hot(y, K)], 1))
    assert torch.equal(encoding.neutral(x), F.pad(x.flatten(1), (0, K)))
    assert torch.equal(encoding.blank(x), encoding.neutral(x))


def test_label_channel() -> None:
    x, y = images(), torch.tensor([2, 0, 3])
    encoding = LabelChannel(K, IMAGE)
    shown = encoding(x, y)
    assert torch.equal(shown[:, :2], x)
    assert torch.equal(shown[:, 2].flatten(1), encoding.weight[y])
    torch.testing.assert_close(encoding.neutral(x)[:, 2].flatten(1),
                               encoding.weight.mean(0).expand(N, -1))
    assert not shown.requires_grad and encoding.weight.requires_grad
    assert not LabelChannel(K, IMAGE, learned=False).weight.requires_grad
    torch.manual_seed(3)
    drawn = LabelChannel(K, IMAGE, neutral="random")
    rows = drawn.neutral(x)[:, 2].flatten(1)
    assert all(any(torch.equal(r, e) for e in drawn.weight) for r in rows)


@pytest.mark.parametrize(("build", "said"), [
    (lambda: Overlay(1, IMAGE), "expected 2 or more classes, got 1"),
    (lambda: Overlay(10, (1, 2, 2)), "a label overlay needs 10 pixels, got an image of 4"),
    (lambda: Overlay(K, IMAGE, value="most"), "expected a finite number or 'max', got 'most'"),
    (lambda: LabelChannel(K, (18,)), r"a label channel needs maps \(C, H, W\), got \(18,\)"),
    (lambda: LabelChannel(K, IMAGE, neutral="none"), "one of mean, random, got 'none'"),
    (lambda: LabelEncoding(K, IMAGE).base(images()), "LabelEncoding has no base"),
    (lambda: LabelEncoding(K, IMAGE).mark(images()), "LabelEncoding has no mark"),
])
def test_what_does_not_fit(build: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^\[encoding\] .*{said}") as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("build", "said"), [
    (lambda: LinearHead((0,), 8, 1), r"2 classes or more, got layers \(0,\) and 1 classes"),
    (lambda: LinearHead((), 8, 4), r"one layer or more .* got layers \(\)"),
    (lambda: LinearHead((0,), 8, 4, loss="l1"), "ce, double-softmax, sparsemax, got 'l1'"),
    (lambda: LinearHead((0,), 8, 4, image="other"), "pass, neutral, blank, got 'other'"),
    (lambda: LinearHead((0,), 8, 4, features="a"), "z, h, got 'a'"),
    (lambda: LinearHead((0,), 8, 4, init="he"), "uniform, zeros, ones, got 'he'"),
])
def test_heads_that_make_no_sense(build: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[head\] .*{said}"):
        build()
