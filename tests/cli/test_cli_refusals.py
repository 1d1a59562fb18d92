"""Options that no network can be built or trained with: exit status 2, one line, no folder."""

from __future__ import annotations

import pytest

from ffengine.cli import main


@pytest.mark.parametrize("words, expected, came", [
    (["symba/mlp", "negatives=easy"], "random, inverse, hardest", "'easy'"),
    (["hinton/threshold", "image_size=2"], "needs 10 pixels", "an image of 4"),
    (["fflib/ffrnn", "test_frames=(8,3)"], "K_low + 1 < K_high", "K_low=8 and K_high=3"),
    (["fflib/ffnn", "propagate=later"], "stale, updated", "'later'"),
    (["trifecta/shallow", "update=never"], "layer, olu, olu-epoch", "'never'"),
    (["trifecta/shallow", "loss=l1"], "symba, threshold", "'l1'"),
    (["trifecta/shallow", "embedding=fixed"], "auto, learned, random", "'fixed'"),
    (["trifecta/shallow", "norm=weight"], "none, batch, batch-running", "'weight'"),
    (["trifecta/fcn", "depth=1"], "2 layers or more", "got 1"),
    (["sn/cifar100", "superclasses=(0,1,0)"], "a super-class for every class", "class 3 has none"),
    (["sn/mlp", "loss=l1"], "pvn, cwc, ce", "'l1'"),
    (["sn/mlp", "readout=votes"], "llr or olr", "'votes'"),
    (["cwcomp/cfse", "ilt=slow"], "fast or acc", "'slow'"),
    (["cwcomp/cfse", "predictor=vote"], "goodness, softmax", "'vote'"),
    (["cafo/cnn", "predictor=l1"], "mse, ce, sl, bp", "'l1'"),
    (["cff/fixed", "norm=batch"], "length, layer", "'batch'"),
    (["cff/fixed", "layers=(10,)"], "2 layers or more", "got 1"),
    (["bp/sn/mlp", "loss=l1"], "pvn, cwc, ce", "'l1'"),
    (["bp/fflib/ffnn", "layers=(0.5,)"], "layers expected a tuple of whole numbers", "got (0.5,)"),
])
def test_unusable_options(capsys, tmp_path, monkeypatch, words, expected, came):
    monkeypatch.chdir(tmp_path)
    model, *options = words
    status = main(["train", model, "--data", "digits", "--epochs", "1", "--quiet",
                   *[word for option in options for word in ("--set", option)]])
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("ffengine: [") and err.count("\n") == 1
    assert expected in err and came in err
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


def test_super_classes_on_the_command_line(capsys, tmp_path):
    """As many as the digits have classes: at 8x8, as without them."""
    status = main(["train", "sn/cifar100", "--data", "digits", "--epochs", "1", "--quiet", "--out",
                   str(tmp_path / "run"), "--set", "superclasses=(0,1,2,3,4,4,3,2,1,0)", "--set",
                   "widths=(5,5,5,5,10,10,10)", "--batch-size", "512"])
    assert status == 0, capsys.readouterr().err
    from ffengine.engine.run import checkpoint

    found = checkpoint.load(tmp_path / "run").meta
    assert found["architecture"]["input"] == [1, 8, 8]
    assert main(["eval", str(tmp_path / "run")]) == 0
