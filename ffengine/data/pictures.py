"""Folders of images, a folder per class: found, looked at, decoded once into bytes.

PNG, JPEG and BMP of any size, through Pillow. Bytes stay in RAM, or from `RAM_BYTES` on in a file
without a name that is mapped into memory and gone with the process. What cannot be decoded whole
is a ValueError that names the file; so is what 8 bits a channel in grey or RGB do not hold.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ffengine.data.files import user_cache
from ffengine.data.sizes import sides_of
from ffengine.needs import need

RAM_BYTES = 2_000_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_FORMATS = ("PNG", "JPEG", "BMP")
#: What desktops leave in folders.
_LITTER = ("thumbs.db", "desktop.ini")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX")
_PNG_DEPTH = 24  # the byte of a PNG that says its bits a channel

#: What a split's folder may be called.
_PARTS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
            "truck")

T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """Images on disk by split ("train", "valid", "test"; or "all", of one folder that is to be
    split), in order: `names` are their classes.
    """

    path: Path
    files: dict[str, list[Path]]
    names: dict[str, list[str]]

    @property
    def label(self) -> str | None:
        """What results on it are to be called, where it is a known copy of a published set.

        The ten class names of CIFAR-10 and its 50,000 + 10,000 images as JPEG files, which lose
        some of the images: never CIFAR-10 itself.
        """
        counts = {part: [self.names[part].count(c) for c in _CIFAR10] for part in self.names}
        jpeg = all(f.suffix.lower() in (".jpg", ".jpeg") for part in self.files.values()
                   for f in part)
        copy = counts == {"train": [5000] * 10, "test": [1000] * 10}
        return "CIFAR-10 (JPEG copy)" if copy and jpeg else None


def folder(path: Path) -> Folder:
    """The images below `path`: train/CLASS/ and test/CLASS/ (and valid/ or val/), or CLASS/ alone.

    Raises ValueError naming a class folder that is empty, a class that training lacks, or a file
    that is no image; FileNotFoundError or NotADirectoryError for the path.
    """
    if not path.exists():
        raise FileNotFoundError(f"[data] folder: expected a folder of images, {path} is not there")
    if not path.is_dir():
        raise NotADirectoryError(f"[data] folder: expected a folder of images, got the file {path}")
    split = (path / "train").is_dir() and (path / "test").is_dir()
    parts = {part: path / word for part, words in _PARTS.items() for word in words
             if (path / word).is_dir()} if split else {"all": path}
    found = {part: _by_class(place) for part, place in parts.items()}
    first = next(iter(parts))
    if len(found[first]) < 2:
        raise ValueError(f"[data] {path}: expected train/ and test/ with a folder per class, or a "
                         f"folder for each of two or more classes, got "
                         f"{', '.join(found[first]) or 'no folder'} in {parts[first]}")
    return Folder(path, {part: [f for files in classes.values() for f in files]
                         for part, classes in found.items()},
                  {part: [name for name, files in classes.items() for _ in files]
                   for part, classes in found.items()})


def _by_class(path: Path) -> dict[str, list[Path]]:
    """Class -> its files, both sorted by name."""
    found = {}
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found[entry.name] = images_below(entry)
            if not found[entry.name]:
                raise ValueError(f"[data] expected images in every class folder, got none in "
                                 f"{entry}")
        elif entry.suffix.lower() in SUFFIXES:
            raise ValueError(f"[data] expected images in a folder per class, got {entry}")
    return found


def images_below(path: Path) -> list[Path]:
    """All files below a folder, sorted; ValueError for one that is not named as an image is."""
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(path, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or name.lower() in _LITTER:
                continue
            if not name.lower().endswith(SUFFIXES):
                raise ValueError(f"[data] expected PNG, JPEG or BMP images ({', '.join(SUFFIXES)}),"
                                 f" got {os.path.join(place, name)}")
            found.append(Path(place) / name)
    return found


def images_of(places: Sequence[Path]) -> list[Path]:
    """Images named one by one, or as folders of them."""
    return [image for place in places for image in (
        images_below(place) if place.is_dir() else [place])]


def decode(files: Sequence[Path], *, channels: int | None = None,
           image_size: int | tuple[int, int] | None = None) -> Tensor:
    """The images as uint8 (N, C, H, W), decoded by as many threads as torch uses.

    channels: 1 (luma) or 3; default: 3 where some image has colour. Alpha is dropped, and EXIF
        orientation applied. image_size: resized to bilinearly, with antialiasing where it shrinks
        and whatever the aspect; without, all must be of one size.

    Raises ValueError in one line that names the file, for the first in order that cannot be read,
    is truncated, has 16 bits a channel, or is in another space than grey or RGB (CMYK).
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"[data] channels expected 1 or 3, got {channels!r}")
    image = need("PIL.Image", "[data] decoding images")
    with _threads() as each:
        seen = list(each(lambda f: _read(image, f, _kind), files))
        depth = channels or (3 if any(colour for colour, _ in seen) else 1)
        height, width = _common(files, [size for _, size in seen]) if image_size is None else (
            sides_of(image_size))
        out = torch.from_numpy(storage((len(files), depth, height, width)))

        def put(row: int) -> None:
            pixels = _read(image, files[row], lambda found, _: _pixels(
                found, depth, None if image_size is None else (height, width)))
            out[row] = torch.from_numpy(pixels)

        for _ in each(put, range(len(files))):
            pass
    return out


@contextlib.contextmanager
def _threads() -> Iterator[Callable[..., Iterator[Any]]]:
    """A parallel `map`, in which decoders' warnings of what they can read all the same are mute."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the others' turn will not come
            raise


def storage(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes to fill: in RAM, or mapped from a file in the user's cache that has no name.

    Its room on the disk is taken here, so that a full one is an OSError and not a crash later.
    """
    wanted = int(np.prod(shape))
    if wanted <= RAM_BYTES:
        return np.empty(shape, np.uint8)
    place = user_cache()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # not everywhere; without, a full disk is found late
                os.posix_fallocate(file.fileno(), 0, wanted)
        except OSError as error:
            raise OSError(f"[data] expected {wanted / 1e9:.1f} GB of room for decoded images in "
                          f"{place}: {error.strerror}") from error
        return np.memmap(file, np.uint8, "r+", shape=shape)


def _read(image: Any, path: Path, use: Callable[[Any, Path], T]) -> T:
    """What `use` makes of the open image; whatever a decoder raises becomes one line."""
    try:
        with image.open(path, formats=_FORMATS) as found:
            return use(found, path)
    except _Refused as error:
        raise ValueError(f"[data] expected images of 8 bits a channel in grey or RGB, got {error} "
                         f"in {path}") from None
    except image.UnidentifiedImageError:
        raise ValueError("[data] expected a PNG, JPEG or BMP image, got something else, or a "
                         f"damaged one, in {path}") from None
    except Exception as error:  # decoders of damaged files raise anything
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"[data] expected a whole, readable image, got an error ({said}) in "
                         f"{path}") from None


class _Refused(Exception):
    """A readable image of a kind that bytes in grey or RGB do not hold."""


def _kind(found: Any, path: Path) -> tuple[bool, tuple[int, int]]:
    """(whether it has colour, (H, W) as it will be decoded), from the header alone."""
    if found.format == "PNG":
        with path.open("rb") as file:
            depth = file.read(_PNG_DEPTH + 1)[_PNG_DEPTH]
        if depth == 16:  # of which Pillow keeps eight without a word, where there are channels
            raise _Refused("16 bits")
    if found.mode not in (*_GREY, *_COLOUR):
        raise _Refused("16 bits" if found.mode.startswith("I") else found.mode)
    turned = found.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    width, height = found.size
    return found.mode not in _GREY, (width, height) if turned else (height, width)


def _common(files: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise ValueError(f"[data] expected images of one size, or image_size to resize them to, got"
                         f" {'x'.join(map(str, sizes[0]))} in {files[0]} and "
                         f"{'x'.join(map(str, sizes[other]))} in {files[other]}")
    return sizes[0] if sizes else (1, 1)


def _pixels(found: Any, channels: int, size: tuple[int, int] | None
            ) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(C, H, W) of an open image."""
    upright = need("PIL.ImageOps", "[data] decoding images").exif_transpose(found)
    made = upright.convert("L" if channels == 1 else "RGB")
    if size is not None and made.size != size[::-1]:
        made = made.resize(size[::-1], need("PIL.Image", "[data]").Resampling.BILINEAR)
    pixels = np.array(made, np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
