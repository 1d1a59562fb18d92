"""A GPU run's files on the results page, and what never gets there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, counters, page, results
from bench.gpu import counters as counted
from bench.gpu import keep, ncu
from bench.gpu.records import Records

FACTS: dict[str, Any] = {
    "kind": "gpu", "version": "0.1.0", "date": "2026-12-01", "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.1", "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "python": "3.12.3",
    "commit": "unknown, tree 0123456789ab", "dirty": None, "cpu": "a processor", "isa": "avx512",
    "threads": 16, "tools": {}}
SPREAD = {"median": 0.003, "min": 0.0029, "max": 0.0031}
SIDE = {"kind": "ffengine", "peak_bytes": 421e6, "planned_bytes": 420e6, "allocated_bytes": 423e6,
        "launches": 210, "kernels": {"ff::one_read": [17, 0.00051]}, "check": "ok"}
SWEEP = {"check": "ok", "seconds": {"median": 31e-6, "min": 30e-6, "max": 33e-6},
         "gb_per_s": 2500.0, "percent_of_copy": 83.3}


def run(folder: Path, **facts: Any) -> Path:
    """A run's folder, with rows of every kind."""
    folder.mkdir()
    known = {**FACTS, **facts}
    step = Records(folder / "step.jsonl", known)
    step.add("step", name="bf16 ours, cuda, default plan", first_seconds=0.004, **SIDE)
    step.add("step", name="bf16 ours, cuda, default plan", seconds=SPREAD, host_seconds=SPREAD,
             times_as_long=1.0, images_per_second=42666.7, **SIDE)
    step.add("step", name="bf16 ours, triton, default plan", check="failed",
             error="ValueError: the gradient of layers.3.weight is off")
    step.add("step", name="bf16 bp plain", seconds=SPREAD, times_as_long=1.5,
             **{**SIDE, "kind": "bp", "planned_bytes": None})
    step.add("memory", name="profile", check="ok", text="2.9 ms: forward 1.1; 1.2 J")
    sweeps = Records(folder / "local_pass.jsonl", known)
    sweeps.add("local_pass", name="stage1 bf16 nhwc cuda", **SWEEP)
    sweeps.add("local_pass", name="stage1 bf16 nhwc triton", check="failed", error="no answer")
    smoke = Records(folder / "smoke.jsonl", known)
    smoke.add("smoke", name="local_pass stage1, cuda", check="ok", text="one read")
    smoke.add("run", status=1, stages=[{"name": "test", "kind": "ok", "word": "ok", "seconds": 88.0,
                                        "said": ["1090 passed, 0 failed"]}])
    ncu.write(folder / "ncu.csv", [
        ",".join(f'"{c}"' for c in ("ID", "Kernel Name", *ncu.METRICS)), '"","","ns"',
        '"0","one_read(float*)","31,000","52","70","4","4"'], known)
    (folder / "summary.txt").write_text("facts ok\n")
    return folder


SAID = {
    "step": ["| **bf16 ours, cuda, default plan** | 3.000 (2.900–3.100) | 3.00 (2.90–3.10) | 420.0 "
             "| 421.0 | 423.0 | 210 | 4.267e+04 | 1 | ok |",
             "Kernels of `bf16 ours, cuda, default plan`, by the profiler:",
             "| ff::one_read | 17 | 510 |",
             "- bf16 ours, triton, default plan: failed: ValueError: the gradient of",
             "| bf16 bp plain | 3.000", "- profile: ok; 2.9 ms: forward 1.1; 1.2 J"],
    "local_pass": ["| stage1 bf16 nhwc cuda | 31.0 (30.0–33.0) | 2500 | 83.3 | ok |",
                   "| stage1 bf16 nhwc triton |  |  |  | failed: no answer |"],
    "smoke": ["| local_pass stage1, cuda | ok | one read |",
              "| test | 88 | ok | 1090 passed, 0 failed |"],
    "ncu": ["| one_read | 31,000 | 52 | 70 | 4 | 4 |"],
}


def test_a_run_becomes_sections_of_the_page(tmp_path: Path) -> None:
    kept = keep.keep(run(tmp_path / "run"), tmp_path / "results")
    assert kept == tmp_path / "results" / "nvidia-h100-80gb-hbm3"
    assert (kept / "summary.txt").exists()
    results.write(tmp_path / "results" / "other.json", "digits of mine", {"seconds": 1.0})
    found = page.blocks(tmp_path / "results", tmp_path / "none")
    assert set(found) == {"other", *(f"nvidia-h100-80gb-hbm3/{name}" for name in SAID)}
    for name, lines in SAID.items():
        text = "\n".join(found[f"nvidia-h100-80gb-hbm3/{name}"])
        for line in lines:
            assert line in text
        assert ("2026-12-01; NVIDIA H100 80GB HBM3; torch 2.11.0, CUDA 13.0, driver 580.1, Triton "
                "3.6.0, Python 3.12.3; ffengine 0.1.0, commit unknown, tree 0123456789ab.") in text


def test_a_rehearsal_is_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", kind="rehearsal", gpu=None)
    for read in (lambda: keep.keep(folder, tmp_path / "kept"), lambda: page.blocks(tmp_path)):
        with pytest.raises(ValueError, match="of a rehearsal without a GPU: expected a run on one"):
            read()
    assert not (tmp_path / "kept").exists()


def test_the_command_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["keep", str(tmp_path)])
    assert keep.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.gpu.keep: [keep] expected some of step.jsonl") and (
        err.count("\n") == 1)


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (folder / "step.jsonl").unlink()
    Records(folder / "step.jsonl", {**FACTS, "date": "2026-12-02"}).add("step", name="a", **SIDE)
    with pytest.raises(ValueError, match="expected files of one run, got several runs' facts"):
        keep.keep(folder, tmp_path / "kept")


@pytest.mark.parametrize("name", ["step.jsonl", "local_pass.jsonl", "smoke.jsonl", "ncu.csv"])
def test_an_edited_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    text = (folder / name).read_text()
    edits = {"step.jsonl": ("0.0029", "0.0019"), "local_pass.jsonl": ("83.3", "93.3"),
             "smoke.jsonl": ("one read", "one look"), "ncu.csv": ("31,000", "30,000")}
    assert text.count(edits[name][0])
    (folder / name).write_text(text.replace(*edits[name]))
    with pytest.raises(ValueError, match="edited by hand"):
        keep.keep(folder, tmp_path / "kept")


def test_empty_files_of_skipped_stages_have_no_section(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (folder / "ncu.csv").write_text("")
    assert "ncu" not in "".join(page.blocks(tmp_path, tmp_path / "none"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A card's name, counters that were counted on it, and a folder for baselines."""
    parts = {"memory": {"needs": {"gpu": FACTS["gpu"]}, "rows": {"a": {"peak_bytes": 1}}},
             "launches": {"needs": {"gpu": FACTS["gpu"]}, "rows": {"a": {"failed": "no"}}}}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: FACTS["gpu"])
    monkeypatch.setattr(counters, "collect", lambda parts_, device: parts)
    monkeypatch.setattr(compare, "BASELINES", tmp_path / "baselines")
    (tmp_path / "baselines").mkdir()
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    return tmp_path


def counters_stage(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["counters", "--out", str(folder), "--scratch", str(folder),
                                     "--seconds", "9", *words])
    return counted.main()


def test_counters_are_the_gates_baseline_of_this_device(
        gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert counters_stage(gpu, monkeypatch) == 1, "a row that was not counted"
    assert "launches: a: failed: no" in capsys.readouterr().out
    baseline = gpu / "baselines" / "nvidia-h100-80gb-hbm3.json"
    assert results.read(baseline, "counters")["device"] == "cuda"
    assert results.read(gpu / "counters.json", "counters")["parts"]["memory"]["rows"]
    assert compare.baseline_path("cuda") == baseline


def test_a_rehearsal_writes_no_baseline(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters_stage(gpu, monkeypatch, "--rehearse")
    assert (gpu / "counters.json").exists() and not list((gpu / "baselines").iterdir())


def test_another_machines_baseline_is_of_the_same_kind_of_device(
        gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, device in (("a-card", "cuda"), ("z-processor", "cpu")):
        counters.write(gpu / "baselines" / f"{name}.json", {}, device)
    assert compare.baseline_path("cpu").stem == "z-processor"
    assert compare.baseline_path("cuda").stem == "a-card"
