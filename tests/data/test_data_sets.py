"""Any torch data set becomes splits, those that look like torchvision's as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own_files import CLASSES, flat
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import ffengine as ff
from ffengine.data import splits


class Pictures(Dataset):
    """As torchvision's are: PIL images, `classes`, a transform, no end to indexing."""

    classes = tuple(CLASSES)

    def __init__(self, count: int, transform=None, mode: str = "RGB") -> None:
        self.count, self.transform, self.mode, self.read = count, transform, mode, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        self.read += 1
        label = index % 3
        image = flat(list(CLASSES.values())[label], (8, 8), self.mode)
        return image if self.transform is None else self.transform(image), label


def to_tensor(image):
    """What torchvision's ToTensor does."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_a_set_of_pil_images_trains_as_it_is():
    train, test = Pictures(60), Pictures(12)
    found = splits(train, test)
    assert found.classes == tuple(CLASSES) and found.shape == (3, 8, 8)
    assert [len(s) for s in (found.train, found.valid, found.test)] == [54, 6, 12]
    assert found.train.images.dtype == torch.uint8 and (train.read, test.read) == (60, 12)
    assert (found.test.images[1] == CLASSES["bee"]).all()
    torch.manual_seed(0)
    net = ff.models.create("sn/mlp", num_classes=3, in_channels=3, image_size=8, layers=(12, 12))
    trainer = ff.Trainer(net, epochs=20, batch_size=9, progress=False, backend="reference")
    trainer.fit(ff.data.loader(found.train, batch_size=9, shuffle=True))
    assert trainer.evaluate(ff.data.loader(found.test, batch_size=9)) > 0.5


@pytest.mark.parametrize("mode, channels", [("L", 1), ("1", 1), ("P", 3), ("RGBA", 3)])
def test_modes_of_pil_images(mode, channels):
    found = splits(Pictures(9, mode=mode), image_size=5, valid=0)
    assert found.shape == (channels, 5, 5) and len(found.test) == 0


def test_tensors_in_the_unit_range_are_scaled_and_others_have_been():
    unit = splits(Pictures(30, to_tensor), normalize=(0.5, 0.25))
    assert unit.train.images.dtype == torch.float32 and unit.train.mean == (0.5,) * 3
    assert float(unit.train.images.max()) == pytest.approx(CLASSES["owl bird"] / 255)
    scaled = splits(Pictures(30, lambda image: (to_tensor(image) - 0.5) / 0.25))
    assert (scaled.train.mean, scaled.train.std) == ((0.0,) * 3, (1.0,) * 3)


def test_other_sets():
    images, labels = torch.rand(20, 4, 6), torch.arange(20) % 4
    plain = splits(TensorDataset(images, labels), valid=5)
    assert plain.shape == (1, 4, 6) and (plain.num_classes, plain.classes) == (4, None)
    assert len(splits(Subset(Pictures(30), range(10)), valid=1).train) == 9

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(np.full((5, 7, 3), i, np.uint8), np.int64(i % 2)) for i in range(8)])

    stream = splits(Stream(), valid=0)
    assert stream.shape == (3, 5, 7) and stream.train.images[:, 0, 0, 0].tolist() == list(range(8))
    mixed = [(flat(9, (4, 4), mode), 0) for mode in ("L", "RGB")] + [(flat(9, (4, 4)), 1)]
    assert splits(mixed, valid=0).shape == (3, 4, 4)


@pytest.mark.parametrize("samples, kind, said", [
    ([3], TypeError, "sample 0: expected (image, label), got int"),
    ([(flat(3), 0), (flat(3), 0.5)], TypeError, "sample 1: expected a label"),
    ([(flat(3), -1)], TypeError, "a whole number from 0, got -1"),
    ([("x.png", 0)], TypeError, "sample 0: expected a PIL image"),
    ([(torch.rand(2), 0)], TypeError, "got shape (2,)"),
    ([(torch.ones(1, 2, 2, dtype=torch.int32), 0)], TypeError, "got torch.int32"),
    ([(torch.full((1, 2, 2), float("nan")), 0)], ValueError, "sample 0: expected finite numbers"),
    ([(flat(3, mode="CMYK"), 0)], ValueError, "grey or RGB, got mode CMYK"),
    ([(flat(3), 0), (flat(3, (4, 4)), 1)], ValueError, "image_size to resize them"),
    ([], ValueError, "a data set with samples, got none"),
    (7, TypeError, "a torch.utils.data.Dataset of (image, label), got int")])
def test_samples_that_are_none(samples, kind, said):
    with pytest.raises(kind) as error:
        splits(samples)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_test_samples_must_fit_the_training_samples():
    with pytest.raises(ValueError, match=r"one shape and dtype, got .*uint8.*float32"):
        splits(Pictures(9), Pictures(9, to_tensor))
    images = torch.rand(6, 1, 3, 3)
    with pytest.raises(ValueError, match=r"in test labels below 2, .* got 5"):
        splits(TensorDataset(images, torch.arange(6) % 2), TensorDataset(images, torch.arange(6)))
