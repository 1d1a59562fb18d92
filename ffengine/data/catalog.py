"""What is known beforehand about each data set: files, checksums, homes, constants."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """A data set that lives in files of a published format.

    parts: the files a folder must hold, uncompressed names; a part may also be there as
        ``part.gz`` if that is how it is published.
    remotes: published file -> ``"algorithm:hexdigest"``; either the parts (or their .gz), or
        one archive of all of them.
    folders: where to look below the root, in this order; new downloads go to the first.
    sizes: published file -> its bytes. A file of a published name and size is held to its checksum
        wherever it lies; one of another size is somebody's own.
    archive_folder: the folder the parts lie in inside the archive; "" if there is no archive.
    homes: base addresses, tried in this order; the file name is appended.
    mean, std: per channel, of the training images in [0, 1].
    train: how many training samples there are.
    valid: how many of them the literature usually holds out.
    """

    name: str
    parts: tuple[str, ...]
    remotes: dict[str, str]
    folders: tuple[str, ...]
    homes: tuple[str, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: int
    valid: int
    archive_folder: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def archive(self) -> str | None:
        """Name of the published archive, or None where the parts are published one by one."""
        return next(iter(self.remotes)) if self.archive_folder else None


_IDX_PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx_remotes(*digests: str) -> dict[str, str]:
    return {f"{p}.gz": f"md5:{d}" for p, d in zip(_IDX_PARTS, digests, strict=True)}


def _idx_sizes(*sizes: int) -> dict[str, int]:
    return {f"{p}.gz": n for p, n in zip(_IDX_PARTS, sizes, strict=True)}


_MNIST = Source(
    name="mnist",
    parts=_IDX_PARTS,
    remotes=_idx_remotes(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    folders=("MNIST/raw", "MNIST", "mnist/raw", "mnist", "."),
    # The original home often refuses automated requests, so its mirrors come first.
    homes=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    num_classes=10,
    mean=(0.1307,),
    std=(0.3081,),
    train=60_000,
    valid=10_000,
    sizes=_idx_sizes(9_912_422, 28_881, 1_648_877, 4_542),
)

_FASHION = Source(
    name="fashion_mnist",
    parts=_IDX_PARTS,
    remotes=_idx_remotes(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    folders=("FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "fashion-mnist", "."),
    homes=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    num_classes=10,
    mean=(0.2860,),
    std=(0.3530,),
    train=60_000,
    valid=10_000,
    sizes=_idx_sizes(26_421_880, 29_515, 4_422_102, 5_148),
)

_CIFAR10 = Source(
    name="cifar10",
    parts=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    remotes={"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"},
    folders=("cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "."),
    homes=("https://www.cs.toronto.edu/~kriz/",),
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    train=50_000,
    valid=5_000,
    archive_folder="cifar-10-batches-bin",
    sizes={"cifar-10-binary.tar.gz": 170_052_171},
)

_CIFAR100 = Source(
    name="cifar100",
    parts=("train.bin", "test.bin"),
    remotes={"cifar-100-binary.tar.gz": "md5:03b5dce01913d631647c71ecec9e9cb8"},
    folders=("cifar100", "cifar-100-binary", "cifar100/cifar-100-binary", "."),
    homes=("https://www.cs.toronto.edu/~kriz/",),
    num_classes=100,
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    train=50_000,
    valid=5_000,
    archive_folder="cifar-100-binary",
)

_SVHN = Source(
    name="svhn",
    parts=("train_32x32.mat", "test_32x32.mat"),
    remotes={
        "train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "md5:eb5a983be6a315427106f1b164d9cef3",
    },
    folders=("svhn", "SVHN", "."),
    homes=("http://ufldl.stanford.edu/housenumbers/",),
    num_classes=10,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    train=73_257,
    valid=5_000,
    sizes={"train_32x32.mat": 182_040_794, "test_32x32.mat": 64_275_384},
)

SOURCES: dict[str, Source] = {s.name: s for s in (_MNIST, _FASHION, _CIFAR10, _CIFAR100, _SVHN)}
NAMES: tuple[str, ...] = ("digits", *SOURCES, "synthetic")
COARSE_CLASSES = 20  # CIFAR-100's superclasses
