"""`ffengine reproduce --report`: the page and its pictures, from what has been measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffengine import sealed
from ffengine.cli import main
from ffengine.commands.reproduction import report
from ffengine.commands.reproduction.tables import by_paper

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "Some CPU", "gpu": None, "threads": 2}


def row(name: str, mean: float, **changes):
    """A row as the tool keeps it: 90 ± 0.2 over five runs in the paper."""
    return {"recipe": name, "paper": name.partition("-")[0], "table": "Table 1", "row": "a | b",
            "paper_mean": 90.0, "paper_sd": 0.2, "paper_runs": 5, "mean": mean, "sd": 0.2,
            "difference": mean - 90.0, "seeds": [0, 1, 2, 3, 4], "epochs": 3, "paper_epochs": 30,
            "seconds": 1.0, "peak_bytes": 10 ** 6, "data": "mnist", "machines": [MACHINE],
            "error": None, "key": "k", **changes}


def kept(path: Path, *rows) -> None:
    sealed.write(path, {"kind": "reproduction", "format": 1, "version": "0", "machine": MACHINE,
                        "rows": list(rows), "runs": []})


def test_the_page_is_what_the_repository_holds():
    rows = report.measured(report.held(ROOT))
    assert (ROOT / report.PAGE).read_text() == report.page(rows), "run ffengine reproduce --report"
    for paper in by_paper(rows):
        assert (ROOT / report.PAGE.with_name(report.picture(paper))).exists()


def test_a_section_a_paper(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib on this machine")
    monkeypatch.chdir(tmp_path)
    held = tmp_path / "bench" / "results"
    kept(held / "cpu" / "reproduction.json", row("sn-a", 89.9), row("sn-b", 91.0),
         row("sn-c", 89.0), row("sn-digits", 80.0, difference=None))
    kept(held / "gpu" / "reproduction.json", row("fflib-a", 89.7, sd=None, seeds=[0]),
         row("fflib-b", 89.7, machines=[{**MACHINE, "gpu": "Some GPU"}]))
    assert main(["reproduce", "--report", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["recipe"] for r in rows] == ["fflib-a", "fflib-b", "sn-a", "sn-b", "sn-c"]
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    fflib, sn = page.split("\n## ")[1:]
    assert "2 rows: 1 level with the paper, 0 above it, 1 below: fflib-b." in fflib
    assert "| `fflib-a` | Table 1: a \\| b | 90.00 ± 0.20 | 89.70 | -0.30 | -1.4 | 1 |" in fflib
    assert "| -2.4 | 5 | 3/30 | mnist | Some GPU |" in fflib
    assert "3 rows: 1 level with the paper, 1 above it, 1 below: sn-c." in sn
    assert "Some CPU, 2 threads" in sn and "sn-digits" not in page
    for paper in ("sn", "fflib"):
        png = tmp_path / "docs" / f"reproduction-{paper}.png"
        assert f"({png.name})" in page and png.read_bytes().startswith(b"\x89PNG")


def test_rows_of_one_folder_alone(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib on this machine")
    monkeypatch.chdir(tmp_path)
    kept(tmp_path / "bench" / "results" / "cpu" / "reproduction.json", row("sn-a", 89.9))
    kept(tmp_path / "mine" / "reproduction.json", row("cff-a", 90.1))
    assert main(["reproduce", "--report", "--out", "mine"]) == 0
    assert capsys.readouterr().out == "1 row of 1 paper in docs/reproduction.md\n"
    assert "## cff" in (text := (tmp_path / "docs" / "reproduction.md").read_text())
    assert "## sn" not in text


def test_nothing_to_report(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kept(tmp_path / "runs" / "reproduction.json", row("sn-a", 80.0, difference=None))
    assert main(["reproduce", "--report"]) == 2
    err = capsys.readouterr().err
    assert "expected a row that trained on its paper's data" in err and err.count("\n") == 1
    assert not (tmp_path / "docs").exists()
