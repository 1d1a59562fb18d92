"""A result file says what it is, and a reader refuses the rest with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import machine, results


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "made" / "result.json"
    results.write(path, "fair", {"rows": [{"name": "ours", "seconds": 0.5}], "pair": (1, 2)})
    return path


def edited(path: Path, honest: bool, **changes: object) -> Path:
    """The file with other values; `honest`: with a checksum that fits them."""
    content = json.loads(path.read_text()) | changes
    if honest:
        content["checksum"] = results.checksum(content)
    path.write_text(json.dumps(content))
    return path


def test_read_gives_what_was_written(written: Path) -> None:
    content = results.read(written, kind="fair", machine_class=machine.machine_class())
    assert content["rows"] == [{"name": "ours", "seconds": 0.5}]
    assert content["machine"]["date"] and content["version"]


def test_layout_of_the_file_does_not_matter(written: Path) -> None:
    content = json.loads(written.read_text())
    written.write_text(json.dumps(dict(reversed(content.items())), indent=4))
    results.read(written)


def test_edited_by_hand(written: Path) -> None:
    with pytest.raises(ValueError, match=r"^\[results\] .*edited by hand.*measure it again$"):
        results.read(edited(written, False, rows=[{"name": "ours", "seconds": 0.4}]))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"format": 99}, "expected format 1, got 99"),
    ({"kind": "digits"}, "expected kind fair, got 'digits'"),
    ({"machine": {"class": "z80"}}, "machine class 'z80', this one is .*: not compared"),
])
def test_another(written: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        results.read(edited(written, True, **changes), kind="fair",
                     machine_class=machine.machine_class())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "reason"), [
    ("{", "expected a result file, got"), ("[1]", "with a checksum"), ("{}", "with a checksum")])
def test_no_result_file(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        results.read(path)
    with pytest.raises(ValueError, match="expected a result file"):
        results.read(tmp_path / "missing.json")
