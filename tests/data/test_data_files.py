"""Where files are looked for, and downloads over loopback: verified, whole or not at all."""

from __future__ import annotations

import dataclasses

import pytest

from ffengine.data import NAMES, catalog, load


def everything(folder):
    return sorted(p.name for p in folder.rglob("*"))


def test_download_then_cache(make, serve, tmp_path):
    files = make.zipped(make.mnist())
    server = serve(files)
    options = {"urls": server.url, "checksums": make.md5s(files), "valid": 5}
    splits = load("mnist", **options)
    assert len(splits.train) == 55 and sorted(server.requests) == sorted(files)
    cached = tmp_path / "cache/MNIST/raw"
    assert {p.name: p.read_bytes() for p in cached.iterdir()} == files
    load("mnist", valid=5)
    load("mnist", valid=5, root=tmp_path / "cache", download=False)
    assert len(server.requests) == 4


def test_download_of_archive_by_environment(make, serve, tmp_path, monkeypatch):
    files = {"cifar-10-binary.tar.gz": make.tarred("cifar-10-batches-bin", make.cifar(10))}
    monkeypatch.setenv("FFENGINE_DATA_URL_CIFAR10", serve(files).url)
    splits = load("cifar10", root=tmp_path / "own", checksums=make.md5s(files))
    assert len(splits.train) == 90 and len(splits.valid) == 10  # a tenth of a small set
    assert everything(tmp_path) == ["cifar-10-binary.tar.gz", "cifar10", "own"]


def test_second_mirror_is_tried(make, serve):
    files = make.svhn()
    empty, full = serve({}), serve(files)
    splits = load("svhn", urls=[empty.url, full.url], checksums=make.md5s(files), valid=0)
    assert len(splits.train) == 40 and len(empty.requests) == 2


def test_wrong_checksum(make, serve, tmp_path):
    files = make.zipped(make.mnist())
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz") as error:
        load("mnist", urls=serve(files).url)
    text = str(error.value)
    assert "expected checksum md5:f68b3c2d" in text and "found md5:" in text and "\n" not in text
    assert not (tmp_path / "cache").exists()


def test_truncated_transfer(make, serve, tmp_path):
    files = make.zipped(make.mnist())
    server = serve(files)
    server.cut = {"t10k-images-idx3-ubyte.gz"}
    options = {"root": tmp_path, "urls": server.url, "checksums": make.md5s(files), "valid": 0}
    with pytest.raises((ConnectionError, ValueError), match=r"t10k-images") as error:
        load("mnist", **options)
    assert "\n" not in str(error.value)
    # What came whole is kept; of the cut file there is no trace.
    assert everything(tmp_path / "MNIST/raw") == [f for f in sorted(files) if f.startswith("train")]
    server.cut.clear()
    server.requests.clear()
    assert len(load("mnist", **options).train) == 60
    assert sorted(server.requests) == [f for f in sorted(files) if f.startswith("t10k")]


@pytest.mark.parametrize("urls", ["http://127.0.0.1:9/", "nonsense"])
def test_unreachable(tmp_path, urls):
    with pytest.raises(ConnectionError) as error:
        load("svhn", root=tmp_path / "new", urls=urls)
    text = str(error.value)
    assert "\n" not in text and text.startswith("[data] svhn could not be downloaded from")
    for hint in ("train_32x32.mat", "root=", "urls=", "FFENGINE_DATA_URL_SVHN", str(tmp_path)):
        assert hint in text
    assert everything(tmp_path) == []


@pytest.mark.parametrize("name", sorted(catalog.SOURCES))
def test_without_download(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        load(name, root=tmp_path, download=False)
    text = str(error.value)
    assert "\n" not in text and str(tmp_path) in text
    assert all(file in text for file in catalog.SOURCES[name].remotes)


def test_own_files_are_kept(make, serve, tmp_path):
    """A file of one's own is neither fetched again nor overwritten when others are missing."""
    plain, packed = make.mnist(), make.zipped(make.mnist())
    folder = tmp_path / "MNIST/raw"
    make.write(folder, {"train-images-idx3-ubyte": plain["train-images-idx3-ubyte"]})
    server = serve(packed)
    load("mnist", root=tmp_path, urls=server.url, checksums=make.md5s(packed), valid=0)
    assert "train-images-idx3-ubyte.gz" not in server.requests and len(server.requests) == 3


def test_files_of_the_twin_set_are_refused(make, tmp_path, monkeypatch):
    files = make.zipped(make.mnist())
    fashion = dataclasses.replace(catalog.SOURCES["fashion_mnist"], remotes=make.md5s(files))
    monkeypatch.setitem(catalog.SOURCES, "fashion_mnist", fashion)
    make.write(tmp_path, files)
    with pytest.raises(ValueError, match=r"expected a file of mnist, found that of fashion_mnist"):
        load("mnist", root=tmp_path, download=False)
    assert len(load("fashion_mnist", root=tmp_path, valid=0).train) == 60


def test_root_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(NotADirectoryError, match=r"must be a folder"):
        load("mnist", root=tmp_path / "f")


def test_unknown_checksum_name():
    with pytest.raises(ValueError, match=r"checksums must map train_32x32.mat, test_32x32.mat"):
        load("svhn", checksums={"extra.mat": "md5:0"})


def test_catalog_is_complete():
    assert NAMES[0] == "digits" and NAMES[-1] == "synthetic" and len(NAMES) == 7
    for source in catalog.SOURCES.values():
        assert all(h.endswith("/") for h in source.homes) and len(source.mean) == len(source.std)
        for digest in source.remotes.values():
            algorithm, _, digits = digest.partition(":")
            assert algorithm == "md5" and len(bytes.fromhex(digits)) == 16
