"""What the command line says, in words."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import pytest

from ffengine import cli, data, words

NET = ["sn/mlp", "--data", "synthetic", "--data-set", "shape=(1,8,8)", "--data-set", "train=16",
       "--data-set", "test=8", "--set", "layers=(10,10)", "--batch-size", "8", "--epochs", "2"]


def flags(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from flags(below, f"{name} {command}")
        else:
            yield name, action


def test_every_flag_says_what_it_does() -> None:
    found = list(flags(cli.parser(), "ffengine"))
    assert len(found) > 200
    assert [f"{name} {a.option_strings or a.dest}" for name, a in found if not a.help] == []


def test_data_lists_its_choices() -> None:
    assert cli.DATA == data.NAMES
    told = [action.help or "" for name, action in flags(cli.parser(), "ffengine")
            if "--data" in action.option_strings and name != "ffengine eval"]
    assert len(told) > 2
    for text in told:
        assert all(word in text for word in (*data.NAMES, "folder:PATH", "npz:PATH", "csv:PATH"))


def test_epochs_of_layers_in_turn(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    """--epochs 2 on two layers: 4 in all, said before and after; and which layers score."""
    assert cli.main(["train", *NET, "--out", f"{tmp_path}/run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "parameters, 4 epochs (2 per layer), plan " in err.splitlines()[0]
    assert [line.partition(":")[0] for line in err.splitlines()[1:]] == [
        f"epoch {i}/4" for i in (1, 2, 3, 4)]
    assert ", scored by layer 1, " in err.splitlines()[1]
    told = json.loads(out)
    assert (told["epochs"], told["epochs_in_all"]) == (2, 4)
    assert told["process_peak_bytes"] > told["peak_bytes"]
    assert cli.main(["train", *NET, "--out", f"{tmp_path}/more", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert " after 4 epochs (2 per layer) in " in text and " images/s on cpu, back-end " in text
    assert "; the process held " in text


@pytest.mark.parametrize("cuts, tile, batch, said", [
    ([], [64], 64, "1 segment; undivided batches of 64 rows"),
    ([], [1], 1, "1 segment; undivided batches of 1 row"),
    ([], [8], 64, "1 segment; tiles of 8 rows"),
    ([3], [8, 8], 64, "2 segments, cut after layer 3; tiles of 8 rows"),
    ([3, 5], [8, 64, 1], 64, "3 segments, cut after layers 3 and 5; tiles of 8, 64 and 1 rows"),
    ([], [], 8, "no segments")])
def test_a_plan(cuts: list[int], tile: list[int], batch: int, said: str) -> None:
    assert words.plan(cuts, tile, batch) == said


def test_small_words() -> None:
    assert words.span(1, 1) == "layer 1" and words.span(1, 3) == "layers 1 to 3"
    assert words.meant("digts", data.NAMES) == "; did you mean digits?"
    assert words.meant("x", data.NAMES) == "" == words.meant(3, data.NAMES)
    assert words.count(1, "epoch") == "1 epoch" and words.count(0, "epoch") == "0 epochs"
