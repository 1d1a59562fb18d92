"""`ffengine profile`: its files, its JSON, and one line for whatever is wrong."""

from __future__ import annotations

import json

import pytest

from ffengine.cli import main
from tests.analysis.profiling import fix_rates

SMALL = ["deeperforward/tinycnn", "--set", "widths=(10,20,20,20)", "--set", "image_size=8", "--set",
         "in_channels=1", "--batch-size", "8", "--device", "cpu"]
CAFO = ["cafo/cnn", "--set", "image_size=8", "--set", "in_channels=1", "--batch-size", "8",
        "--device", "cpu", "--steps", "1", "--json", "--no-png"]


@pytest.fixture(autouse=True)
def made_up_rates(monkeypatch, tmp_path):
    fix_rates(monkeypatch)
    monkeypatch.chdir(tmp_path)


def value(capsys, *words):
    status = main(["profile", *words])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.strip().splitlines()[-1])


def test_files_json_and_text(capsys, tmp_path):
    result = value(capsys, *SMALL, "--steps", "2", "--out", "here", "--json", "--precision", "bf16")
    names = {"profile.json", "profile.html", "profile.png", "trace.json"}
    assert {p.name for p in (tmp_path / "here").iterdir()} == names
    assert {f.rpartition("/")[2] for f in result["files"]} == names
    saved = json.loads((tmp_path / "here" / "profile.json").read_text())
    assert saved == {k: v for k, v in result.items() if k != "files"}
    assert saved["precision"] == "bf16" and saved["steps"] == 2 and saved["batch_size"] == 8
    (phase,) = saved["phases"]
    assert {"seconds", "bytes_moved", "flops", "roofline_share", "bound", "peak_bytes",
            "parts"} <= phase["layers"]["0"].keys() == phase["segments"]["0"].keys()
    assert phase["peak"]["bytes"] == saved["peak_bytes"] == sum(phase["peak"]["live"].values())
    assert len(phase["samples"][0]) == 1 + len(saved["kinds"])
    assert (tmp_path / "here" / "profile.png").read_bytes().startswith(b"\x89PNG")

    assert main(["profile", *SMALL, "--steps", "1", "--no-png"]) == 0
    text = capsys.readouterr().out
    assert "phase 0: layers 0-3 in training" in text
    assert "wrote runs/profile-deeperforward-tinycnn-1/profile.html" in text
    assert not (tmp_path / "runs" / "profile-deeperforward-tinycnn-1" / "profile.png").exists()


def test_phases_are_chosen(capsys):
    every = value(capsys, *CAFO)["phases"]
    assert [(p["number"], p["label"]) for p in every] == [
        (i, f"head {i}") for i in range(len(every))] and len(every) > 1
    (one,) = value(capsys, *CAFO, "--phase", "1")["phases"]
    assert (one["number"], one["label"], one["epoch"]) == (1, "head 1", every[1]["epoch"])
    (late,) = value(capsys, *CAFO, "--epoch", str(every[1]["epoch"] + 1))["phases"]
    assert (late["number"], late["epoch"]) == (1, every[1]["epoch"] + 1)


@pytest.mark.parametrize("words, expected, came", [
    ([*SMALL, "--steps", "0"], "--steps expected 1 or more", "got 0"),
    ([*SMALL, "--steps", "many"], "invalid int value", "'many'"),
    ([*SMALL, "--phase", "3"], "--phase expected one of 0: layers 0-3", "got 3"),
    ([*SMALL, "--epoch", "100000"], "--epoch expected 0 to", "got 100000"),
    ([*SMALL, "--epoch", "0", "--phase", "0"], "--phase or --epoch", "got both"),
    ([*SMALL, "--batch-size", "0"], "--batch-size expected 1 or more", "got 0"),
    ([*SMALL, "--memory-budget", "1kB"], "no plan", "the smallest"),
    ([*SMALL, "--memory-budget", "lots"], "an amount such as 440MB", "'lots'"),
    ([*SMALL, "--out", "file"], "--out expected a folder", "got file"),
    (["bp/sn/mlp"], "a model of layer-local training", "got bp/sn/mlp"),
    (["sn/nothing"], "unknown model", "sn/nothing"),
    ([], "required", "MODEL"),
])
def test_what_is_wrong_is_one_line(capsys, tmp_path, words, expected, came):
    (tmp_path / "file").write_text("")
    status = main(["profile", *words])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1
    assert expected in err and came in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "a refused command left something"


def test_without_matplotlib_nothing_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["profile", *SMALL]) == 2
    assert "ffengine[plot], or --no-png" in capsys.readouterr().err and not list(tmp_path.iterdir())
