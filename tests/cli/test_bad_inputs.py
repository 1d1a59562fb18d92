"""A hundred ways to ask for the wrong thing: one line that says what was expected and what came,
exit status 2, and nothing left behind."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ffengine.cli import main

ROOT = Path(__file__).parents[2]
SET = "--data synthetic --data-set shape=(1,8,8) --data-set train=24 --data-set test=8 --quiet"
NET = f"deeperforward/tinycnn {SET} --set widths=(10,10,10,10) --batch-size 8 --epochs 1"
#: What Python says where nobody checked.
RAW = ("Traceback", "object is not", "object has no", "unsupported operand", "zip() argument",
       "must not be zero", "list index", "tuple index", "invalid literal", "could not convert",
       "NoneType", "unexpected keyword", "positional argument", "AssertionError", "KeyError",
       "(--debug shows where)")

#: Command line, what its one line of error has.
CASES = [line.split(" => ") for line in f"""
 => COMMAND
trian {NET} => did you mean train?
fly => invalid choice: 'fly'
train => expected MODEL and --data
train deeperforward/tinycnn => expected MODEL and --data
train {NET} --ephocs 3 => did you mean --epochs?
train {NET} more => unrecognized arguments: more
train {NET} --epochs => expected one argument
train deeperforward/tinicnn {SET} => did you mean deeperforward/tinycnn?
train resnet17 {SET} => unknown model 'resnet17'
train deeperforward/tinycnn --data digts => did you mean digits?
train deeperforward/tinycnn --data digits: => 'digits:'
train deeperforward/tinycnn --data folder:nowhere => nowhere
train deeperforward/tinycnn --data folder: => folder:
train deeperforward/tinycnn --data folder:empty => empty
train deeperforward/tinycnn --data folder:broken => broken/train/a/0.png
train deeperforward/tinycnn --data npz:nowhere.npz => nowhere.npz
train deeperforward/tinycnn --data npz:text.txt => text.txt
train deeperforward/tinycnn --data npz:odd.npz => odd.npz
train deeperforward/tinycnn --data csv:nowhere.csv => nowhere.csv
train sn/mlp --data csv:ragged.csv => ragged.csv
train sn/mlp --data csv:words.csv --data-set label=y => words.csv
train sn/mlp --data csv:words.csv --data-set label=z => expected a label column called z
train deeperforward/tinycnn --data cifar10 --data-root nowhere --data-set download=False => nowhere
train {NET} --epochs 0 => epochs must be a whole number of at least 1, got 0
train {NET} --epochs -2 => got -2
train {NET} --epochs many => invalid int value: 'many'
train {NET} --epochs 1.5 => invalid int value: '1.5'
train {NET} --batch-size 0 => --batch-size expected 1 or more, got 0
train {NET} --batch-size -4 => got -4
train {NET} --batch-size x => invalid int value: 'x'
train {NET} --lr x => invalid float value: 'x'
train {NET} --lr -1 => lr must be a finite number of 0 or more, got -1.0
train {NET} --lr nan => got nan
train {NET} --lr inf => got inf
train {NET} --seed -1 => seed must be in 0..4294967295, got -1
train {NET} --seed 99999999999 => got 99999999999
train {NET} --device gpu => --device expected cpu or cuda, got 'gpu'
train {NET} --device cuda:x => --device expected cpu or cuda
train {NET} --backend tpu => backend must be one of auto, reference, cpu
train {NET} --backend cuda => cannot run here
train {NET} --precision fp8 => invalid choice: 'fp8'
train {NET} --precision fp64 --backend cpu => no float64 kernels
train {NET} --memory-budget lots => 440MB
train {NET} --memory-budget 0 => 440MB
train {NET} --memory-budget -3MB => expected one argument
train {NET} --memory-budget 10kB => the smallest needs
train bp/sn/mlp {SET} --memory-budget 1GB => trained by one loss
train {NET} --states int4 => invalid choice: 'int4'
train {NET} --weights bf16 => weights=bf16 expected precision bf16
train {NET} --costs free => invalid choice: 'free'
train {NET} --device-profile toaster => toaster
train {NET} --augment crop4+flop => flop
train {NET} --augment crop4+crop2 => expected each word once
train {NET} --augment rotate999 => degrees must be in 0..180, got 999.0
train {NET} --watch everything => everything
train {NET} --watch accuracy --watch-every never => never
train {NET} --watch accuracy --watch-samples 0 => --watch-samples expected 1 or more, got 0
train {NET} --out text.txt => text.txt
train {NET} --out run => --resume run goes on with it
train {NET} --resume nowhere => expected a run folder
train --resume text.txt => text.txt
train --resume run --seed 4 --quiet => expected seed 4, got 0
train --resume run --set widths=(20,20,20,20) --quiet => expected
train --resume run --lr 3 --quiet => expected lr 3.0
train bp/sn/mlp {SET} --baselines => expected a model of local training with a twin
train {NET} --set widths => --set expected KEY=VALUE, got 'widths'
train {NET} --set =3 => --set expected KEY=VALUE, got '=3'
train {NET} --set width=3 => did you mean widths?
train {NET} --set widths=(11,20,20,20) => widths=(20,20,20,20) would do
train {NET} --set widths=(10,20) => expected 4 widths, got 2
train {NET} --set widths=10 => widths expected a tuple of whole numbers, got 10
train {NET} --set widths=wide => got 'wide'
train {NET} --set widths=() => widths expected 1 or more
train {NET} --set widths=(0,10,10,10) => widths expected 1 or more
train {NET} --set num_classes=0 => num_classes expected 1 or more, got 0
train {NET} --set image_size=0 => image_size expected 1 or more, got 0
train {NET} --set image_size=big => --set image_size expected a whole number, got 'big'
train {NET} --set in_channels=2.5 => in_channels expected a whole number
train {NET} --set dropout=1.5 => p must lie in [0, 1), got 1.5
train {NET} --set dropout=much => dropout expected a number, got 'much'
train {NET} --set bias=maybe => bias expected True or False, got 'maybe'
train {NET} --set goodness=best => goodness must be one of mean, sum_sq, mean_sq, got 'best'
train {NET} --data-set shape=wide => shape
train {NET} --data-set train=0 => train
train {NET} --data-set trian=5 => trian
train {NET} --data-set normalize=maybe => maybe
train fflib/ffrnn {SET} --set test_frames=(1,) => test_frames expected a tuple of 2 whole numbers
train sn/cifar100 {SET} --set superclasses=(0,1) => class 2 has none
train cwcomp/cfse {SET} --set class_groups=0 => class_groups expected 1 or more, got 0
eval nowhere => expected a run folder
eval run --checkpoint worst => invalid choice: 'worst'
eval run --data synthetic => eval expected data of
eval broken.safetensors => broken.safetensors
predict run => required: FILES
predict run nowhere.png => nowhere.png is not there
predict run text.txt => text.txt
predict run broken/train/a/0.png => broken/train/a/0.png
predict run wide.csv => wide.csv
export nowhere => expected a run folder
export run --format tflite => invalid choice: 'tflite'
export run --format safetensors --out text.txt/model => text.txt
plan x => unknown model 'x'
plan bp/sn/mlp => trained by one loss
plan sn/mlp --memory-budget 1kB => the smallest needs
plan sn/mlp --device-profile toaster => toaster
profile sn/mlp --steps 0 => --steps expected 1 or more, got 0
profile sn/mlp --phase 9 --no-png => --phase expected one of
profile sn/mlp --epoch 9 --phase 0 => expected --phase or --epoch, got both
profile bp/sn/mlp => trained by one loss
profile sn/mlp --out text.txt => --out expected a folder, got text.txt
analyze => KIND
analyze colours run => invalid choice: 'colours'
analyze report nowhere => expected a run folder
analyze report run --out page.txt => FILE.html
analyze responses run --layers 9 => 9
analyze weights run --layer 9 => 9
analyze tsne run --samples 0 => samples
grow run --layer 9 => 9
grow run --class 99 => 99
grow run --neurons 0 => neurons
degenerate run --lowest -1 => lowest
prune run => --ratio
prune run --ratio 0.5 => --ratio expected a number of 1 or more, got 0.5
prune run --ratio 2 --by luck => --by must be one of
prune run --ratio 2 --samples 0 => --samples expected 1 or more, got 0
prune run --ratio 2 --layers 9 => 9
reproduce nothing => nothing
reproduce sn --seeds 0 => --seeds expected a count (5) or different seeds
reproduce sn --jobs 0 => --jobs expected 1 or more, got 0
reproduce sn --budget-hours 0 => --budget-hours expected more than 0, got 0
reproduce --resume --out nowhere => --resume expected a recipe
reproduce sn --report => --report expected no recipe
bench => expected a checkout
devices extra => unrecognized arguments: extra
""".strip("\n").split("\n")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a finished run and files of many kinds that are not what they seem."""
    from PIL import Image

    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    os.chdir(folder)
    assert main(["train", *shlex.split(NET), "--out", "run"]) == 0
    (folder / "text.txt").write_text("no numbers here")
    (folder / "broken.safetensors").write_bytes(b"\1\2\3")
    (folder / "ragged.csv").write_text("1,2,0\n1,2\n")
    (folder / "words.csv").write_text("x,y\n1,0\nred,1\n")
    np.savetxt(folder / "wide.csv", np.ones((2, 9)), delimiter=",")
    np.savez(folder / "odd.npz", x=np.ones((3, 4)), y=np.ones(2))
    (folder / "empty").mkdir()
    for label in ("train/a", "train/b", "test/a", "test/b"):
        (folder / "broken" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8)).save(folder / "broken" / label / f"{i}.png")
    (folder / "broken" / "train" / "a" / "0.png").write_bytes(b"\x89PNG")
    yield folder
    os.chdir(before)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (s.st_size, s.st_mtime_ns)
            for p in folder.rglob("*") if (s := p.stat())}


def test_there_are_a_hundred() -> None:
    assert len({words for words, _ in CASES}) >= 100


@pytest.mark.parametrize("words, expected", CASES, ids=[w[:60] or "nothing" for w, _ in CASES])
def test_a_bad_input_is_one_line(words: str, expected: str, place: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    before = files(place)
    status = main(shlex.split(words))
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.startswith("ffengine: ") and err.count("\n") == 1 and err.endswith("\n")
    assert expected in err, err
    assert not [raw for raw in RAW if raw in err], err
    assert files(place) == before, "a refused command left something behind"


@pytest.mark.parametrize("words", ["trian x", "models more"])
def test_in_a_process_of_its_own(words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ffengine", *shlex.split(words)], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ffengine: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
