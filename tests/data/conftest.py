"""Small files in the published formats, and a loopback server to fetch them from."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

Files = dict[str, bytes]


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def mnist_files(train: int = 60, test: int = 20, seed: int = 0) -> Files:
    random = np.random.RandomState(seed)
    files = {}
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = random.randint(0, 256, (count, 28, 28))
        files[f"{prefix}-images-idx3-ubyte"] = idx(pixels)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    return files


def zipped(files: Files) -> Files:
    return {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in files.items()}


def cifar_files(kind: int, per_file: int = 20) -> Files:
    """CIFAR-`kind` .bin files; the coarse label of fine class c is c % 20."""
    random = np.random.RandomState(kind)
    names = (
        [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        if kind == 10
        else ["train.bin", "test.bin"]
    )
    files = {}
    for name in names:
        fine = np.arange(per_file) % kind
        columns = [fine] if kind == 10 else [fine % 20, fine]
        pixels = random.randint(0, 256, (per_file, 3072))
        files[name] = np.column_stack([*columns, pixels]).astype(np.uint8).tobytes()
    return files


def tarred(folder: str, files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def svhn_files(train: int = 40, test: int = 20) -> Files:
    from scipy.io import savemat

    random = np.random.RandomState(3)
    files = {}
    for part, count in (("train", train), ("test", test)):
        buffer = io.BytesIO()
        pixels = random.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        savemat(buffer, {"X": pixels, "y": labels}, do_compression=True)
        files[f"{part}_32x32.mat"] = buffer.getvalue()
    return files


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def md5s(files: Files) -> dict[str, str]:
    return {name: f"md5:{hashlib.md5(data).hexdigest()}" for name, data in files.items()}


class Makers:
    """The functions above, for tests to use without importing a conftest."""

    idx = staticmethod(idx)
    mnist = staticmethod(mnist_files)
    zipped = staticmethod(zipped)
    cifar = staticmethod(cifar_files)
    tarred = staticmethod(tarred)
    svhn = staticmethod(svhn_files)
    write = staticmethod(write)
    md5s = staticmethod(md5s)


@pytest.fixture
def make() -> type[Makers]:
    return Makers


@pytest.fixture(autouse=True)
def _no_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may read or fill the user's cache, nor go through a proxy."""
    monkeypatch.setenv("FFENGINE_DATA", str(tmp_path / "cache"))
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")


class Server:
    """A loopback address that serves `files`; a name in `cut` loses the second half on the way."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: Files = {}
        self.cut: set[str] = set()
        self.requests: list[str] = []


@pytest.fixture
def serve() -> Iterator[Callable[[Files], Server]]:
    running: list[ThreadingHTTPServer] = []

    def start(files: Files) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                server.requests.append(name)
                data = server.files.get(name)
                self.send_response(200 if data is not None else 404)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                data = data or b""
                self.wfile.write(data[: len(data) // 2] if name in server.cut else data)

            def log_message(self, *args: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(http)
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        server = Server(f"http://127.0.0.1:{http.server_address[1]}/some/where/")
        server.files = files
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()
