"""The command line: JSON, runs that come back, one-line errors with exit status 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ffengine import env
from ffengine.cli import main
from ffengine.ops import backends

SMALL = ["--data", "synthetic", "--data-set", "shape=(1,8,8)", "--data-set", "train=48",
         "--data-set", "test=16", "--set", "widths=(10,20,20,20)", "--batch-size", "16",
         "--backend", "reference", "--quiet"]
TRAIN = ["train", "deeperforward/tinycnn", *SMALL, "--epochs", "2"]


def run(capsys, *words):
    """(status, last line of stdout, stderr)."""
    status = main(list(words))
    out, err = capsys.readouterr()
    return status, (out.strip().splitlines() or [""])[-1], err


def value(capsys, *words):
    status, last, err = run(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(last)


def test_models(capsys):
    rows = value(capsys, "models")
    assert {"name": "deeperforward/resnet17", "paper": "DeeperForward"} in rows
    assert len(rows) >= 5 and main(["models"]) == 0


@pytest.mark.isa
def test_train_eval_resume_export(capsys, tmp_path):
    out = str(tmp_path / "run")
    result = value(capsys, *TRAIN, "--out", out)
    assert {"model", "data", "device", "backend", "precision", "epochs", "train_samples",
            "test_accuracy", "seconds", "images_per_second", "peak_bytes", "floor_bytes",
            "plan", "instruction_set"} <= result.keys()
    assert {"cuts", "tile", "peak_bytes", "working_bytes"} <= result["plan"].keys()
    assert result["train_samples"] == 48 and 0 <= result["test_accuracy"] <= 1
    assert result["peak_bytes"] > result["floor_bytes"] > 0
    assert {"latest.safetensors", "best.safetensors", "history.csv", "report.json"} <= set(
        os.listdir(out))

    judged = value(capsys, "eval", out, "--backend", "reference")
    assert judged["test_accuracy"] == result["test_accuracy"]
    assert len(judged["layer_accuracy"]) == 4
    assert value(capsys, "eval", out, "--checkpoint", "best")["test_samples"] == 16

    exported = value(capsys, "export", out)
    program = torch.export.load(exported["path"]).module()
    from ffengine.commands.options import build_saved
    from ffengine.engine.run import checkpoint

    found = checkpoint.load(out)
    net = build_saved(found)
    checkpoint.load_network(found, net)
    for n in (1, 5):
        x = torch.randn(n, 1, 8, 8)
        torch.testing.assert_close(program(x), net(x))
    assert value(capsys, "export", out, "--format", "safetensors")["bytes"] > 0

    more = value(capsys, "train", "--resume", out, "--epochs", "3", "--quiet")
    assert (more["epochs"], more["backend"], more["model"]) == (
        3, "reference", "deeperforward/tinycnn")
    status, _, err = run(capsys, *TRAIN, "--out", out)
    assert status == 2 and "--resume" in err
    status, _, err = run(capsys, "train", "--resume", out, "--seed", "4", "--quiet")
    assert status == 2 and "expected seed 4, got 0" in err


def test_resume_equals_an_uninterrupted_run(capsys, tmp_path):
    """Ctrl-C in the middle: exit status 130, one line, and the same weights in the end."""
    straight, stopped = str(tmp_path / "a"), str(tmp_path / "b")
    command = [*TRAIN[:-1], "40"]
    with subprocess.Popen([sys.executable, "-m", "ffengine", *command, "--out", stopped],
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        wait_for(os.path.join(stopped, "history.csv"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.startswith("ffengine: [train] interrupted at epoch") and err.count("\n") == 1
    resumed = value(capsys, "train", "--resume", stopped, "--quiet")
    whole = value(capsys, *command, "--out", straight)
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    from ffengine.engine.run import checkpoint

    a, b = checkpoint.load(straight), checkpoint.load(stopped)
    assert a.meta["position"] == b.meta["position"]
    assert all(torch.equal(t, b.tensors[k]) for k, t in a.tensors.items())


def wait_for(path, seconds=60.0):
    limit = time.monotonic() + seconds
    while not os.path.exists(path):
        assert time.monotonic() < limit
        time.sleep(0.02)


def instruction_sets():
    """In use and below."""
    ext = backends.extension()
    return () if ext is None else ext.isas()[:ext.isas().index(ext.isa()) + 1]


@pytest.mark.isa
def test_plan(capsys):
    model = "deeperforward/resnet17"
    small = ["--set", "planes=(10,20,40,80)", "--set", "image_size=16", "--batch-size", "8"]
    plan = value(capsys, "plan", model, *small)
    assert {"peak_bytes", "floor_bytes", "working_bytes", "cuts", "tile", "layers"} <= plan.keys()
    assert plan["peak_bytes"] == plan["floor_bytes"] + plan["working_bytes"]
    assert len(plan["layers"]) == 17 and plan["layers"][0]["in_shape"] == [3, 16, 16]
    half = value(capsys, "plan", model, *small, "--precision", "bf16")
    for wide, narrow in zip(plan["layers"], half["layers"], strict=True):
        assert narrow["activation_bytes"] * 2 == wide["activation_bytes"]
    # without 16-bit products of the processor's own, the library widens whole maps
    if "avx512bf16" in instruction_sets():
        assert half["working_bytes"] < plan["working_bytes"]
    budget = str(plan["peak_bytes"])
    assert value(capsys, "plan", model, *small, "--memory-budget", budget)["peak_bytes"] <= (
        plan["peak_bytes"])
    status, _, err = run(capsys, "plan", model, *small, "--memory-budget", "10kB")
    assert status == 2 and "the smallest needs" in err
    assert main(["plan", model, *small]) == 0


@pytest.mark.isa
def test_env(capsys):
    report = value(capsys, "env")
    assert set(report["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert report["backends"]["reference"]["usable"]
    assert all(s["usable"] or s["why_not"] for s in report["backends"].values())
    assert report["auto"]["fp64"] == "reference"
    kernels = report["extension"]
    assert kernels["instruction_set_in_use"] in kernels["instruction_sets_here"]
    assert set(kernels["instruction_sets_here"]) <= set(kernels["instruction_sets"])
    assert main(["env"]) == 0 and "auto picks" in capsys.readouterr().out


def test_env_says_what_is_forced(capsys, monkeypatch):
    """And so does whatever names the machine: costs and counters of another are not used."""
    monkeypatch.setenv("FFENGINE_ISA", "baseline")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    text = env.env_text(value(capsys, "env"))
    assert ", as FFENGINE_ISA says" in text and "ONEDNN_MAX_CPU_ISA=AVX2" in text
    assert env.instruction_set().endswith(", oneDNN AVX2")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert "oneDNN" not in env.instruction_set() + env.env_text(value(capsys, "env"))


@pytest.mark.parametrize("capability, cuda, device, why", [
    ((9, 0), None, "device: cuda, a GPU (sm_90; CUDA of driver 13.0, torch 12.8, kernels 13.0.88)",
     "back-end cuda      usable"),
    ((7, 5), None, "device: cuda, a GPU (sm_75; ", "back-end cuda      not usable: this build has "
     "80-real 90-real, the device is sm_75: build with CMAKE_CUDA_ARCHITECTURES=75"),
    ((7, 0), None, "device: cuda, a GPU (sm_70; ", "back-end cuda      not usable: the device is "
     "sm_70, the CUDA kernels need sm_75 or newer"),
    (None, 11040, "device: cpu (the driver supports CUDA 11.4, this torch needs 12.8: update the "
     "driver)", "back-end reference usable"),
    (None, 0, "device: cpu (no CUDA device)", "back-end reference usable"),
], ids=["runs", "other-architectures", "too-old", "old-driver", "none"])
def test_env_says_what_a_gpu_lacks(capsys, monkeypatch, capability, cuda, device, why):
    """By fakes of the GPU, its driver and the build."""
    built = SimpleNamespace(
        has_cuda=True, isa=lambda: "avx2", isas=lambda: ["baseline", "avx2"],
        num_threads=lambda: 1, build_info=lambda: {
            "compiler": "GNU", "isas": "baseline avx2", "cuda_toolkit": "13.0.88",
            "cuda_architectures": "80-real 90-real"})
    for owner, name, value in (
            (backends, "extension", lambda: built),
            (backends, "driver_version", lambda: 13000 if cuda is None else cuda),
            (backends, "gpu", lambda: None if capability is None else backends.Gpu(
                capability, backends.driver_version())),
            (torch.version, "cuda", "12.8"),
            (torch.cuda, "is_available", lambda: capability is not None),
            (torch.cuda, "device_count", lambda: int(capability is not None)),
            (torch.cuda, "get_device_name", lambda *_: "a GPU")):
        monkeypatch.setattr(owner, name, value)
    backends._build_reason.cache_clear()
    try:
        assert main(["env"]) == 0
    finally:
        monkeypatch.undo()
        for cached in (backends._build_reason, backends._auto):
            cached.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(device) for line in lines) and why in lines


def test_bench_lists_suites_of_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "bench")
    assert status == 2 and "checkout" in err
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "one.py").write_text('if __name__ == "__main__":\n    print("ran")\n')
    assert value(capsys, "bench") == {"suites": ["one"]}
    assert run(capsys, "bench", "--json", "one")[1] == '{"suite": "one"}'
    status, _, err = run(capsys, "bench", "two")
    assert status == 2 and "known: one" in err


@pytest.mark.parametrize("words, text", [
    (["train", "deeperforward/tiny", "--data", "digits"], "known: baselines/blockwise"),
    (["train", "deeperforward/tinycnn", "--data", "digit"], "cifar100"),
    (["train", "deeperforward/tinycnn"], "expected MODEL and --data"),
    (["train", "deeperforward/tinycnn", *SMALL, "--backend", "tpu"], "auto, reference, cpu"),
    (["train", "deeperforward/tinycnn", *SMALL, "--backend", "cuda"], "usable: reference"),
    (["train", "deeperforward/tinycnn", *SMALL, "--device", "cuda:x"], "expected cpu or cuda"),
    (["train", "deeperforward/tinycnn", *SMALL, "--memory-budget", "10kB"], "smallest needs"),
    (["train", "deeperforward/tinycnn", *SMALL, "--memory-budget", "lots"], "440MB"),
    (["train", "deeperforward/tinycnn", *SMALL, "--epochs", "0"], "epochs"),
    (["train", "deeperforward/tinycnn", *SMALL, "--batch-size", "0"], "batch-size"),
    (["train", "deeperforward/tinycnn", *SMALL, "--set", "width=3"], "known: num_classes"),
    (["train", "deeperforward/tinycnn", *SMALL, "--set", "widths"], "KEY=VALUE"),
    (["train", "deeperforward/tinycnn", *SMALL, "--set", "widths=(11,20,20,20)"], "multiple"),
    (["train", "deeperforward/tinycnn", *SMALL, "--set", "dropout=1.5"], "dropout"),
    (["train", "deeperforward/tinycnn", *SMALL, "--epochs", "many"], "--epochs"),
    (["train", "--resume", "nowhere"], "expected a run folder"),
    (["eval", "nowhere"], "expected a run folder"),
    (["plan", "x"], "known: "),
    (["fly"], "'models', 'train', 'eval'"),
    ([], "COMMAND"),
])
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    status, last, err = run(capsys, *words)
    assert status == 2 and text in err and last == ""
    assert err.startswith("ffengine: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, last, err = run(capsys, *TRAIN, "--device", "cuda:2")
    assert (status, last) == (2, "")
    assert err == "ffengine: [cli] --device expected at most cuda:1, got 'cuda:2'\n"


def test_debug_shows_the_traceback(capsys):
    status, _, err = run(capsys, "plan", "x", "--debug")
    assert status == 2 and "Traceback" in err and err.splitlines()[-1].startswith("ffengine: ")


def test_numbers_that_blow_up_stop_with_status_2(capsys, tmp_path):
    status, _, err = run(capsys, *TRAIN, "--lr", "1e30", "--out", str(tmp_path / "run"))
    assert status == 2 and "the loss of layer" in err and err.count("\n") == 1


def test_image_size_reaches_network_and_loader(capsys, tmp_path):
    result = value(capsys, "train", "deeperforward/tinycnn", "--data", "digits", "--set",
                   "image_size=4", "--set", "widths=(10,10,10,10)", "--epochs", "1", "--quiet",
                   "--out", str(tmp_path / "run"), "--batch-size", "256")
    assert result["train_samples"] == 1257
    from ffengine.engine.run import checkpoint

    assert checkpoint.load(tmp_path / "run").meta["architecture"]["input"] == [1, 4, 4]


def test_digits_grow_for_networks_that_pool_four_times():
    from ffengine.commands.options import image_side

    assert image_side("deeperforward/tinycnn", "digits", {}) == 8
    assert image_side("deeperforward/cnn14", "digits", {}) == 16
    assert image_side("deeperforward/tinycnn", "mnist", {}) == 32
    assert image_side("deeperforward/tinycnn", "synthetic", {}) is None


def test_baselines_table(capsys, tmp_path):
    result = value(capsys, *TRAIN, "--out", str(tmp_path / "run"), "--baselines")
    names = [row["name"] for row in result["baselines"]]
    assert names == ["ffengine", "unfused PyTorch step", "backpropagation"]
    for row in result["baselines"]:
        assert 0 <= row["test_accuracy"] <= 1 and row["seconds_per_epoch"] > 0
        assert row["metered_bytes"] > result["floor_bytes"]
