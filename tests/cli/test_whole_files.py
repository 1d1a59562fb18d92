"""What is written is written whole, or not at all: a full disk is one line with the path."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ffengine
from ffengine import sealed
from ffengine.cli import main
from ffengine.commands.reproduction import plots
from ffengine.engine.run import checkpoint
from ffengine.engine.run.history import History, Row

NET = ("deeperforward/tinycnn --data synthetic --data-set shape=(1,8,8) --data-set train=24 "
       "--data-set test=8 --quiet --set widths=(10,20,20,20) --batch-size 8")
ROW = Row(0, 0.1, 1.0, [1.0, 2.0], 0.5, None, 1.0, 8.0, 1000, 0, 1)


@contextlib.contextmanager
def full(room: int) -> Iterator[None]:
    """No file of this process may grow over so many bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a run in it."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    os.chdir(folder)
    assert main(["train", *shlex.split(NET), "--epochs", "1", "--out", "run"]) == 0
    yield folder
    os.chdir(before)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*")}


@pytest.mark.parametrize("words, path", [
    ("export run", "run/model.pt2"),
    ("export run --format safetensors --out deep/down/model", "deep/down/model"),
    ("train --resume run --epochs 2 --quiet", "run"),
    (f"train {NET} --epochs 1 --out other", "other"),
    ("analyze weights run", "run/analysis/weights"),
    ("prune run --ratio 2 --out small", "small/"),
])
def test_a_command_on_a_full_disk(words: str, path: str, place: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(place)
    with full(300):
        status = main(shlex.split(words))
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("ffengine: [files] expected to write ") and path in err, err
    assert "File too large" in err
    after = {name: data for name, data in contents(place).items() if "tfevents" not in name}
    assert {name: after.get(name) for name in before if "tfevents" not in name} == {
        name: data for name, data in before.items() if "tfevents" not in name}
    assert not [name for name in after.keys() - before.keys() if after[name] is not None]


def test_what_stood_there_stands(tmp_path: Path) -> None:
    path, tensors = tmp_path / "run" / "latest.safetensors", {"w": torch.arange(500.0)}
    writers = {
        "checkpoint": lambda place: checkpoint.save(place, tensors, {"n": 1}),
        "bytes": lambda place: checkpoint.write_atomically(place, bytes(9000)),
        "sealed": lambda place: sealed.write(place, {"values": list(range(999))})}
    for write in writers.values():
        with full(400), pytest.raises(OSError, match=rf"^\[files\] expected to write {path}, got:"):
            write(path)
        assert not list(tmp_path.iterdir()), "a folder that was made for nothing"
    checkpoint.write_atomically(path, b"before")
    for write in writers.values():
        with full(400), pytest.raises(OSError, match="File too large"):
            write(path)
        assert contents(tmp_path / "run") == {path.name: b"before"}


def test_tables_pictures_and_events_name_what_they_are(tmp_path: Path) -> None:
    history = History(tmp_path)
    with full(60), pytest.raises(OSError, match=rf"write {tmp_path}/history.csv, got: File too"):
        history.add(ROW)
    assert not list(tmp_path.iterdir())
    row = {"recipe": "a-b", "paper": "A", "mean": 1.0, "sd": 0.1, "paper_mean": 1.2,
           "paper_sd": None, "difference": -0.2, "epochs": 1, "paper_epochs": 2}
    with full(60), pytest.raises(OSError, match=rf"write {tmp_path}/a.png, got: File too large"):
        plots.rows_beside(tmp_path / "a.png", [row])  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


#: Ways to write a file that leave half of it where the disk is full.
OPENED = re.compile(r"\.write_text\(|\.write_bytes\(|savefig\((?!file\b)|save_file\(|"
                    r"shutil\.copy|np\.save|torch\.save\(|open\([^)]*[\"'][wax]b?\+?[\"']")


def test_nothing_else_writes() -> None:
    """`replacing` does; a lock's file holds nothing; standard streams are no files of ours."""
    allowed = {"engine/run/checkpoint.py", "locks.py", "commands/streams.py"}
    package = Path(ffengine.__file__).parent
    found = {str(p.relative_to(package)) for p in package.rglob("*.py")
             if OPENED.search(p.read_text())}
    assert found == allowed


def test_a_copy_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(bytes(9000))
    b.write_bytes(b"before")

    def refused(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    with full(400), pytest.raises(OSError, match=rf"write {b}, got: File too large"):
        checkpoint.copy(a, b)
    assert contents(tmp_path) == {"a": bytes(9000), "b": b"before"}
    checkpoint.copy(a, b)
    assert b.read_bytes() == bytes(9000)


def test_a_file_in_a_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"write {tmp_path}/file/x, got: (Not a dir|File exists)"):
        checkpoint.write_atomically(tmp_path / "file" / "x", b"1")
