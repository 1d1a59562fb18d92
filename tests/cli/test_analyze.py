"""`ffengine analyze`: every kind writes PNG and CSV that say what it found; bad input writes none.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from ffengine import cli
from ffengine.analysis.sparsity import sparsity
from ffengine.analysis.ttest import compare
from ffengine.cli import main
from ffengine.commands.analyze import MODULES
from ffengine.commands.analyze_flags import KINDS, LABELS
from ffengine.engine.run import checkpoint

TRAIN = ["--data", "digits", "--quiet", "--backend", "reference", "--batch-size", "128"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a and b: one network, two seeds; wide: another; twin: by backpropagation."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in {
            "a": ["sn/mlp", "--set", "layers=(20,30)", "--epochs", "2", "--lr", "0.01",
                  "--watch", "sparsity", "--watch-every", "2"],
            "b": ["sn/mlp", "--set", "layers=(20,30)", "--epochs", "2", "--lr", "0.01", "--seed",
                  "1"],
            "wide": ["sn/mlp", "--set", "layers=(30,30)", "--epochs", "1"],
            "ff": ["fflib/ffnn", "--set", "layers=(24,24)", "--epochs", "1"],
            "twin": ["bp/fflib/bpnn", "--set", "layers=(16,)", "--epochs", "1"]}.items():
        assert main(["train", *words, *TRAIN, "--out", str(folder / name)]) == 0
    return folder


def value(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    status = main(["analyze", *words, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    found = json.loads(out.strip().splitlines()[-1])
    for path in found["written"]:
        content = Path(path).read_bytes()
        if path.endswith(".png"):
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            assert struct.unpack(">I", content[16:20]) == (1200,)
    return dict(found)


def rows_of(folder: str, name: str) -> list[dict[str, str]]:
    with (Path(folder) / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_responses(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = value(capsys, "responses", str(runs / "a"), "--out", str(tmp_path), "--neurons", "0:20")
    assert [Path(p).name for p in found["written"]] == ["responses.png", "responses.csv"]
    rows = rows_of(found["out"], "responses.csv")
    assert len(rows) == 50 and [r["set"] for r in rows[:4]] == ["0", "0", "1", "1"]
    own = [float(r[f"class {r['set']}"]) for r in rows[:20]]
    others = [float(v) for r in rows[:20] for k, v in r.items()
              if k.startswith("class") and k != f"class {r['set']}"]
    ratio = (sum(own) / 20) / (sum(others) / 180)
    assert found["layers"][0]["own_ratio"] == pytest.approx(ratio, rel=1e-5) and ratio > 1.5
    assert found["samples"] == 360


def test_grown_neurons(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The last ones of the grown class's set, clones of one that was there before."""
    assert main(["grow", str(runs / "a"), "--neurons", "2", "--epochs", "0", "--json", "--out",
                 str(tmp_path / "more")]) == 0
    label = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["grown_class"]
    found = value(capsys, "responses", str(tmp_path / "more"), "--layers", "1")
    assert found["grown"] == {"1": [3 * label + 3, 3 * label + 4]}
    rows = [r for r in rows_of(found["out"], "responses.csv") if r["layer"] == "1"]
    assert len(rows) == 32 and {rows[i]["set"] for i in found["grown"]["1"]} == {str(label)}
    new, old = ([float(rows[i][f"class {label}"]) for i in part] for part in (
        found["grown"]["1"], range(3 * label, 3 * label + 3)))
    assert new == pytest.approx([max(old)] * 2)


def test_activations(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = value(capsys, "activations", str(runs / "ff"), "--samples", "100", "--layers", "1")
    assert found["out"] == str(runs / "ff" / "analysis") and len(found["written"]) == 3
    rows = rows_of(found["out"], "activations.csv")
    assert len(rows) == 48 and found["samples"] == 100
    assert sum(found["layers"][1]["by_class"]) == sum(
        r["preferred class"] != "" for r in rows[24:])
    assert max(float(r["value"]) for r in rows[:24]) == 1
    assert found["layers"][0]["saturation"] == pytest.approx(
        sum(float(r["saturation"]) for r in rows[:24]) / 24, rel=1e-6)


def test_layers_and_sip(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    judged = json.loads(evaluated(capsys, runs / "a"))
    found = value(capsys, "layers", str(runs / "a"), str(runs / "ff"), "--out", str(tmp_path))
    assert [r["accuracy"] for r in found["layers"]["a"]] == judged["layer_accuracy"]
    assert [r["run"] for r in rows_of(str(tmp_path), "layers.csv")] == ["a", "a", "ff", "ff"]
    sip = value(capsys, "sip", str(runs / "a"), "--out", str(tmp_path))
    table = torch.tensor(sip["table"])
    assert [table[0, 0].item(), table[1, 1].item()] == pytest.approx(judged["layer_accuracy"])
    assert sip["accuracy"] == judged["test_accuracy"] and sip["chosen_on"] == "valid"
    start, end = sip["range"]
    assert sip["after_sip"] == sip["table"][start][end] and sip["all_layers"] == sip["table"][0][1]


def evaluated(capsys: pytest.CaptureFixture[str], run: Path) -> str:
    assert main(["eval", str(run), "--json"]) == 0
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_sparsity_and_weights(runs: Path, capsys: pytest.CaptureFixture[str],
                              tmp_path: Path) -> None:
    found = value(capsys, "sparsity", str(runs / "a"), str(runs / "b"), "--out", str(tmp_path))
    weights = [checkpoint.load(runs / name).tensors["net.layers.1.weight"] for name in "ab"]
    hoyer = [sparsity(w, "hoyer") for w in weights]
    assert [f[1]["sparsity"]["hoyer"] for f in found["weights"]] == hoyer
    row = rows_of(str(tmp_path), "sparsity.csv")[1]
    assert row["weight"] == "layer 1" and float(row["hoyer"]) == pytest.approx(sum(hoyer) / 2)
    assert float(row["hoyer (sd over runs)"]) == pytest.approx(
        abs(hoyer[0] - hoyer[1]) / math.sqrt(2))
    shown = value(capsys, "weights", str(runs / "a"), "--layer", "1", "--clamp", "0.2", "--out",
                  str(tmp_path))
    assert shown["beyond"] == pytest.approx(float((weights[0].abs() > 0.2).double().mean()))


def test_history(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = value(capsys, "history", str(runs / "a"), str(runs / "b"), "--out", str(tmp_path))
    rows, kept = rows_of(str(tmp_path), "history.csv"), rows_of(str(runs / "b"), "history.csv")
    assert [r["run"] for r in rows] == ["a"] * 4 + ["b"] * 4
    assert float(rows[-1]["loss_1"]) == float(kept[-1]["loss_1"])
    assert rows[0]["loss_1"] == "" and float(kept[0]["loss_1"]) == 0  # not its turn
    assert found["last"]["a"]["epoch"] == 3


def test_tsne_and_probes(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = value(capsys, "tsne", str(runs / "ff"), "--samples", "40", "--out", str(tmp_path))
    assert found["layer"] == 1 and found["maps"] == [
        "trained before normalisation", "trained after it"]
    assert len(rows_of(str(tmp_path), "tsne.csv")) == 80
    heads = value(capsys, "probes", str(runs / "a"), "--epochs", "1", "--quiet", "--lr", "0.01",
                  "--out", str(tmp_path), "--hidden", "16")
    assert len(heads["accuracy"]) == 2 and heads["accuracy"][0] > 0.5
    assert heads["own_accuracy"] == [r["accuracy"] for r in value(
        capsys, "layers", str(runs / "a"), "--out", str(tmp_path))["layers"]["a"]]


def test_grids(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A cell equals the run it repeats; one whose loss is not finite has diverged."""
    words = ["heatmap", str(runs / "ff"), "--over", "lr=0.1,1e30", "--over", "theta=1,2.0",
             "--jobs", "1", "--quiet", "--backend", "reference", "--out", str(tmp_path)]
    found = value(capsys, *words)
    assert found["axes"] == {"lr": [0.1, 1e30], "theta": [1, 2.0]}
    told = {(c["lr"], c["theta"]): c for c in found["cells"]}
    assert told[1e30, 1]["diverged"] and told[1e30, 2.0]["diverged"]
    repeated, run = told[0.1, 2.0], checkpoint.load(runs / "ff")
    assert repeated["accuracy"] == json.loads((runs / "ff" / "report.json").read_text())[
        "test_accuracy"]
    assert repeated["hoyer"] == pytest.approx(sum(sparsity(
        run.tensors[f"net.layers.{i}.weight"], "hoyer") for i in (0, 1)) / 2, abs=1e-9)
    rows = rows_of(str(tmp_path), "heatmap.csv")
    assert [r["accuracy"] == "" for r in rows] == [False, False, True, True]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    again = value(capsys, *words)
    assert again["cells"] == found["cells"] and len(times) == 4
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}


def test_a_sweep_over_phi(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = value(capsys, "sweep", str(runs / "a"), "--over", "phi=(2.0,2.0),(2.0,6.0)", "--quiet",
                  "--jobs", "1", "--out", str(tmp_path), "--backend", "reference")
    same, other = found["cells"]
    report = json.loads((runs / "a" / "report.json").read_text())
    assert same["accuracy"] == report["test_accuracy"]
    assert same["layers"][0] == other["layers"][0] and same["sparsity"][1] != other["sparsity"][1]


def test_watched_steps(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The course of sparsity in training: watched there, drawn here."""
    found = value(capsys, "history", str(runs / "a"), "--steps", "--columns", "gini", "hoyer_1",
                  "--out", str(tmp_path))
    rows = rows_of(str(tmp_path), "history.csv")
    assert [float(r["step"]) for r in rows] == list(range(1, 2 * len(rows), 2))
    weight = checkpoint.load(runs / "a").tensors["net.layers.0.weight"]
    assert found["last"]["a"]["gini_0"] == pytest.approx(sparsity(weight, "gini"), abs=1e-9)


def test_degeneration(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As `ffengine degenerate` leaves the network, one number after the other."""
    found = value(capsys, "degeneration", str(runs / "a"), "--lowest", "0", "2", "18", "--out",
                  str(tmp_path))
    assert found["removed"] == [0, 2, 18] and found["layer"] == 1
    assert found["accuracy"][0] == found["accuracy_before"]
    assert main(["degenerate", str(runs / "a"), "--lowest", "18", "--out", str(tmp_path / "less"),
                 "--json"]) == 0
    edited = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["accuracy"][2] == edited["accuracy_after"] != found["accuracy"][0]
    wide = value(capsys, "degeneration", str(runs / "a"), "--fractions", "0.5", "1", "--out",
                 str(tmp_path))
    assert wide["removed"][0] < wide["removed"][1] == 20  # a set keeps its strongest
    assert main(["analyze", "sweep", str(tmp_path / "less"), "--over", "lr=1,2"]) == 2
    assert "expected a run as it was trained" in capsys.readouterr().err


def test_ttest(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = [str(runs / "a"), str(runs / "b")], [str(runs / "wide")] * 2
    found = value(capsys, "ttest", *first, "--against", *second, "--training-data", "--out",
                  str(tmp_path))
    wanted = compare(*found["accuracies"]["test"])
    assert (found["t"], found["p"], found["d"]) == (wanted.t, wanted.p, wanted.d)
    report = json.loads((runs / "a" / "report.json").read_text())
    assert found["accuracies"]["test"][0][0] == report["test_accuracy"]
    group = found["groups"][0]
    assert group["gap"] == pytest.approx(group["train_mean"] - group["mean"])
    assert len(rows_of(str(tmp_path), "ttest.csv")) == 4
    paired = value(capsys, "ttest", *first, "--against", *second, "--paired", "--out",
                   str(tmp_path))
    assert paired["kind"] == "paired" and paired["freedom"] == 1


class Page(HTMLParser):
    """Checks that tags close, and collects headings and what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [str(given[k]) for k in ("src", "href") if k in given]
        assert tag != "img" or given["alt"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)


def test_a_report_needs_nothing_else(runs: Path, capsys: pytest.CaptureFixture[str],
                                     tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    found = value(capsys, "report", str(runs / "a"), "--out", str(out))
    assert found["written"] == [str(out)] and [p.name for p in out.parent.iterdir()] == [
        "page.html"]
    page = Page()
    page.feed(out.read_text())
    assert page.open == [] and page.headings == found["sections"] and len(page.headings) == 9
    assert all(s.startswith(("data:image/png;base64,", "#part-")) for s in page.sources)
    accuracy = json.loads((runs / "a" / "report.json").read_text())["test_accuracy"]
    assert found["accuracy"] == accuracy and f"{100 * accuracy:.2f} %" in out.read_text()


@pytest.mark.parametrize("words, said", [
    (["wrong", "a"], "argument KIND: invalid choice: 'wrong'"),
    (["weights", "a", "--layer", "2"], "[analyze] expected a layer from 0 to 1, got 2"),
    (["weights", "a", "--clamp", "0"], "[analyze] a clamp expected a number above 0, got 0.0"),
    (["responses", "a", "--layers", "0", "7"], "[analyze] expected a layer from 0 to 1, got 7"),
    (["responses", "a", "--classes", "10"], "[analyze] --classes expected up to 12"),
    (["responses", "a", "--neurons", "5"], "[analyze] --neurons expected FIRST:LAST, got '5'"),
    (["activations", "a", "--sample", "360"], "[analyze] --sample expected 0 to 359, got 360"),
    (["layers", "a", "--samples", "361"], "[analyze] --samples expected 1 to 360 (test), got 361"),
    (["tsne", "a", "--layer", "-1"], "[analyze] expected a layer from 0 to 1, got -1"),
    (["tsne", "a", "--samples", "2001"], "[tsne] --samples expected 2 to 360, got 2001"),
    (["probes", "a", "--epochs", "0"], "[probes] expected widths and epochs of 1 or more"),
    (["sparsity", "a", "wide"], "[analyze] expected runs of one architecture, got layer 0 weight"),
    (["ttest", "a", "wide", "--against", "a", "b"], "[analyze] expected runs of one architecture"),
    (["ttest", "a", "--against", "a", "b"],
     "[ttest] expected two runs or more in each group, got 1 and 2"),
    (["ttest", "a", "b", "--against", "b"],
     "[ttest] expected two runs or more in each group, got 2 and 1"),
    (["sip", "twin"], "[analyze] sip expected a network whose layers' goodness is summed"),
    (["heatmap", "a", "--over", "lr=1,2"], "[analyze] expected --over 2 times, got 1"),
    (["sweep", "a", "--over", "theta=1,2"], "[analyze] --over expected KEY=V1,V2,... of lr, "),
    (["sweep", "a", "--over", "lr=1,fast"], "[analyze] --over lr expected numbers, got 'fast'"),
    (["sweep", "a", "--over", "lr=0.1,0.1"], "[grid] lr expected values that differ"),
    (["sweep", "a", "--over", "layers=(20,),(7,)"], "[local_pass] channels must be"),
    (["degeneration", "a", "--lowest", "21"], "[degeneration] expected at most 20 neurons"),
    (["degeneration", "a", "--layer", "3"], "[analyze] expected a layer from 0 to 1, got 3"),
    (["degeneration", "twin"], "[adapt] layer 0 expected a set of neurons for each of the 10"),
    (["history", "a", "--columns", "speed"], "[analyze] --columns expected some of epoch, lr,"),
    (["report", "a", "--out", "page.txt"], "[analyze] report expected --out FILE.html"),
    (["report", "none"], "[checkpoint] expected a run folder with latest.safetensors"),
    *((["--" if kind == "none" else kind, "damaged", *more], "damaged") for kind, more in (
        ("report", []), ("responses", []), ("sparsity", []), ("history", []),
        ("ttest", ["damaged", "--against", "a", "b"]), ("sweep", ["--over", "lr=1,2"]))),
], ids=lambda v: "-".join(v[:1]) if isinstance(v, list) else None)
def test_bad_input_is_one_line_and_writes_nothing(
        runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path, words: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "wide", "twin"):
        (tmp_path / name).symlink_to(runs / name)
    damage(runs / "a", tmp_path / "damaged")
    before = {p: p.stat().st_mtime_ns for p in [*tmp_path.rglob("*"), *runs.rglob("*")]}
    status = main(["analyze", *words])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert err.startswith("ffengine: ")
    assert before == {p: p.stat().st_mtime_ns for p in [*tmp_path.rglob("*"), *runs.rglob("*")]}


def damage(run: Path, to: Path) -> None:
    """A copy whose last weight was changed after it was written."""
    to.mkdir()
    shutil.copy(run / "history.csv", to)
    content = bytearray((run / checkpoint.LATEST).read_bytes())
    content[-1] ^= 1
    (to / checkpoint.LATEST).write_bytes(content)


def test_a_broken_history(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copy(runs / "a" / checkpoint.LATEST, tmp_path)
    for text in (None, "", "epoch,loss\n0,high\n"):
        if text is not None:
            (tmp_path / "history.csv").write_text(text)
        assert main(["analyze", "history", str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("ffengine: [analyze] expected a history of") and err.count("\n") == 1


def test_without_matplotlib(runs: Path, capsys: pytest.CaptureFixture[str],
                            monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert main(["analyze", "sparsity", str(runs / "a"), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        "ffengine: [analyze] pictures needs matplotlib: pip install matplotlib\n")
    assert not out.exists()


def test_every_kind_has_a_module_and_every_label_is_known() -> None:
    from ffengine.nn.maps import LABELS as known

    assert list(MODULES) and set(MODULES) == set(KINDS) and known == LABELS


def test_the_guide_names_every_kind_and_its_commands_are_known() -> None:
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    told = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(told) == sorted(KINDS)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
             for line in block.splitlines()]
    found = [cli.parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert {args.kind for args in found if args.command == "analyze"} == set(KINDS)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
