"""The results page is what the result files say, and nothing that anybody typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import counters, front, machine, page, publishing, results
from bench.fair import parse

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


@pytest.fixture
def from_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results written here are of a tree without changes, whatever this one is."""
    monkeypatch.setattr(machine, "facts", lambda plain=machine.facts: {**plain(), "dirty": False})


def test_the_committed_pages_are_the_generated_ones() -> None:
    made = page.pages(page.sections())
    assert {p: p.read_text() for p in made} == made, "run python -m bench.page --readme"
    assert set(page.RESULTS.glob("*.md")) == set(made) - {page.PAGE}


@pytest.mark.parametrize("path", page.documents(), ids=lambda p: p.stem)
def test_documents_say_what_the_files_say(path: Path) -> None:
    text = path.read_text()
    assert page.filled(text, page.blocks(at=path.parent)) == text, (
        "run python -m bench.page --readme")


def test_the_picture_shows_the_number_that_stands_first() -> None:
    content = front.headline_of(page.fair_tables(page.sections()))
    shown = re.findall(r"<text[^>]*>(?:<!--.*?-->)?\s*([^<]*?)\s*</text>", page.PICTURE.read_text())
    assert content is not None and any(front.network(content) in text for text in shown)
    for name, row in front.contenders(content):
        for text in (name, f"{row['peak_bytes'] / 1e6:.1f} MB",
                     f"{row['seconds']['median']:.2f} s"):
            assert text in shown, "run python -m bench.page --readme"


@pytest.mark.parametrize("path", [page.PAGE, *sorted(page.RESULTS.glob("*.md"))],
                         ids=lambda p: p.stem)
def test_links_and_pictures_of_a_page_are_there(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    assert links and [link for link in links if not (path.parent / link).exists()] == []


def test_links_of_the_contents_lead_to_headings() -> None:
    links = re.findall(r"\]\((results/[\w.-]+)#([\w-]+)\)", page.PAGE.read_text())
    headings = {f"results/{p.name}": {page.anchor(line[3:]) for line in p.read_text().splitlines()
                                      if line.startswith("## ")}
                for p in page.RESULTS.glob("*.md")}
    assert links and [link for link in links if link[1] not in headings[link[0]]] == []


def fair(rounds: int, dirty: bool) -> dict[str, Any]:
    """A fair table's content whose row of ours has been timed so often."""
    return {"kind": "fair", "machine": {"dirty": dirty}, "rows": [
        {"name": "ffengine", "kind": "ffengine", "failed": None, "rounds": [1.0] * rounds},
        {"name": "ffengine, 4 MB", "kind": "ffengine", "failed": "does not fit"},
        {"name": "bp plain", "kind": "bp", "failed": None, "rounds": [1.0]}]}


@pytest.mark.parametrize(("rounds", "dirty", "said"), [
    (3, False, None), (2, False, "2 timing rounds of `ffengine`, expected 3"),
    (1, False, "1 timing round of `ffengine`, expected 3"),
    (3, True, "the tree had uncommitted changes"),
    (2, True, "the tree had uncommitted changes; 2 timing rounds of `ffengine`, expected 3")])
def test_what_falls_short_is_not_published(rounds: int, dirty: bool, said: str | None) -> None:
    assert publishing.left_out(fair(rounds, dirty)) == said


def test_a_table_that_is_left_out_says_how_it_is_measured() -> None:
    path = ROOT / "bench" / "results" / "cpu" / "fair" / "trifecta-shallow-b32-bf16.json"
    command = publishing.again(results.read(path))
    assert command == ("python -m bench.fair trifecta/shallow --batch-size 32 --precision bf16 "
                       "--authors PATH")
    args = parse(command.split()[3:])
    assert (args.model, args.batch_size, args.precisions) == ("trifecta/shallow", 32, ["bf16"])
    assert publishing.again({"kind": "fflib"}) is None


def test_every_published_table_has_its_rounds_and_its_commit() -> None:
    shown = [s for s in page.sections() if s.missing is None]
    assert any(s.content["kind"] == "fair" for s in shown)
    for section in shown:
        content = section.content
        assert content["kind"] == "counters" or not content["machine"]["dirty"], section.name
        assert not any(run["machine"]["dirty"] for run in content.get("runs", ())
                       if "machine" in run), section.name
        if content["kind"] == "fair":
            assert min(len(r["rounds"]) for r in content["rows"]
                       if r["kind"] == "ffengine" and not r["failed"]) >= 3, section.name


def test_numbers_that_are_left_out_stand_nowhere(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "facts", lambda plain=machine.facts: {**plain(), "dirty": True})
    results.write(tmp_path / "made.json", "unheard of", {"seconds": 0.123456})
    (section,) = found = page.sections(tmp_path, tmp_path / "none")
    (text,) = page.pages(found).values()  # the contents alone: no page for the family
    assert "0.1235" not in text and "| `made` | the tree had uncommitted changes (" in text
    (line,) = section.body(tmp_path)
    assert line.startswith("To be measured anew, and left out until then: the tree had")


def test_trainings_from_a_changed_tree_are_dropped_from_their_table() -> None:
    runs = [{"seed": seed, "machine": {"dirty": dirty, "date": str(seed)}}
            for seed, dirty in enumerate((True, False, False, True))]
    content = {"kind": "variants", "machine": {"dirty": True, "date": "last"}, "runs": runs}
    kept = publishing.committed(content)
    assert [run["seed"] for run in kept["runs"]] == [1, 2]
    assert kept["omitted"] == 2 and kept["machine"]["date"] == "2"
    assert publishing.left_out(kept) is None
    none = {**content, "runs": runs[:1]}
    assert publishing.left_out(publishing.committed(none)) == "the tree had uncommitted changes"


def test_the_number_that_stands_first_is_the_best_that_may_be_published() -> None:
    tables = [{"model": "deeperforward/resnet17", "batch": batch, "precision": "fp32"}
              for batch in (32, 128)]
    assert front.headline_of(tables) is tables[1]
    assert front.headline_of(tables[:1]) is tables[0]
    assert front.headline_of([{**tables[0], "batch": 512}]) is None


def test_there_are_results() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_says_when_and_where(path: Path) -> None:
    facts = publishing.committed(results.read(path))["machine"]
    name = path.relative_to(ROOT / "bench" / "results").with_suffix("").as_posix()
    said = "\n".join(page.blocks()[name])
    assert facts["date"] in said and facts["commit"] in said
    assert (facts["gpu"] or facts["cpu"]) in said


@pytest.mark.usefixtures("from_a_commit")
@pytest.mark.parametrize("kind", MADE)
def test_a_section(kind: str, tmp_path: Path) -> None:
    results.write(tmp_path / "made.json", kind, MADE[kind])
    (lines,) = page.blocks(tmp_path, tmp_path / "none").values()
    for text in SAID[kind]:
        assert text in "\n".join(lines)


@pytest.mark.usefixtures("from_a_commit")
def test_baselines_are_on_the_page(tmp_path: Path) -> None:
    counters.write(tmp_path / "here.json", MADE["counters"]["parts"])
    assert list(page.blocks(tmp_path / "none", tmp_path)) == ["baselines/here"]


def test_a_file_edited_by_hand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.json"
    results.write(path, "digits", {"seconds": 2})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1}))
    plain = page.sections
    monkeypatch.setattr(page, "sections", lambda: plain(tmp_path))
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
