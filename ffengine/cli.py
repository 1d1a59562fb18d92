"""The command line: `ffengine COMMAND …`. What each command does lives in ffengine/commands.

Exit status: 0, 2 for anything wrong (one line on standard error), 130 after Ctrl-C, 143 after
SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import ffengine
from ffengine.commands import streams
from ffengine.commands.analyze_flags import add_kinds
from ffengine.needs import load
from ffengine.words import meant

PRECISIONS = ("fp64", "fp32", "bf16", "fp16")
STATES, WEIGHTS = ("fp32", "bf16", "8bit"), ("fp32", "bf16")
ANALYZE = "look inside trained runs: pictures, tables and tests, as PNG, CSV and HTML"
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
#: ffengine.data.NAMES, which is not loaded for --help.
DATA = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "synthetic")


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line like every other error, and says what was meant."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = meant(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        raise ValueError(f"{message}{near} (see {self.prog} --help)")

    def parse_known_args(self, *given: Any, **more: Any) -> Any:
        args, rest = super().parse_known_args(*given, **more)
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        if flags and self._subparsers is None:
            known = [word for action in self._actions for word in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(rest)}{meant(flags[0], known)}")
        return args, rest


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="ffengine", description=(ffengine.__doc__ or "").partition("\n")[0])
    top.add_argument("--version", action="version", version=ffengine.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                  parser_class=Parser)

    def command(name: str, module: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=f"ffengine.commands.{module}:{name}")
        _output_flags(made)
        return made

    command("models", "models", "list the networks by name")
    train = command("train", "train", "train a network on a data set")
    _model_flags(train, optional=True)
    _machine_flags(train)
    _state_flags(train)
    _device_profile_flag(train, "; its memory becomes the budget, on a GPU")
    _train_flags(train)
    evaluate = command("eval", "runs", "accuracy of a trained run on its test set")
    _run_flags(evaluate)
    evaluate.add_argument("--data", help="another data set to judge on, e.g. folder:PATH (default: "
                          "the run's)")
    _data_set_flag(evaluate)
    _machine_flags(evaluate)
    predict = command("predict", "predict", "classes that a trained run gives to files")
    _run_flags(predict)
    predict.add_argument("files", nargs="+", metavar="FILES",
                         help="images, folders of them, .csv (rows of numbers) or .npz (array x)")
    _machine_flags(predict)
    plan = command("plan", "show", "memory plan of a training step, from shapes alone")
    _model_flags(plan)
    _machine_flags(plan)
    _data_source_flags(plan)
    _state_flags(plan)
    _device_profile_flag(plan, "; all: a row for every bundled one")
    plan.add_argument("--steps", action="store_true",
                      help="print how a batch becomes an update: the step's instructions, and the "
                           "bytes that live after each")
    listed = command("devices", "devices", "list the device profiles that predictions know")
    listed.add_argument("--template", action="store_true",
                        help="print a profile of one's own to begin with")
    profile = command("profile", "profile",
                      "time, traffic and live memory of a training step, layer by layer")
    _model_flags(profile)
    _machine_flags(profile)
    _state_flags(profile)
    _device_profile_flag(profile, "; its memory becomes the budget, on a GPU")
    _profile_flags(profile)
    command("env", "show", "which back-ends can run here, and what auto picks")
    export = command("export", "runs", "write a trained network for use elsewhere")
    _run_flags(export)
    export.add_argument("--format", choices=("pt2", "safetensors"), default="pt2",
                        help="pt2: a program of torch.export; safetensors: its state_dict")
    export.add_argument("--out", help="file to write (default: beside the checkpoint)")
    analyze = commands.add_parser("analyze", help=ANALYZE, description=ANALYZE)
    add_kinds(analyze, _analysis_flags)
    grow = command("grow", "structure",
                   "add neurons to the sets of a run's weakest classes; a new run")
    _edit_flags(grow)
    _growth_flags(grow)
    degenerate = command("degenerate", "structure",
                         "remove a run's neurons that respond least to their class; a new run")
    _edit_flags(degenerate)
    _degeneration_flags(degenerate)
    prune = command("prune", "prune",
                    "remove a run's neurons down to a share of its parameter bytes; a new run")
    _edit_flags(prune)
    _pruning_flags(prune)
    reproduce = command("reproduce", "reproduce",
                        "train the recipes of a paper and print its numbers beside ours")
    _reproduce_flags(reproduce)
    _size_flags(reproduce)
    _machine_flags(reproduce)
    _state_flags(reproduce)
    _data_flags(reproduce)
    bench = command("bench", "show", "run a benchmark suite of a checkout")
    bench.add_argument("suite", nargs="?", help="module under bench/ (default: list them)")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the suite")
    return top


def _output_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", action="store_true",
                      help="print one JSON value as the last line of standard output")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _analysis_flags(made: argparse.ArgumentParser) -> None:
    made.set_defaults(run="ffengine.commands.analyze:analyze")
    _machine_flags(made)
    _output_flags(made)


def _model_flags(made: argparse.ArgumentParser, optional: bool = False) -> None:
    made.add_argument("model", nargs="?" if optional else None, metavar="MODEL",
                      help="a name that `ffengine models` lists")
    _size_flags(made)


def _size_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="options",
                      help="a constructor argument of the model, e.g. widths=(20,40,80,80)")
    made.add_argument("--batch-size", type=int, metavar="N",
                      help="samples of a training step (default: the recipe's)")
    made.add_argument("--memory-budget", metavar="SIZE",
                      help="bytes that the tensors of a training step may take: 440MB (10^6) or "
                           "256MiB (2^20); the process holds more (docs/budgets.md)")


def _machine_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    made.add_argument("--backend", metavar="NAME", help=f"{', '.join(BACKENDS)}; default: auto")
    made.add_argument("--precision", choices=PRECISIONS, help="default: fp32")


def _state_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--states", choices=STATES,
                      help="what optimizer states are kept in; default: fp32, or what the budget "
                           "takes")
    made.add_argument("--weights", choices=WEIGHTS,
                      help="what layers' weights are kept in; bf16 with --precision bf16 only")
    made.add_argument("--costs", choices=("measured", "modelled"), default="measured",
                      help="what ranks the plans within a memory budget (default: measured)")


def _device_profile_flag(made: argparse.ArgumentParser, more: str = "") -> None:
    made.add_argument("--device-profile", metavar="NAME|FILE.toml",
                      help=f"a device that `ffengine devices` lists, or a file of one{more}")


def _data_source_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--data", metavar="D", help=f"data set: {', '.join(DATA)}; or one's own, "
                      "folder:PATH, npz:PATH or csv:PATH")
    made.add_argument("--data-root", help="folder that holds the data, or is to hold it")
    _data_set_flag(made)


def _data_set_flag(made: argparse.ArgumentParser) -> None:
    made.add_argument("--data-set", action="append", default=[], metavar="KEY=VALUE",
                      dest="data_options", help="an option of the data set, e.g. train=256")


def _data_flags(made: argparse.ArgumentParser) -> None:
    _data_source_flags(made)
    made.add_argument("--epochs", type=int, metavar="N",
                      help="passes over the training data, per layer where layers train one after "
                           "the other (default: the recipe's)")
    made.add_argument("--lr", type=float, metavar="RATE",
                      help="learning rate of the first epoch (default: the recipe's)")
    made.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _train_flags(made: argparse.ArgumentParser) -> None:
    _data_flags(made)
    made.add_argument("--seed", type=int, help="default: 0")
    made.add_argument("--augment", metavar="WORDS",
                      help="augmentations joined by +, e.g. crop4+flip (default: none)")
    made.add_argument("--out", help="run folder (default: a new one under runs/)")
    made.add_argument("--resume", metavar="RUN", help="go on where this run stands")
    made.add_argument("--stages", type=int, metavar="N",
                      help="spread the layers over N processes, torchrun's or ones started here "
                           "(docs/distributed.md)")
    made.add_argument("--timeout", type=float, metavar="SECONDS",
                      help="with --stages: without progress a rank then counts as hanging "
                           "(default: 120)")
    made.add_argument("--baselines", action="store_true",
                      help="also train by backpropagation and by the unfused PyTorch step")
    made.add_argument("--watch", metavar="A,B,...",
                      help="further columns of the history, a number for each layer: accuracy, "
                           "separation, gradient, weight, goodness, dead, sparsity, statistics, "
                           "gamma, seconds (docs/watching.md)")
    made.add_argument("--watch-every", default="epoch", metavar="epoch|step|N",
                      help="step, or N: also at every, or every N-th, step, in steps.csv")
    made.add_argument("--watch-samples", type=int, default=1000, metavar="N",
                      help="the first N test samples are looked at (default: 1000)")


def _reproduce_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("recipe", nargs="*", metavar="RECIPE|PAPER",
                      help="recipes, .toml files of one, or papers (default: list them)")
    made.add_argument("--seeds", metavar="N|A,B,...",
                      help="how many seeds, or which (default: the recipe's)")
    made.add_argument("--jobs", type=int, metavar="N",
                      help="trainings at a time (default: one a core, or one on a GPU)")
    made.add_argument("--budget-hours", type=float, metavar="H",
                      help="train what fits into so many hours, most papers covered first, of the "
                           "recipes named, or of all")
    made.add_argument("--resume", action="store_true",
                      help="go on with the last queue of --out, or with the recipes named, as "
                           "naming them alone does: what is finished is never trained again")
    made.add_argument("--report", action="store_true",
                      help="write docs/reproduction.md from the results under bench/results, or of "
                           "--out")
    made.add_argument("--out", help="folder of the results file and of trainings under way "
                                    "(default: runs)")


def _profile_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--steps", type=int, default=5, help="timed steps of a phase (default: 5)")
    made.add_argument("--phase", type=int,
                      help="one phase of the schedule by its number (default: all, in order)")
    made.add_argument("--epoch", type=int, help="the phases of this epoch")
    made.add_argument("--out", help="folder for profile.json, .html, .png and trace.json (default: "
                      "a new one under runs/)")
    made.add_argument("--no-png", action="store_true", help="no profile.png, needs no matplotlib")


def _run_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="run folder, or a checkpoint file")
    made.add_argument("--checkpoint", choices=("latest", "best"), default="latest",
                      help="of the last epoch, or of the best validation accuracy (default: "
                           "latest)")
    made.add_argument("--data-root", help="folder that holds the data")


def _edit_flags(made: argparse.ArgumentParser) -> None:
    """Of every command that writes an edited run."""
    _run_flags(made)
    made.add_argument("--out", metavar="RUN2", help="folder of the new run (default: a new one "
                      "under runs/)")
    made.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    made.add_argument("--backend", metavar="NAME", help=f"{', '.join(BACKENDS)}; default: the "
                      "run's")


def _growth_flags(made: argparse.ArgumentParser) -> None:
    _layer_flag(made)
    made.add_argument("--threshold", type=float, metavar="ACCURACY",
                      help="grow every class whose accuracy (0-1, on validation data) is below it; "
                           "default: the weakest class alone")
    made.add_argument("--class", type=int, dest="label", metavar="K", help="grow this class")
    made.add_argument("--neurons", type=int, default=1, help="new neurons of a class (default: 1)")
    made.add_argument("--init", choices=("clone", "random"), default="clone",
                      help="how they begin (default: clone of the most responding neuron)")
    made.add_argument("--epochs", type=int, help="of their training; default: 5, in convolutions "
                      "40; 0: none")
    made.add_argument("--lr", type=float, help="default: 1e-4, in convolutions 1e-5")
    made.add_argument("--batch-size", type=int, help="of it; default: all at once, in "
                      "convolutions 128")
    made.add_argument("--seed", type=int, default=0, help="default: 0")


def _layer_flag(made: argparse.ArgumentParser) -> None:
    made.add_argument("--layer", type=int, help="default: the last one that the scores read")


def _degeneration_flags(made: argparse.ArgumentParser) -> None:
    _layer_flag(made)
    rule = made.add_mutually_exclusive_group()
    rule.add_argument("--lowest", type=int, metavar="N",
                      help="so many neurons, the least responding of the layer (default: 2)")
    rule.add_argument("--threshold", type=float, metavar="RESPONSE",
                      help="neurons whose mean response to their class is at most this")
    rule.add_argument("--fraction", type=float, metavar="SHARE",
                      help="... at most this share of their set's maximum")


def _pruning_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--by", default="random", metavar="METHOD",
                      help="random, activity, last, first, ends, sum, threshold or goodness "
                           "(docs/pruning.md; default: random)")
    made.add_argument("--ratio", type=float, required=True, metavar="R",
                      help="compression ratio, parameter bytes before / after: 4 keeps a quarter")
    made.add_argument("--layers", type=int, nargs="+", metavar="LAYER",
                      help="layers that lose neurons (default: all)")
    made.add_argument("--seed", type=int, default=0, help="of random choices (default: 0)")
    made.add_argument("--samples", type=int, default=1000, metavar="N",
                      help="of validation data, that activity is measured on (default: 1000)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    with streams.forgiving():
        return run(list(sys.argv[1:] if argv is None else argv))


def run(words: list[str]) -> int:
    debug = "--debug" in words
    try:
        args = parser().parse_args(words)
        if getattr(args, "stages", None) is not None:
            args.words = words  # which every process is started with
            # else torch prints pages of a closed connection
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        module, _, name = args.run.partition(":")
        handler = getattr(load(module), f"run_{name}")
        emit(handler(args), args.json)
    except KeyboardInterrupt as stop:
        return fail(str(stop) or "interrupted", 128 + getattr(stop, "signal", signal.SIGINT), debug)
    except Exception as error:
        # of several processes one says what all of them have found
        return 2 if getattr(error, "said", False) else fail(describe(error), 2, debug)
    return 0


def emit(result: tuple[str, Any], as_json: bool) -> None:
    """Print a command's (text for people, value for programs); later ranks have neither."""
    text, value = result
    if value is None:
        return
    print(json.dumps(value) if as_json else text, flush=True)


def describe(error: Exception) -> str:
    """An error as one line; what we did not foresee is marked with its kind."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, (ValueError, TypeError, OSError)) or text.startswith("["):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def fail(text: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    lines = (line.strip() for line in text.splitlines())  # a path may have spaces that count
    print("ffengine: " + " ".join(filter(None, lines)), file=sys.stderr, flush=True)
    return status
