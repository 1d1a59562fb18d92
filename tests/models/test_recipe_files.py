"""Recipe files: every bundled one is sound, and anything unknown in one is a one-line error."""

from __future__ import annotations

import pytest
import torch

from ffengine import models
from ffengine.data.catalog import SOURCES
from ffengine.engine.run.recipe import Recipe
from ffengine.models import recipe_files
from ffengine.models.recipe_files import Training

# torch notes which functions a device context redirects when it is first used: before the suite's
# poisoned torch.empty takes the place of the real one, or big networks would be built in memory.
with torch.device("meta"):
    torch.zeros(1)

GOOD = """
name = "{stem}"
paper = "deeperforward"
table = "Table 1"
row = "TinyCNN"
model = "deeperforward/tinycnn"
data = "cifar10"

[options]
widths = [10, 20, 20, 20]

[train]
optimizer = "adamw"
lr = 0.08
lr_drops = [[2, 0.5], [4, 0.1]]
epochs = 6
batch_size = 128
seeds = [0, 3]
augment = "crop4+flip"

[paper_result]
metric = "test_accuracy"
mean = 79.49
"""


def written(folder, text):
    path = folder / "deeperforward-mine.toml"
    path.write_text(text.replace("{stem}", path.stem))
    return path


@pytest.mark.parametrize("name", recipe_files.names())
def test_a_bundled_recipe_is_sound(name):
    recipe = recipe_files.load(name)
    paper = recipe.paper_result
    assert recipe.name == name and recipe.table and recipe.row
    assert 0 <= paper.mean <= 100 and (paper.sd is None or 0 <= paper.sd <= 100)
    used = recipe.train.recipe(Recipe())
    assert (used.epochs, used.lr) == (recipe.train.epochs, recipe.train.lr)


@pytest.mark.parametrize("name", recipe_files.names())
def test_a_bundled_recipe_builds_for_its_data(name):
    recipe = recipe_files.load(name)
    known, source = models.entry(recipe.model).options(), SOURCES[recipe.data]
    side = recipe.options.get("image_size", known["image_size"])
    with torch.device("meta"):
        net = models.create(recipe.model, **{
            "num_classes": source.num_classes, "in_channels": len(source.mean),
            "image_size": side, **recipe.options})
    assert net.in_shape == (len(source.mean), side, side)
    # DeeperForward takes all images at 32 (its section 4.1), those of CwComp's 14 layers too
    resized = "deeperforward/" in recipe.model or "cfse14" in name
    assert side == (28 if "mnist" in recipe.data and not resized else 32)


@pytest.mark.parametrize("name", recipe_files.names())
def test_a_bundled_recipe_scales_pixels_as_its_authors(name):
    """The published code of FFLib, of Löwe and of PEPITA feeds [0, 1], as support neurons'
    "normalization" turned out to mean; CwComp's and CaFo's have constants of their own."""
    recipe = recipe_files.load(name)
    model = recipe.model.removeprefix("bp/")
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    wanted = "set"
    if recipe.paper == "sn" or model.startswith(("fflib/", "hinton/peer-norm",
                                                 "baselines/pepita")):
        wanted = "off"
    elif model.startswith("cwcomp/") and recipe.data != "mnist":
        wanted = (0.5, 0.5) if recipe.data == "fashion_mnist" else imagenet
    elif (model.startswith("cafo/") and recipe.data != "mnist") or (
            model.startswith("deeperforward/") and recipe.data == "cifar100"):
        wanted = (0.5, 0.5)
    assert recipe.data_options["normalize"] == wanted
    if recipe.paper != "sn":  # whose comparators are other papers' models
        assert models.entry(recipe.model).scale_for(recipe.data) == wanted


def test_no_number_stands_twice():
    found = [recipe_files.load(name) for name in recipe_files.names()]
    places = [(f.paper, f.table, f.row, f.data) for f in found]
    assert len(set(places)) == len(places)


def test_papers_share_out_the_recipes():
    assert {"deeperforward", "sn", "trifecta", "fflib", "cff"} <= set(recipe_files.papers())
    for paper in recipe_files.papers():
        assert any(n.startswith(f"{paper}-") for n in recipe_files.names())
    assert sum(len(recipe_files.of_paper(p)) for p in recipe_files.papers()) == len(
        recipe_files.names())


def test_a_file_by_its_path(tmp_path):
    recipe = recipe_files.load(written(tmp_path, GOOD))
    assert recipe.options == {"widths": (10, 20, 20, 20)} and recipe.train.seeds == (0, 3)
    assert recipe.paper_result.sd is None and recipe.digits.epochs is None
    assert recipe.train.augmentation() is not None


def test_training_changes_what_it_names_and_nothing_else():
    base = Recipe(optimizer="sgd", lr=1.0, lr_min=0.5, weight_decay=0.1, lr_epochs=7, momentum=0.9)
    train = Training(optimizer="adam", lr=0.08, epochs=6, batch_size=32,
                     lr_drops=((2, 0.5),))
    used = train.recipe(base)
    assert (used.optimizer, used.lr, used.epochs, used.batch_size) == ("adam", 0.08, 6, 32)
    assert used.lr_min is None and used.weight_decay == 0.0 and used.lr_epochs is None
    assert used.lr_drops == ((2, 0.5),) and used.momentum == 0.9
    assert Training("adam", 0.1, 1, 1, lr_epochs=150).recipe(base).lr_epochs == 150
    assert Training("adam", 0.1, 1, 1).augmentation() is None


@pytest.mark.parametrize("old, new, text", [
    ("row =", "line =", "unknown key 'line'; known: name, paper"),
    ("epochs = 6", "epoch = 6", "[train] unknown key 'epoch'; known: optimizer, lr"),
    ("widths", "width", "[options] unknown key 'width'; known: num_classes"),
    ("mean =", "average =", "[paper_result] unknown key 'average'; known: metric, mean, sd"),
    ("[train]", "[digits]\nepoch = 3\n[train]", "[digits] unknown key 'epoch'; known: epochs"),
    ("[train]", "[digits.options]\nwidth = 3\n[train]", "[digits.options] unknown key 'width'"),
    ("[train]", "[data_options]\nroot = '/'\n[train]", "[data_options] unknown key 'root'"),
    ("[train]", "[data_options]\nnormalize = 'on'\n[train]", "normalize expected off, set, or"),
    ("[train]", "[data_options]\nnormalize = [0.5]\n[train]", "normalize expected off, set, or"),
    ("epochs = 6", "epochs = 6\nlr_epochs = 0", "lr_epochs expected a whole number"),
    ("epochs = 6", "epochs = 6\ndrop_last = 1", "drop_last expected true or false"),
    ("row = \"TinyCNN\"\n", "", "missing key 'row'; required: name"),
    ("epochs = 6\n", "", "[train] missing key 'epochs'"),
    ("mean = 79.49\n", "", "[paper_result] missing key 'mean'"),
    ("epochs = 6", "epochs = 6.5", "epochs expected a whole number of at least 1, got 6.5"),
    ("epochs = 6", "epochs = true", "epochs expected a whole number of at least 1, got True"),
    ("lr = 0.08", "lr = 'fast'", "lr expected a number of 0 or more, got 'fast'"),
    ("lr = 0.08", "lr = nan", "lr expected a number of 0 or more"),
    ("\"adamw\"", "\"lion\"", "optimizer expected one of sgd, adam, adamw, got 'lion'"),
    ("79.49", "101", "mean expected a number from 0 to 100, got 101"),
    ("test_accuracy", "loss", "metric expected one of test_accuracy, best_layer_accuracy"),
    ("[0, 3]", "[3, 3]", "seeds expected a list of different whole numbers"),
    ("[0, 3]", "5", "seeds expected a list of different whole numbers"),
    ("[4, 0.1]", "[2, 0.1]", "rising epochs"),
    ("[4, 0.1]", "4", "lr_drops expected a list of [epoch, factor]"),
    ("crop4+flip", "crop4+turn", "augment expected words"),
    ("tinycnn", "tiny", "unknown model 'deeperforward/tiny'; did you mean "),
    ("cifar10", "cifar", "data expected one of digits, mnist"),
    ("{stem}", "deeperforward-other", "expected name 'deeperforward-mine'"),
    ("\"deeperforward\"", "\"deeper\"", "beginning with the paper and a dash"),
    ("\"TinyCNN\"", "3", "row expected a text, got 3"),
    ("[train]", "[train", "not TOML"),
])
def test_what_is_wrong_is_one_line(tmp_path, old, new, text):
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ValueError) as error:
        recipe_files.load(path)
    line = str(error.value)
    assert line.startswith("[recipe] deeperforward-mine.toml: ") and text in line
    assert "\n" not in line


def test_unknown_names_say_what_is_known(tmp_path):
    with pytest.raises(ValueError, match=r"unknown recipe 'deeper'.*papers: .*deeperforward"):
        recipe_files.load("deeper")
    with pytest.raises(ValueError, match=r"unknown paper 'deeper'; known: .*deeperforward"):
        recipe_files.of_paper("deeper")
    with pytest.raises(ValueError, match="no such file"):
        recipe_files.load(tmp_path / "none.toml")
