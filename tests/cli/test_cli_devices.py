"""`ffengine devices`, and --device-profile of `plan`, `train` and `profile`."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from ffengine import models
from ffengine.cli import main
from ffengine.commands import devices as command
from ffengine.devices import catalog
from ffengine.devices.rates import Rates
from ffengine.engine.trainer import Trainer

MODEL = ["deeperforward/tinycnn", "--set", "widths=(10,20,20,20)", "--batch-size", "8"]
TRAIN = ["train", *MODEL, "--data", "synthetic", "--data-set", "train=16", "--data-set", "test=8",
         "--epochs", "1", "--quiet"]


def value(capsys, *words):
    status = main([*words, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.strip().splitlines()[-1])


def refused(capsys, *words):
    status = main(list(words))
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1
    return err


def test_devices_lists_them_with_sources(capsys):
    rows = value(capsys, "devices")
    assert [row["name"] for row in rows] == catalog.names()
    assert all(figure["source"] for row in rows for figure in row["figures"].values())
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA T4" in text and text.count("\n") == len(rows) + 1


def test_the_template_can_be_used_as_it_is_printed(capsys, tmp_path):
    assert main(["devices", "--template"]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out)
    found = value(capsys, "plan", *MODEL, "--device-profile", str(path))
    assert found["fits"] and found["device"]["name"] == "my-device"


def test_plan_on_a_device(capsys):
    found = value(capsys, "plan", *MODEL, "--device-profile", "orin-nano")
    assert found["fits"] and 0 < found["peak_bytes"] < found["usable_bytes"]
    assert found["floor_seconds"] == pytest.approx(sum(
        layer["floor_seconds"] for layer in found["layers"]))
    assert len(found["phases"]) == 1 and found["device"]["sources"]
    tight = value(capsys, "plan", *MODEL, "--device-profile", "orin-nano", "--memory-budget", "1kB")
    assert not tight["fits"] and tight["peak_bytes"] <= found["peak_bytes"]
    assert main(["plan", *MODEL, "--device-profile", "orin-nano"]) == 0
    text = capsys.readouterr().out
    assert "fits: peak" in text and "a step takes at least" in text and "bound by" in text


def test_plan_on_every_device(capsys):
    rows = value(capsys, "plan", *MODEL, "--device-profile", "all", "--precision", "bf16")
    without = {"jetson-nano", "t4"}  # no bf16 there
    assert [row["device"]["name"] for row in rows] == [
        n for n in catalog.names() if n not in without]
    assert main(["plan", *MODEL, "--device-profile", "all", "--precision", "bf16"]) == 0
    text = capsys.readouterr().out
    assert "t4                no bf16 rate; known: fp32, fp16" in text


@pytest.mark.parametrize("command, words, said", [
    (["plan", *MODEL], ["nano"], "unknown device 'nano'; known: jetson-nano"),
    (["plan", *MODEL], ["missing.toml"], "missing.toml: no such file"),
    (["plan", *MODEL], ["t4", "--precision", "bf16"], "t4 has no bf16 rate"),
    (TRAIN, ["jetson-nano"], "jetson-nano is for predictions only"),
    (TRAIN, ["orin-nano", "--device", "cpu"], "expected a GPU, got cpu"),
    (["profile", *MODEL], ["orin-nano", "--device", "cpu"], "expected a GPU, got cpu"),
])
def test_refusals(capsys, tmp_path, monkeypatch, command, words, said):
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, *command, "--device-profile", *words)
    assert err.startswith("ffengine: [device] ") and said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked, budget", [
    (None, 6442450944), ("1GB", 10**9), ("64GB", 6442450944)])
def test_a_run_gets_the_devices_memory_as_its_budget(monkeypatch, asked, budget):
    monkeypatch.setattr(command, "device_of", lambda args: torch.device("cuda"))
    args = argparse.Namespace(device_profile="orin-nano", memory_budget=asked, precision=None)
    assert command.emulate(args).name == "orin-nano" and args.memory_budget == budget
    args = argparse.Namespace(device_profile=None, memory_budget=asked, precision=None)
    assert command.emulate(args) is None and args.memory_budget == asked


def test_what_a_run_says_of_the_device(monkeypatch):
    monkeypatch.setattr(catalog, "machine_rates", lambda dtypes, device: Rates(
        1e10, dict.fromkeys(dtypes, 1e11), 1e-6))
    net = models.create("deeperforward/tinycnn", widths=(10, 20, 20, 20), image_size=16)
    trainer = Trainer(net, batch_size=8, progress=False)
    text, found = command.emulation(catalog.load("orin-nano"), trainer, 8, 0.25)
    assert "measured 250.00 ms a step on" in text and "not emulated (there, here)" in text
    assert found["not_emulated"].keys() == {"bytes_per_second", "fp32 FLOP/s"}
    assert found["not_emulated"]["fp32 FLOP/s"]["ratio"] == pytest.approx(2.089e12 / 1e11)
    assert found["predicted"]["flops"] == found["predicted_here"]["flops"] > 0
    assert json.dumps(found)


@pytest.mark.gpu
def test_a_run_in_a_devices_memory(capsys, tmp_path):
    result = value(capsys, *TRAIN, "--device", "cuda", "--device-profile", "orin-nano", "--out",
                   str(tmp_path / "run"))
    found = result["device_profile"]
    assert result["peak_bytes"] <= catalog.load("orin-nano").usable_bytes
    assert found["measured_seconds"] > found["predicted_here"]["floor_seconds"] > 0
    assert found["predicted"]["fits"] and found["not_emulated"]["sm_count"]["there"] == 8
