"""What cannot be trained is refused in one line that says what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.training import same, weights

import ffengine as ff
from ffengine.data.superclasses import given
from ffengine.engine.schedules.backprop import Backprop
from ffengine.engine.schedules.cascade import Cascade
from ffengine.engine.schedules.collaborative import Collaborative
from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.engine.schedules.recurrent import Recurrent
from ffengine.engine.schedules.schedule import Interleaved, Overlapping, Together
from ffengine.nn import LocalNet

SMALL: dict[str, dict[str, Any]] = {
    "deeperforward/tinycnn": {"widths": (10, 10, 10, 10)}, "sn/mlp": {"layers": (10, 10)},
    "fflib/ffnn": {"layers": (12, 10)}, "fflib/ffrnn": {"layers": (12, 10)},
    "hinton/peer-norm": {"layers": (12, 10)}, "hinton/threshold": {"layers": (12, 10)},
    "symba/mlp": {"layers": (12,)}, "cafo/cnn": {"width": 2}, "trifecta/fcn": {"width": 8},
    "trifecta/shallow": {"widths": (4, 4, 4, 4, 4, 4)}, "sn/cifar10": {}, "sn/cifar100": {},
    "cwcomp/ffcnn": {"channels": (10, 10)}, "cff/fixed": {"layers": (12, 10)}}


def network(name: str, **options: Any) -> LocalNet:
    return ff.models.create(name, **{"num_classes": 10, "in_channels": 1, "image_size": 8,
                                     **SMALL[name], **options})


@pytest.mark.parametrize(("name", "schedule", "expected", "came"), [
    ("symba/mlp", lambda: Overlapping(), "2 layers or more", "got 1"),
    ("deeperforward/tinycnn", lambda: Overlapping(), "normalised at their input only",
     "layer 0 is not"),
    ("fflib/ffnn", lambda: Overlapping(), "normalised at their input only", "layer 0 is not"),
    ("sn/mlp", lambda: Interleaved(((0, 1),)), "2 spans", "got 1"),
    ("cwcomp/ffcnn", lambda: Interleaved(((0, 1), (0, 2))), "3 spans", "got 2"),
    ("fflib/ffnn", lambda: Recurrent(), "a RecurrentNet", "got LocalNet"),
    ("fflib/ffnn", lambda: Collaborative(), "a CollaborativeNet", "got LocalNet"),
    ("fflib/ffnn", lambda: Cascade(), r"one predictor a block \(2\)", "got 0"),
    ("fflib/ffrnn", lambda: Together(), "recurrent training", "got Together"),
    ("fflib/ffrnn", lambda: Layerwise(), "recurrent training", "got Layerwise"),
    ("cafo/cnn", lambda: Together(), "layers that train", "layer 0 frozen"),
    ("trifecta/fcn", lambda: Backprop(), "label channel is fixed", "got a learned one"),
    ("sn/mlp", lambda: Layerwise(start=2), r"start at a layer of 0\.\.1", "got 2"),
    ("sn/mlp", lambda: Layerwise(features="tape"), "auto, recompute, ram or disk", "got 'tape'"),
    ("sn/mlp", lambda: Layerwise(stop_at=1.5), r"in \(0, 1\]", "got 1.5"),
    ("sn/mlp", lambda: Together(heads_from=2.0), r"in \[0, 1\]", "got 2.0"),
    ("sn/mlp", lambda: Overlapping("never"), "batch, epoch or both", "got 'never'"),
    ("sn/mlp", lambda: Interleaved(((2, 1), (0, 1))), "0 <= start <= end", r"got \(2, 1\)"),
    ("sn/mlp", lambda: Recurrent(0), "1 frame or more", "got 0")])
def test_schedules_that_do_not_fit(name: str, schedule: Any, expected: str, came: str) -> None:
    net = network(name)
    before = weights(net)
    with pytest.raises(ValueError, match=rf"^\[schedule\] .*{expected}.*{came}") as caught:
        ff.Trainer(net, schedule=schedule(), progress=False)
    assert "\n" not in str(caught.value) and same(before, weights(net))


@pytest.mark.parametrize(("name", "options", "expected", "came"), [
    ("fflib/ffrnn", {"test_frames": (8, 3)}, r"K_low \+ 1 < K_high", "K_low=8 and K_high=3"),
    ("fflib/ffrnn", {"test_frames": (3, 3)}, r"K_low \+ 1 < K_high", "K_low=3 and K_high=3"),
    ("hinton/threshold", {"image_size": 2}, "needs 10 pixels", "an image of 4"),
    ("symba/mlp", {"image_size": 2}, "needs 10 pixels", "an image of 4"),
    ("hinton/threshold", {"num_classes": 1}, "2 or more classes", "got 1"),
    ("hinton/peer-norm", {"num_classes": 1}, "2 or more classes", "got 1"),
    ("cafo/cnn", {"num_classes": 1}, "2 classes or more", "and 1 classes"),
    ("trifecta/shallow", {"update": "never"}, "layer, olu, olu-epoch, olu-both", "'never'"),
    ("trifecta/shallow", {"loss": "l1"}, "symba, threshold", "'l1'"),
    ("trifecta/shallow", {"norm": "weight"}, "none, batch, batch-running", "'weight'"),
    ("trifecta/shallow", {"readout": "votes"}, "last, last3, head", "'votes'"),
    ("trifecta/shallow", {"neutral": "dark"}, "mean, random", "'dark'"),
    ("trifecta/shallow", {"image_size": 4}, "too small", "layer 5 would have shape"),
    ("sn/mlp", {"loss": "l1"}, "pvn, cwc, ce, sparse-ce, sparse-ce-log, combo", "'l1'"),
    ("sn/mlp", {"readout": "votes"}, "llr or olr", "'votes'"),
    ("sn/mlp", {"layers": (10, 11)}, "multiple of the 10 groups", "got 11"),
    ("sn/cifar10", {"goodness": "max"}, "mean, sum_sq, mean_sq", "'max'"),
    ("sn/cifar100", {"superclasses": (0, 1, 0)}, "every class", "class 3 has none"),
    ("sn/cifar100", {"superclasses": "cifar10"}, "those of cifar100", "'cifar10'"),
    ("sn/cifar100", {}, "one for each of the 10 classes", "a map of 100"),
    ("cwcomp/ffcnn", {"loss": "l1"}, "cwc, ce, pvn, cwg", "'l1'"),
    ("cwcomp/ffcnn", {"ilt": "slow"}, "none, or fast or acc", "'slow'"),
    ("cwcomp/ffcnn", {"ilt": "fast", "dataset": "svhn"}, "cifar10, fashion_mnist", "'svhn'"),
    ("cwcomp/ffcnn", {"predictor": "vote"}, "goodness, softmax", "'vote'"),
    ("cwcomp/ffcnn", {"class_groups": 10, "predictor": "softmax"}, r"a size in 1\.\.9", "got 10"),
    ("cwcomp/ffcnn", {"pools": (0,)}, r"layers of 1\.\.2", r"got \(0,\)"),
    ("cafo/cnn", {"predictor": "l1"}, "mse, ce, sl, bp", "'l1'"),
    ("cff/fixed", {"norm": "batch"}, "length, layer", "'batch'"),
    ("hinton/threshold", {"norm": "batch"}, "length, layer", "'batch'"),
    ("hinton/threshold", {"label_pixel": "min"}, "number or 'max'", "'min'"),
    ("cff/fixed", {"label_pixel": float("nan")}, "number or 'max'", "nan"),
    ("cff/fixed", {"layers": (10,)}, "2 layers or more", "got 1"),
    ("fflib/ffnn", {"negatives": "easy"}, "random, inverse, hardest", "'easy'"),
    ("fflib/ffnn", {"propagate": "later"}, "stale, updated", "'later'")])
def test_options_that_do_not_fit(name: str, options: dict[str, Any], expected: str,
                                 came: str) -> None:
    for twin in ("", "bp/"):
        with pytest.raises((ValueError, TypeError),
                           match=rf"^\[\w+\] .*{expected}.*{came}") as caught:
            ff.models.create(twin + name, **{"num_classes": 10, "in_channels": 1, "image_size": 8,
                                             **SMALL[name], **options})
        assert "\n" not in str(caught.value)


def test_super_classes_must_cover_the_classes() -> None:
    with pytest.raises(ValueError, match="expected a super-class for every class, class 2 has no"):
        given({0: 0, 1: 1, 3: 0}, 4)
    with pytest.raises(ValueError, match=r"expected classes 0\.\.3, got class 4"):
        given((0, 1, 0, 1, 0), 4)
    net = network("sn/mlp")
    for bad in ((), (0, 10), (-1, 0)):
        with pytest.raises(ValueError, match=r"expected values in \[0, 10\), got \("):
            net.layer(0).relabel(bad)
    assert net.layer(0).label_map is None


HALVES = [[torch.zeros(1, 12), torch.zeros(1, 10)] for _ in range(2)]


@pytest.mark.parametrize(("name", "extra", "expected", "came"), [
    ("fflib/ffnn", {"negatives": torch.zeros(7, dtype=torch.int64)}, r"int64 labels \(6,\)",
     r"int64 \(7,\)"),
    ("fflib/ffnn", {"negatives": torch.zeros(6, 9)}, r"rows \(6, 10\)", r"float32 \(6, 9\)"),
    ("fflib/ffnn", {"negatives": torch.zeros(6, dtype=torch.int32)}, "int64", r"int32 \(6,\)"),
    ("fflib/ffnn", {"negatives": torch.full((6,), 10)}, r"labels must lie in \[0, 10\)", "got 10"),
    ("fflib/ffnn", {"negatives": [1, 2]}, r"int64 labels \(6,\)", "got list"),
    ("fflib/ffnn", {"negatives": torch.zeros(6, 1, 8, 7)}, "label rows", r"\(6, 1, 8, 7\)"),
    ("hinton/peer-norm", {"negatives": torch.zeros(5, dtype=torch.int64)}, r"\(6,\)", r"\(5,\)"),
    ("sn/mlp", {"negatives": torch.zeros(6, dtype=torch.int64)}, "expected by none",
     "samples and labels only"),
    ("fflib/ffrnn", {"negatives": torch.zeros(6, 1, 8, 8)}, r"rows \(6, 10\)", r"\(6, 1, 8, 8\)"),
    ("fflib/ffrnn", {"hidden": HALVES[:1]}, r"\(1, 12\), \(1, 10\)", r"got \[\(1, 12\), \(1, 10\)"),
    ("fflib/ffrnn", {"hidden": [[torch.zeros(1, 12), torch.zeros(1, 11)]] * 2}, r"\(1, 10\)",
     r"got .*\(1, 11\)"),
    ("fflib/ffrnn", {"hidden": 3}, "two lists", "got int"),
    ("fflib/ffnn", {"hidden": HALVES}, "hidden expected by none", "samples and labels only"),
    ("fflib/ffnn", {"x": [1.0, 2.0]}, "floating-point tensor", "got list"),
    ("fflib/ffnn", {"x": torch.zeros(())}, r"\(N, 1, 8, 8\)", r"got \(\)")])
def test_batches_that_do_not_fit(name: str, extra: dict[str, Any], expected: str,
                                 came: str) -> None:
    net = network(name)
    t = ff.Trainer(net, progress=False, lr=0.1)
    before = weights(net)
    with pytest.raises((ValueError, TypeError),
                       match=rf"^\[train\] .*{expected}.*{came}") as caught:
        t.step({"x": torch.rand(6, 1, 8, 8), "y": torch.arange(6), **extra})
    assert "\n" not in str(caught.value)
    assert same(before, weights(net)) and t.steps == 0


def test_images_are_what_an_unlabelled_network_pairs() -> None:
    net = network("hinton/peer-norm", negatives="masked")
    t = ff.Trainer(net, progress=False)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    with pytest.raises(ValueError, match=r"expected images of .*, got torch.int64 \(6,\)"):
        t.step(ff.Batch(x, y, negatives=y))
    t.step(ff.Batch(x, y, negatives=x.flip(2)))
    t.step(x, y)
    assert t.steps == 2 and net(x).shape == (6, 10)


def test_a_layer_wise_run_goes_on_with_the_epochs_it_had(tmp_path: Any) -> None:
    data = [(torch.rand(6, 1, 8, 8), torch.arange(6))]
    t = ff.Trainer(network("sn/mlp"), epochs=2, out=tmp_path, progress=False)
    t.fit(data, until=1)
    other = ff.Trainer(network("sn/mlp"), epochs=3, progress=False)
    before = weights(other.net)
    with pytest.raises(ValueError, match=r"expected 3 epochs a layer, got 2 in"):
        other.resume(tmp_path)
    assert same(before, weights(other.net))


def test_a_closed_form_starts_its_pass_again(tmp_path: Any) -> None:
    """What half a pass had summed up is not in a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.rand(20, 1, 8, 8, generator=generator), torch.arange(20) % 10)
            for _ in range(3)]
    torch.manual_seed(0)
    straight = ff.Trainer(network("cafo/cnn", predictor="mse"), progress=False)
    torch.manual_seed(0)
    half = ff.Trainer(network("cafo/cnn", predictor="mse"), progress=False)
    half.schedule.loader(half, data, 0)
    for x, y in data[:2]:
        half.step(x, y)
    half.save(tmp_path / "half")
    resumed = ff.Trainer(network("cafo/cnn", predictor="mse"), progress=False)
    resumed.resume(tmp_path / "half")
    assert (resumed.iteration, resumed.steps) == (0, 0)
    for t in (straight, resumed):
        t.fit(data)
    assert same(weights(straight.net), weights(resumed.net)) and resumed.steps == 9
    assert all(h.weight.abs().sum() > 0 for h in resumed.net.heads)
