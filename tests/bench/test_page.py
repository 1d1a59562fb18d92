"""The results page is what the result files say, and nothing that anybody typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import counters, page, results

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bench" / "results").rglob("*.json"))
MADE: dict[str, dict[str, Any]] = {
    "counters": {"parts": {
        "memory": {"needs": {"torch": "2"}, "rows": {"a": {"peak_bytes": 1000},
                                                     "b": {"peak_bytes": 234}}},
        "nvcc": {"needs": {}, "absent": "built without CUDA kernels"}}},
    "gate_repeats": {"alarms": 0, "runs": [
        {"seconds": 31.0, "alarms": [], "first_looks_over": 1, "rows": [{"ratio": 1.07}]}]},
    "by name": {"rows": {"fp32": {"seconds": 0.5}, "8bit": {"seconds": 0.25}}},
    "unheard of": {"answer": 42, "rows": [{"name": "one", "seconds": {
        "median": 1.5, "min": 1.0, "max": 2.0}}]},
}
SAID = {"counters": ["| memory | torch 2 | 2 | peak_bytes 1,234 |",
                     "| nvcc |  |  | built without CUDA kernels |"],
        "gate_repeats": ["**0 alarms**", "1 first looks over", "largest ratio 1.070"],
        "by name": ["| row | seconds |", "| 8bit | 0.25 |"],
        "unheard of": ["- answer: 42", "| one | 1.5 (1–2) |"]}


def test_the_committed_page_is_the_generated_one() -> None:
    assert page.PAGE.read_text() == page.page(page.blocks()), "run python -m bench.page"


def test_the_readme_says_what_the_files_say() -> None:
    text = page.README.read_text()
    assert page.filled(text, page.blocks()) == text, "run python -m bench.page --readme"


def test_there_are_results() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_says_when_and_where(path: Path) -> None:
    content = results.read(path)
    name = path.relative_to(ROOT / "bench" / "results").with_suffix("").as_posix()
    said = "\n".join(page.blocks()[name])
    machine = content["machine"]
    assert machine["date"] in said and machine["commit"] in said
    assert (machine["gpu"] or machine["cpu"]) in said


@pytest.mark.parametrize("kind", MADE)
def test_a_section(kind: str, tmp_path: Path) -> None:
    results.write(tmp_path / "made.json", kind, MADE[kind])
    (lines,) = page.blocks(tmp_path, tmp_path / "none").values()
    for text in SAID[kind]:
        assert text in "\n".join(lines)


def test_baselines_are_on_the_page(tmp_path: Path) -> None:
    counters.write(tmp_path / "here.json", MADE["counters"]["parts"])
    assert list(page.blocks(tmp_path / "none", tmp_path)) == ["baselines/here"]


def test_a_file_edited_by_hand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.json"
    results.write(path, "digits", {"seconds": 2})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1}))
    plain = page.blocks
    monkeypatch.setattr(page, "blocks", lambda: plain(tmp_path))
    monkeypatch.setattr(page, "PAGE", tmp_path / "RESULTS.md")
    assert page.main([]) == 2
    said = capsys.readouterr().err
    assert "edited by hand" in said and said.count("\n") == 1
    assert not (tmp_path / "RESULTS.md").exists()


def test_marked_blocks_are_filled_and_nothing_else() -> None:
    before = ("a\n<!-- results:cpu/x:begin -->\nold\n<!-- results:cpu/x:end -->\nb\n"
              "<!-- results:cpu/y:begin -->\n<!-- results:cpu/y:end -->\n")
    found = {"cpu/x": ["| 1 |", "2"], "cpu/y": ["3"], "cpu/z": ["4"]}
    after = page.filled(before, found)
    assert after == before.replace("old", "| 1 |\n2").replace("cpu/y:begin -->\n",
                                                              "cpu/y:begin -->\n3\n")
    assert page.filled(after, found) == after


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^\[page\] expected a block .* got 'no'; known: cpu/x$"):
        page.filled("<!-- results:no:begin -->\n<!-- results:no:end -->", {"cpu/x": []})
