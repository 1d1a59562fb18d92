"""Negatives: never the right label (but where the paper says so), and a function of the seed."""

from __future__ import annotations

import pytest
import torch

from ffengine.data import negatives
from ffengine.data.seeding import negatives_generator

KINDS = ["random", "inverse", "hardest", "permuted", "masked"]


def labels(n: int = 4000, k: int = 5) -> torch.Tensor:
    return torch.arange(n) % k


def drawn(kind: str, seed: int = 0, step: int = 0, n: int = 64) -> torch.Tensor:
    images = torch.rand(n, 3, 8, 9, generator=torch.Generator().manual_seed(5))
    goodness = torch.rand(n, 5, generator=torch.Generator().manual_seed(6))
    return negatives.draw(kind, labels(n), 5, negatives_generator(seed, step), goodness=goodness,
                          x=images)


def test_kinds_are_those_of_the_type():
    assert list(negatives.KINDS) == KINDS


@pytest.mark.parametrize("kind", ["random", "permuted", "masked"])
def test_seed_and_step_decide(kind):
    first = drawn(kind)
    torch.manual_seed(1)
    torch.rand(3)  # nor do other draws in between matter
    state = torch.get_rng_state()
    assert torch.equal(first, drawn(kind)) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, drawn(kind, seed=1))
    assert not torch.equal(first, drawn(kind, step=1))
    assert not torch.equal(drawn(kind, seed=1, step=2), drawn(kind, seed=2, step=1))


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_shape(kind):
    out = drawn(kind)
    expected = {"inverse": (torch.float32, (64, 5)), "masked": (torch.float32, (64, 3, 8, 9))}
    dtype, shape = expected.get(kind, (torch.int64, (64,)))
    assert out.dtype is dtype and tuple(out.shape) == shape
    assert drawn(kind, n=0).shape == (0, *shape[1:])


def test_random_is_uniform_over_the_wrong_labels():
    y = labels()
    wrong = negatives.random_labels(y, 5, negatives_generator(0, 0))
    count = torch.bincount(y * 5 + wrong, minlength=25).view(5, 5)
    assert int(count.diagonal().sum()) == 0
    rest = count[~torch.eye(5, dtype=torch.bool)]
    # 200 each are expected, with a standard deviation of 12: five of those either way
    assert int(rest.min()) > 140 and int(rest.max()) < 260
    two = negatives.random_labels(labels(k=2), 2, negatives_generator(0, 0))
    assert torch.equal(two, 1 - labels(k=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_inverse_is_one_minus_one_hot(dtype):
    y = labels(20)
    rows = negatives.inverse_rows(y, 5, dtype)
    assert rows.dtype is dtype
    assert torch.equal(rows, (1 - torch.nn.functional.one_hot(y, 5)).to(dtype))


def test_hardest_is_the_best_wrong_label():
    inf, nan = float("inf"), float("nan")
    goodness = torch.tensor([
        [9.0, 1.0, 2.0], [9.0, 1.0, 2.0], [3.0, 3.0, 1.0], [7.0, 4.0, 4.0],
        [-inf, -inf, -inf], [1.0, -inf, -inf], [2.0, nan, 9.0], [nan, 1.0, 2.0]])
    y = torch.tensor([0, 1, 2, 0, 0, 0, 0, 0])
    before = goodness.clone()
    assert negatives.hardest_labels(goodness, y).tolist() == [2, 0, 0, 1, 1, 1, 1, 2]
    assert torch.equal(goodness.nan_to_num(7), before.nan_to_num(7))


def test_hardest_at_random():
    generator = torch.Generator().manual_seed(0)
    goodness, y = torch.randn(300, 7, generator=generator), labels(300, 7)
    expected = goodness.clone()
    expected[torch.arange(300), y] = -float("inf")
    assert torch.equal(negatives.hardest_labels(goodness, y), expected.argmax(1))


def test_permuted_keeps_the_counts():
    y = labels(1000)
    out = negatives.permuted_labels(y, negatives_generator(0, 0))
    assert torch.equal(out.bincount(), y.bincount())
    assert 0 < int((out == y).sum()) < 1000  # may equal the own label, as in the published code


def test_mixtures_take_every_pixel_from_one_of_two_images():
    count = 33
    x = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 12, 12).contiguous()
    before = x.clone()
    out = negatives.masked_mixtures(x, negatives_generator(0, 0))
    assert torch.equal(x, before)
    partners = []
    for own, image in enumerate(out):
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        other = [v for v in image.unique().tolist() if v != own]
        assert len(other) <= 1
        partners += other
    # A partner is never oneself nor taken twice; some mask may be all of one kind.
    assert len(set(partners)) == len(partners) > count // 2


def test_two_images_are_always_mixed_with_each_other():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    for step in range(8):
        out = negatives.masked_mixtures(x, negatives_generator(0, step))
        assert all(0 < float(image.mean()) < 1 for image in out)


def test_masks_are_those_of_repeated_blurring():
    """Against a convolution in float64 with the 3x3 outer product of the filter."""
    shape, blurs = (4, 11, 7), 3
    soft = torch.randint(0, 2, shape, generator=negatives_generator(0, 0)).double()[:, None]
    line = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    kernel = torch.outer(line, line)[None, None]
    for _ in range(blurs):
        padded = torch.nn.functional.pad(soft, (1, 1, 1, 1), mode="replicate")
        soft = torch.nn.functional.conv2d(padded, kernel)
    mask = negatives.blob_masks(shape, negatives_generator(0, 0), blurs)
    assert torch.equal(mask, soft[:, 0] > 0.5)


def test_masks_have_large_regions_and_both_kinds():
    def edges(blurs: int) -> float:
        mask = negatives.blob_masks((50, 28, 28), negatives_generator(0, 0), blurs)
        assert 0.4 < float(mask.float().mean()) < 0.6
        return float((mask[..., 1:] != mask[..., :-1]).float().mean())

    assert edges(0) > 2 * edges(2) and edges(2) > 1.2 * edges(6) > 1.2 * edges(20)


def test_a_nan_stays_where_it_is():
    x = torch.zeros(2, 1, 16, 16)
    x[0] = float("nan")
    out = negatives.masked_mixtures(x, negatives_generator(0, 0))
    assert all(0 < int(image.isnan().sum()) < 256 for image in out)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 2, 1, 7), (3, 2, 7, 1), (2, 0, 4, 4),
                                   (2, 1, 0, 0)])
def test_mixtures_of_odd_shapes(shape):
    x = torch.zeros(shape, dtype=torch.uint8)
    out = negatives.masked_mixtures(x, negatives_generator(0, 0))
    assert out.shape == shape and out.dtype is torch.uint8


GENERATOR = torch.Generator()
WRONG = {
    "kind": (lambda: negatives.draw("rnd", labels(4), 5, GENERATOR),
             "expected one of random, inverse, hardest, permuted, masked, got 'rnd'"),
    "classes": (lambda: negatives.random_labels(labels(4), 1, GENERATOR),
                "num_classes >= 2, got 1"),
    "inverse": (lambda: negatives.inverse_rows(labels(4), 0), "num_classes >= 2, got 0"),
    "range": (lambda: negatives.draw("permuted", labels(9), 4, GENERATOR),
              r"labels in \[0, 4\), got 4"),
    "negative": (lambda: negatives.random_labels(labels(9) - 1, 5, GENERATOR), "got -1"),
    "2-D": (lambda: negatives.random_labels(labels(4)[:, None], 5, GENERATOR), r"got \(4, 1\)"),
    "goodness": (lambda: negatives.draw("hardest", labels(4), 5, GENERATOR), "got none"),
    "columns": (lambda: negatives.draw("hardest", labels(4), 5, GENERATOR,
                                       goodness=torch.zeros(4, 3)), r"\(N, 5\), got \(4, 3\)"),
    "rows": (lambda: negatives.hardest_labels(torch.zeros(3, 5), labels(4)),
             r"\(4, K\), got \(3, 5\)"),
    "images": (lambda: negatives.draw("masked", labels(4), 5, GENERATOR), "got none"),
    "flat": (lambda: negatives.masked_mixtures(torch.zeros(4, 9), GENERATOR), r"got \(4, 9\)"),
    "one": (lambda: negatives.masked_mixtures(torch.zeros(1, 1, 4, 4), GENERATOR), "at least 2"),
    "blurs": (lambda: negatives.masked_mixtures(torch.zeros(2, 1, 4, 4), GENERATOR, -1), "got -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(case):
    call, text = WRONG[case]
    with pytest.raises(ValueError, match=text) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("[negatives] ") and "\n" not in message


def test_labels_of_another_dtype():
    with pytest.raises(TypeError, match=r"\[negatives\] expected int64 labels, got torch.float32"):
        negatives.random_labels(labels(4).float(), 5, GENERATOR)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_draws_the_same(kind):
    here = drawn(kind)
    images = torch.rand(64, 3, 8, 9, generator=torch.Generator().manual_seed(5)).cuda()
    goodness = torch.rand(64, 5, generator=torch.Generator().manual_seed(6)).cuda()
    there = negatives.draw(kind, labels(64).cuda(), 5, negatives_generator(0, 0),
                           goodness=goodness, x=images)
    assert there.is_cuda and torch.equal(here, there.cpu())
