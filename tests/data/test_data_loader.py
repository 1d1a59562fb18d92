"""`loader`: every sample once, in an order that (seed, epoch) fixes."""

from __future__ import annotations

import pytest
import torch

from ffengine.data import ImageSet, augment, loader


def numbered(count: int = 23) -> ImageSet:
    """Image i is all i, label i."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 4)
    return ImageSet(images.contiguous(), torch.arange(count), (0.1, 0.2), (0.5, 0.6))


def labels(batches) -> list[int]:
    return torch.cat([y for _, y in batches]).tolist()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_images_follow_labels(on_device, shuffle):
    data = numbered()
    batches = loader(data, batch_size=5, shuffle=shuffle, on_device=on_device, device="cpu")
    got = list(batches)
    assert len(got) == len(batches) == 5 and len(got[-1][1]) == 3
    assert sorted(labels(got)) == list(range(23))
    assert (labels(got) == list(range(23))) is not shuffle
    for x, y in got:
        assert x.dtype == torch.float32 and torch.equal(x, data.batch(y)[0])
        x.zero_()
        y.zero_()
    assert torch.equal(data.images, numbered().images) and torch.equal(
        data.labels, numbered().labels
    )


def test_order_is_a_function_of_seed_and_epoch():
    data = numbered()
    torch.manual_seed(1)
    first = loader(data, batch_size=4, shuffle=True, seed=3, epoch=2)
    expected = labels(first)
    torch.manual_seed(2)
    assert labels(first) == expected  # iterating does not advance anything
    other = loader(data, batch_size=4, shuffle=True, seed=3)
    assert labels(other) != expected
    other.set_epoch(2)
    assert labels(other) == expected
    assert labels(loader(data, batch_size=4, shuffle=True, seed=2, epoch=3)) != expected
    assert labels(loader(data, batch_size=9, shuffle=True, seed=3, epoch=2)) == expected


def test_iteration_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(loader(numbered(), batch_size=4, shuffle=True, augment=augment.RandomHorizontalFlip()))
    assert torch.equal(torch.rand(3), expected)


def test_epoch_is_taken_when_the_iteration_starts():
    batches = loader(numbered(), batch_size=4, shuffle=True)
    expected = labels(batches)
    running = iter(batches)
    batches.set_epoch(1)
    assert labels(running) == expected


def test_resume_within_an_epoch():
    flip = augment.build(crop=1, flip=True)
    batches = loader(numbered(), batch_size=4, shuffle=True, seed=1, epoch=7, augment=flip)
    whole = list(batches)
    for (x, y), (x2, y2) in zip(whole[3:], batches.batches(start=3), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_augmentation_is_keyed_on_seed_epoch_and_batch():
    def noise(x, generator):
        return torch.rand(x.shape, generator=generator)

    def run(**keys):
        return list(loader(numbered(8), batch_size=4, augment=noise, **keys))

    first, again = run(seed=1, epoch=1), run(seed=1, epoch=1)
    assert torch.equal(first[0][0], again[0][0]) and torch.equal(first[1][0], again[1][0])
    assert not torch.equal(first[0][0], first[1][0])
    for other in (run(seed=2, epoch=1), run(seed=1, epoch=2)):
        assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_sees_unit_images_and_cannot_reach_the_set(dtype):
    data = numbered()
    images = data.images if dtype == torch.uint8 else data.images / 255
    data = ImageSet(images, data.labels, data.mean, data.std)
    before, seen = images.clone(), []

    def spoil(x, generator):
        seen.append(x.clone())
        return x.zero_()

    list(loader(data, batch_size=7, augment=spoil))
    assert torch.equal(data.images, before)
    torch.testing.assert_close(torch.cat(seen), numbered().images / 255)


@pytest.mark.parametrize(
    "count, drop, expected",
    [(23, True, 4), (20, True, 4), (20, False, 4), (0, False, 0), (3, True, 0)],
)
def test_lengths(count, drop, expected):
    batches = loader(numbered(count), batch_size=5, drop_last=drop, shuffle=True)
    assert len(batches) == expected == len(list(batches))


def test_bad_batch_size():
    with pytest.raises(ValueError, match=r"\[loader\] batch_size must be at least 1, got 0"):
        loader(numbered(), batch_size=0)
    with pytest.raises(TypeError, match=r"batch_size expected a whole number, got 2\.5"):
        loader(numbered(), batch_size=2.5)


def test_meta_device_stands_for_another_device():
    """The batch goes where it is asked to, whole set or batch by batch."""
    for on_device in (False, True):
        x, y = next(iter(loader(numbered(), batch_size=4, device="meta", on_device=on_device)))
        assert x.device.type == y.device.type == "meta" and x.shape == (4, 2, 3, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"on_device": True}, {"prefetch": False}])
def test_cuda_gives_the_same_batches(options):
    settings = {"batch_size": 5, "shuffle": True, "augment": augment.build(crop=1, flip=True)}
    here = list(loader(numbered(), **settings))
    there = list(loader(numbered(), device="cuda", **settings, **options))
    for (x, y), (x2, y2) in zip(here, there, strict=True):
        assert x2.is_cuda and torch.equal(y, y2.cpu())
        torch.testing.assert_close(x, x2.cpu())


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_indices_are_the_rows_that_batches_read(shuffle, drop):
    data = numbered()
    batches = loader(data, batch_size=5, shuffle=shuffle, seed=3, epoch=2, drop_last=drop)
    for start in (0, 2, len(batches)):
        rows = list(batches.indices(start))
        assert len(rows) == len(batches) - start
        for index, (x, y) in zip(rows, batches.batches(start), strict=True):
            assert index.dtype is torch.int64 and index.device.type == "cpu"
            assert torch.equal(index, y) and torch.equal(data.batch(index)[0], x)


def test_indices_take_the_epoch_when_they_start():
    batches = loader(numbered(), batch_size=4, shuffle=True)
    expected = torch.cat(list(batches.indices()))
    running = batches.indices()
    batches.set_epoch(1)
    assert torch.equal(torch.cat(list(running)), expected)
    assert not torch.equal(torch.cat(list(batches.indices())), expected)


def test_indices_read_features_in_the_order_of_the_batches():
    data = numbered()
    features = torch.arange(23.0) * 2
    batches = loader(data, batch_size=4, shuffle=True, augment=augment.RandomHorizontalFlip())
    for index, (_, y) in zip(batches.indices(), batches, strict=True):
        assert torch.equal(features[index], y * 2.0)
