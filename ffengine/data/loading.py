"""`load`: a data set by name, as `Splits`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffengine.data import builtin, formats, own
from ffengine.data.catalog import COARSE_CLASSES, NAMES, SOURCES, Source
from ffengine.data.files import data_root, obtain
from ffengine.data.image_set import ImageSet, Splits
from ffengine.data.scale import SET, constants
from ffengine.data.sizes import check_int, resize
from ffengine.data.split import hold_out
from ffengine.typed import typed
from ffengine.words import meant

_FILE_OPTIONS = ("valid_split", "urls", "checksums")
_OPTIONS = {
    **dict.fromkeys(SOURCES, _FILE_OPTIONS),
    "digits": ("valid_split",),
    "synthetic": ("shape", "num_classes", "train", "test"),
}


@typed("data")
def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    valid: int | None = None,
    download: bool = True,
    coarse: bool = False,
    normalize: Any = SET,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> Splits:
    """The data set `name`, split in train, valid and test: one of `NAMES`, or one's own, as
    "folder:PATH", "npz:PATH" or "csv:PATH" (see `own`, with its options).

    root: folder that holds the files, or is to hold them; default $FFENGINE_DATA, else the user's
        cache folder. One's own PATH is below it, where it is given and PATH is relative.
    image_size: H = W, or (H, W), to resize to bilinearly.
    seed: of the held-out split, and of all of `synthetic`; 0 <= seed < 2**32.
    valid: training samples to hold out. Default: digits a fixed 180, mnist and fashion_mnist
        10,000, the others 5,000, but a tenth where that is over half of the set; synthetic makes
        an eighth of `train` in addition; a tenth of one's own, unless they come with a part so.
    download: fetch files that are not in `root`.
    coarse: CIFAR-100's 20 superclasses as labels.
    normalize: "set" (True), subtract the set's mean and divide by its standard deviation; "off"
        (False), images stay in [0, 1]; or (mean, sd) to do it with (see `scale.constants`).
    classes: of one's own data, names in the order of their labels; default is those of the
        training samples, sorted.
    options: for sets in files valid_split ("random", which is stratified, or "last"), urls,
        checksums (see `files.obtain`); for digits valid_split; for synthetic
        shape=(3, 32, 32), num_classes=10, train=512, test=128.

    Raises ValueError for an unknown name, option or value and for damaged files, FileNotFoundError
    or ConnectionError when the files cannot be had.
    """
    _check(name, seed, valid, coarse, options)
    if own.is_own(name):
        return own.load(name, root=root, image_size=image_size, seed=seed, valid=valid,
                        normalize=normalize, classes=classes, **options)
    if classes is not None:
        raise ValueError(f"[data] classes are for one's own data, got them for {name}")
    if name == "digits":
        sets, count = _digits(seed, valid, options), 10
    elif name == "synthetic":
        sets, count = _synthetic(seed, valid, **options)
    else:
        source = SOURCES[name]
        sets = _from_files(source, data_root(root), seed, valid, download, options)
        count = source.num_classes
    sets = [_finished(s, image_size, coarse, normalize) for s in sets]
    train, held_out, test = sets
    return Splits(name, train, held_out, test, COARSE_CLASSES if coarse else count, train.shape,
                  settled={"normalize": (train.mean, train.std)})


def _check(name: str, seed: int, valid: int | None, coarse: bool, options: dict[str, Any]) -> None:
    if name not in NAMES and not own.is_own(name):
        raise ValueError(f"[data] name must be one of {', '.join((*NAMES, *own.FORMS))}, got "
                         f"{name!r}{meant(name, NAMES)}")
    known_options = own.options_of(name) if own.is_own(name) else _OPTIONS[name]
    for option in options:
        if option not in known_options:
            known = ", ".join(known_options)
            raise ValueError(f"[data] options of {name} are {known}, got {option!r}"
                             f"{meant(option, known_options)}")
    check_int("seed", seed, 0, 2**32 - 1)
    if valid is not None:
        check_int("valid", valid, 0)
    if coarse and name != "cifar100":
        raise ValueError(f"[data] coarse labels are known for cifar100 only, got {name!r}")


def _digits(seed: int, valid: int | None, options: dict[str, Any]) -> list[ImageSet]:
    images, labels, rows = builtin.digits()
    if valid is not None or options:
        # Another held-out part of the same training samples: the test set stays what it is.
        pool = torch.cat([rows["train"], rows["valid"]]).sort().values
        held = len(rows["valid"]) if valid is None else valid
        kept, out = hold_out(labels[pool], held, seed, options.get("valid_split", "random"))
        rows |= {"train": pool[kept], "valid": pool[out]}
    whole = ImageSet(images, labels, builtin.DIGITS_MEAN, builtin.DIGITS_STD)
    return [whole.subset(rows[part]) for part in ("train", "valid", "test")]


def _synthetic(
    seed: int,
    valid: int | None,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    num_classes: int = 10,
    train: int = 512,
    test: int = 128,
) -> tuple[list[ImageSet], int]:
    shape = tuple(shape)  # type: ignore[assignment]  # a list is welcome, as TOML gives one
    if len(shape) != 3:
        raise ValueError(f"[data] shape must be (C, H, W), got {shape}")
    for size in shape:
        check_int("every entry of shape", size, 1)
    for what, value, low in (
        ("num_classes", num_classes, 1),
        ("train", train, 1),
        ("test", test, 0),
    ):
        check_int(what, value, low)
    counts = (train, max(1, train // 8) if valid is None else valid, test)
    made = builtin.synthetic(shape=shape, num_classes=num_classes, counts=counts, seed=seed)
    pixels = made[0][0].to(torch.float64) / 255
    mean = tuple(pixels.mean(dim=(0, 2, 3)).tolist())
    # A single constant image has no spread to divide by.
    std = tuple(s or 1.0 for s in pixels.std(dim=(0, 2, 3), unbiased=False).tolist())
    return [ImageSet(images, labels, mean, std) for images, labels in made], num_classes


def _from_files(
    source: Source,
    root: Path,
    seed: int,
    valid: int | None,
    download: bool,
    options: dict[str, Any],
) -> list[ImageSet]:
    places = {k: options[k] for k in ("urls", "checksums") if k in options}
    files = obtain(source, root, download=download, **places)
    full, test = (
        ImageSet(images, labels[0], source.mean, source.std, *labels[1:])
        for images, *labels in _READERS[source.name](source, files)
    )
    if full.shape != test.shape:
        raise formats.bad_file(
            next(iter(files.values())).parent,
            "training and test images of one shape",
            f"{full.shape} and {test.shape}",
        )
    total = len(full)
    usual = source.valid if 2 * source.valid < total else total // 10
    kept, held = hold_out(
        full.labels, usual if valid is None else valid, seed, options.get("valid_split", "random")
    )
    return [full.subset(kept), full.subset(held), test]


def _read_idx(source: Source, files: dict[str, Path]) -> list[tuple[Tensor, ...]]:
    paths = [files[part] for part in source.parts]
    return [
        formats.read_idx_pair(paths[0], paths[1], source.num_classes),
        formats.read_idx_pair(paths[2], paths[3], source.num_classes),
    ]


def _read_svhn(source: Source, files: dict[str, Path]) -> list[tuple[Tensor, ...]]:
    return [formats.read_svhn(files[part]) for part in source.parts]


def _read_cifar(source: Source, files: dict[str, Path]) -> list[tuple[Tensor, ...]]:
    """Train (all parts but the last) and test: images, fine labels, and CIFAR-100's coarse ones."""
    classes = (COARSE_CLASSES, 100) if source.num_classes == 100 else (10,)
    if source.archive in files:
        path = files[source.archive]
        members = formats.read_tar_members(path, source.archive_folder, source.parts)
        blobs = [(f"{path}:{part}", members[part]) for part in source.parts]
    else:
        blobs = [(str(files[p]), bytearray(files[p].read_bytes())) for p in source.parts]
    parsed = [formats.parse_cifar(data, classes, path) for path, data in blobs]
    train = [torch.cat(columns) for columns in zip(*parsed[:-1], strict=True)]
    # The file has the coarse label first, an ImageSet the fine one.
    return [(part[0], *reversed(part[1:])) for part in (train, parsed[-1])]


_READERS: dict[str, Callable[[Source, dict[str, Path]], list[tuple[Tensor, ...]]]] = {
    "mnist": _read_idx,
    "fashion_mnist": _read_idx,
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "svhn": _read_svhn,
}


def _finished(
    images: ImageSet, image_size: int | tuple[int, int] | None, coarse: bool, normalize: Any
) -> ImageSet:
    """The set as the caller wants it: size, kind of labels, scale."""
    pixels = images.images if image_size is None else resize(images.images, image_size)
    labels = images.labels
    if coarse and images.coarse_labels is not None:
        labels = images.coarse_labels
    mean, std = constants(normalize, images.mean, images.std)
    return ImageSet(pixels, labels, mean, std, images.coarse_labels)
