"""Super-classes: CIFAR-100's own, given ones, blocks of labels, and clusters of class means."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ffengine.data import superclasses
from ffengine.data.superclasses import SuperClasses

#: The coarse label of each fine label in CIFAR-100's files, typed from the numbers, not the names.
CIFAR100 = """
4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13
15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"""


def test_cifar100_by_name():
    found = superclasses.by_name("cifar100")
    assert found.map == tuple(int(n) for n in CIFAR100.split())
    assert (found.num_classes, found.num_super) == (100, 20)
    assert torch.bincount(torch.tensor(found.map)).tolist() == [5] * 20
    assert list(superclasses.CIFAR100) == sorted(superclasses.CIFAR100)


def test_apply():
    found = superclasses.given([1, 0, 2, 0], 4)
    y = torch.tensor([[3, 0], [2, 2]])
    assert found.apply(y).tolist() == [[0, 1], [2, 2]] and y.tolist() == [[3, 0], [2, 2]]
    assert found.apply(y).dtype is torch.int64 and found.apply(y[:0]).shape == (0, 2)
    first = found.apply(y)
    first.zero_()
    assert found.apply(y).tolist() == [[0, 1], [2, 2]]
    with pytest.raises(ValueError, match=r"\[superclasses\] expected labels in \[0, 4\), got 4"):
        found.apply(torch.tensor([4]))
    with pytest.raises(ValueError, match="got -1"):
        found.apply(torch.tensor([-1, 0]))
    with pytest.raises(TypeError, match=r"expected int64 labels, got torch\.int32"):
        found.apply(y.int())


@pytest.mark.parametrize("form", [[1, 0, 1], (1, 0, 1), {2: 1, 0: 1, 1: 0},
                                  torch.tensor([1, 0, 1])], ids=["list", "tuple", "map", "tensor"])
def test_given(form):
    assert superclasses.given(form, 3) == SuperClasses((1, 0, 1))


@pytest.mark.parametrize("form, classes, text", [
    ({0: 0, 2: 1}, 3, "class 1 has none"),
    ([0, 1], 3, "class 2 has none"),
    ([0, -1, 1], 3, "class 1 has none"),
    ([0, 1, 1, 0], 3, r"classes 0\.\.2, got class 3"),
    ([0, 2, 2], 3, r"0\.\.2 without gaps, no class has 1"),
    ([1, 2, 2], 3, "no class has 0"),
    ([0, 0, 0], 3, "at least 2 super-classes, got 1"),
    ([], 0, "at least 2 super-classes, got 0"),
])
def test_given_errors(form, classes, text):
    with pytest.raises(ValueError, match=text) as caught:
        superclasses.given(form, classes)
    assert str(caught.value).startswith("[superclasses] ") and "\n" not in str(caught.value)


def test_other_names():
    with pytest.raises(ValueError, match="those of cifar100, got 'mnist'"):
        superclasses.by_name("mnist")


def test_blocks():
    found = superclasses.blocks(100, 5)
    assert found.num_super == 20 and found.map[4:6] == (0, 1) and found.map[99] == 19
    assert superclasses.blocks(7, 3).map == (0, 0, 0, 1, 1, 1, 2)
    for size in (0, 10, 11):
        with pytest.raises(ValueError, match=rf"a size in 1\.\.9, got {size}"):
            superclasses.blocks(10, size)


def clouds(per_class: int = 20, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes c and c + 3 look alike."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 2, 4, 4, generator=generator) * 10
    y = torch.arange(per_class * classes) % classes
    y = y[torch.randperm(len(y), generator=generator)]
    return centres[y % 3] + torch.randn(len(y), 2, 4, 4, generator=generator), y


@pytest.mark.parametrize("linkage", ["ward", "average"])
def test_cluster_finds_what_looks_alike(linkage):
    images, y = clouds()
    found = superclasses.cluster(images, y, 3, linkage=linkage)
    assert found.map == (0, 1, 2, 0, 1, 2)
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    assert superclasses.cluster(images[shuffled], y[shuffled], 3, linkage=linkage) == found
    assert superclasses.cluster(images.double(), y, 3, linkage=linkage) == found


def test_every_class_alone():
    images, y = clouds()
    assert superclasses.cluster(images, y, 6).map == (0, 1, 2, 3, 4, 5)


def test_ward_and_average_differ_where_they_should():
    """Means on a line: ward would rather split the many, average the one far off."""
    means = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 11.0])
    y = torch.arange(9)
    average = superclasses.cluster(means, y, 2, linkage="average")
    ward = superclasses.cluster(means, y, 2)
    assert sum(average.map) == 1 and sum(ward.map) > 1


@pytest.mark.parametrize("linkage", ["ward", "average"])
def test_cuts_of_one_tree_nest(linkage):
    generator = torch.Generator().manual_seed(3)
    means, y = torch.randn(30, 12, generator=generator), torch.arange(30)
    maps = [superclasses.cluster(means, y, s, linkage=linkage).map for s in range(2, 31)]
    for coarse, fine in pairwise(maps):
        assert len(set(zip(fine, coarse, strict=True))) == max(fine) + 1 == max(coarse) + 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_means_in_pieces(dtype):
    count = 2500  # more than two pieces
    images = (torch.arange(count * 3) % 251).view(count, 3).to(dtype)
    y = torch.arange(count) % 7
    means = superclasses.class_means(images, y, 7)
    expected = torch.stack([images.double()[y == c].mean(0) for c in range(7)])
    assert means.dtype is torch.float64 and torch.allclose(means, expected, rtol=1e-13)


def test_equal_means_still_give_the_number_asked_for():
    found = superclasses.cluster(torch.zeros(8, 3), torch.arange(8), 4)
    assert found.num_super == 4
    assert found == superclasses.cluster(torch.zeros(8, 3), torch.arange(8), 4)


@pytest.mark.parametrize("change, text", [
    ({"num_super": 7}, r"num_super in 2\.\.6 \(the classes\), got 7"),
    ({"num_super": 1}, "got 1"),
    ({"num_classes": 8}, "class 6 has none"),
    ({"num_classes": 5}, r"labels in \[0, 5\), got 5"),
    ({"linkage": "single"}, "ward or average, got 'single'"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 \(120,\), got torch.int64 \(3,\)"),
    ({"images": torch.full((120, 2), float("nan"))}, "finite images, class 0"),
])
def test_cluster_errors(change, text):
    images, labels = clouds()
    settings = {"images": images, "labels": labels, "num_super": 3} | change
    with pytest.raises(ValueError, match=text) as caught:
        superclasses.cluster(**settings)
    assert str(caught.value).startswith("[superclasses] ") and "\n" not in str(caught.value)


@pytest.mark.gpu
def test_cuda():
    found = superclasses.by_name("cifar100")
    y = torch.arange(100)
    assert torch.equal(found.apply(y.cuda()).cpu(), found.apply(y))
    images, labels = clouds()
    assert superclasses.cluster(images.cuda(), labels.cuda(), 3).map == (0, 1, 2, 0, 1, 2)
