"""The comparators' networks: what every registered network can do, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import test_every_model as every_network
from models.every import COMPARATORS, batch, network, trainer

import ffengine as ff
from ffengine.cli import main
from ffengine.models import recipe_files


def test_all_of_them_are_looked_at() -> None:
    assert sorted(COMPARATORS) == [n for n in ff.models.names() if n.startswith("baselines/")]


@pytest.mark.parametrize("name", COMPARATORS)
def test_trains_saves_resumes_and_predicts_as_every_network(name: str, tmp_path: Path) -> None:
    every_network.test_a_step_trains_whose_turn_it_is_and_nothing_else(name)
    every_network.test_state_dict_round_trip(name)
    every_network.test_resume_goes_on_bit_for_bit(name, tmp_path)
    every_network.test_predictions_ignore_the_rest_of_the_batch_and_leave_no_trace(name)
    every_network.test_trains_in_sixteen_bits(name)


def test_feedback_is_saved_and_never_trained() -> None:
    """It would be another network that went on after a resume."""
    net = network("baselines/dfa")
    held = net.state_dict()
    assert held["feedback_0"].shape == (10, 20) and held["feedback_1"].shape == (10, 16)
    assert not {"feedback_0", "feedback_1"} & {n for n, _ in net.named_parameters()}
    # U(-b, b) with b = sqrt(6 / units)
    wide = network("baselines/dfa", layers=(600,)).get_buffer("feedback_0")
    assert wide.abs().max() <= 0.1 and wide.std().sub(0.1 / 3**0.5).abs() < 2e-3
    assert network("baselines/fa").get_buffer("feedback_1").shape == (16, 20)
    pepita = network("baselines/pepita", image_size=28, channels=()).get_buffer("projection")
    assert pepita.shape == (784, 10)
    assert pepita.std().sub(0.05 * (2 / 784)**0.5).abs() < 1e-4


def test_frozen_convolutions_stay_as_drawn() -> None:
    net = network("baselines/drtp")
    t = trainer(net)
    before = [p.clone() for p in net.parameters()]
    t.step(*batch(net))
    moved = {n for (n, p), old in zip(net.named_parameters(), before, strict=True)
             if not torch.equal(p, old)}
    assert moved == {"hidden.1.weight", "hidden.1.bias", "layers.0.weight", "layers.0.bias"}


def test_pepita_drops_units_in_training_alone() -> None:
    net = network("baselines/pepita", dropout=0.5)
    x, y = batch(net)
    torch.manual_seed(0)
    first = net.gradients(x, y, torch.float32)[1]
    second = net.gradients(x, y, torch.float32)[1]
    assert not torch.allclose(first, second)
    assert torch.equal(net(x), net(x))


def test_the_papers_networks() -> None:
    """Shapes behind the recipes: SN's networks, PEPITA's and DRTP's convolutions."""
    def shapes(name: str) -> list[tuple[int, ...]]:
        recipe = recipe_files.load(name)
        side = 28 if "mnist" in recipe.data else 32
        with torch.device("meta"):
            net = ff.models.create(recipe.model, **{
                "in_channels": 1 if side == 28 else 3, "image_size": side,
                "num_classes": 100 if recipe.data == "cifar100" else 10, **recipe.options})
        hidden: Any = getattr(net, "hidden", net.layers)
        return [tuple(layer.weight.shape) for layer in (*hidden, net.layers[-1])]

    assert shapes("trifecta-pepita-mnist") == [(32, 1, 5, 5), (10, 4608)]
    assert shapes("trifecta-pepita-cifar100") == [(32, 3, 5, 5), (100, 6272)]
    assert shapes("sn-drtp-cifar10") == [(64, 3, 3, 3), (256, 64, 3, 3), (2000, 16384), (10, 2000)]
    assert shapes("sn-blockwise-cifar10")[3:] == [(480, 240, 3, 3), (20, 30720), (10, 20)]
    assert shapes("sn-cfse-cifar100")[-1] == (1600, 8, 3, 3)
    assert shapes("trifecta-fa-svhn")[5:] == [(2048, 2048), (10, 2048)]


@pytest.mark.parametrize(("words", "said"), [
    (["fa", "activation=gelu"], "activation must be one of relu, tanh, got 'gelu'"),
    (["drtp", "loss=mse"], "loss must be one of ce, bce, got 'mse'"),
    (["dfa", "layers=()"], "layers expected 1 or more, got ()"),
    (["pepita", "dropout=1.5"], "1.5"),
    (["fa", "channels=(4,4,4,4,4,4)"], "too small for a layer of shape (4, 0, 0)"),
    (["ffconv", "pools=(9,)"], "pools expected convolutions of 1..4, got (9,)"),
    (["cafo", "pools=(1,)"], "pools expected convolutions of 1..0, got (1,)"),
    (["cafo", "predictor=svm"], "predictor must be one of mse, ce, sl, bp, got 'svm'"),
    (["cfse", "superclasses=(0,1)"], "superclasses"),
    (["deeperforward", "readout=all"], "readout must be one of last, sip, got 'all'"),
    (["deeperforward", "layers=()"], "layers expected 1 or more, got ()")])
def test_what_is_wrong_is_one_line(words: list[str], said: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"baselines/{words[0]}", "--data", "digits", "--set", words[1],
                 "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line and not (tmp_path / "run").exists()


def test_refused_where_layers_must_train_alone(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run")]
    for words, said in ((["profile", "baselines/fa"], "layer-local training, got baselines/fa"),
                        (["train", "baselines/cafo", "--baselines", *small],
                         "local training with a twin, got baselines/cafo"),
                        (["train", "baselines/fa", "--memory-budget", "1MB", *small],
                         "memory_budget expected layer-local training")):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_a_run_is_evaluated_by_its_folder(tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """train, eval: the same accuracy, well above chance after a few epochs of the digits."""
    run = str(tmp_path / "run")
    assert main(["train", "baselines/dfa", "--data", "digits", "--epochs", "5", "--lr", "0.01",
                 "--quiet", "--json", "--out", run]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["test_accuracy"] > 0.8
    assert main(["eval", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["test_accuracy"] == (
        made["test_accuracy"])
