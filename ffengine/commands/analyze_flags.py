"""The kinds of `ffengine analyze` and their options; loads nothing heavy, --help shows it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Add = Callable[[argparse.ArgumentParser], None]
#: Of the layers' maps of networks that are shown a label.
LABELS = ("zero", "neutral", "true")


def _responses(made: argparse.ArgumentParser) -> None:
    _samples(made)
    _layers(made)
    _label(made, "zero")
    made.add_argument("--classes", type=int, nargs="+", metavar="CLASS",
                      help="classes to show, up to 12 (default: the first 10)")
    made.add_argument("--neurons", metavar="FIRST:LAST",
                      help="show these neurons of each layer only, magnified")


def _activations(made: argparse.ArgumentParser) -> None:
    _samples(made)
    _layers(made)
    _label(made, "zero")
    made.add_argument("--sample", type=int, default=0, metavar="N",
                      help="sample of the grey map, shown with its own label (default: 0)")


def _sip(made: argparse.ArgumentParser) -> None:
    _samples(made)


def _weights(made: argparse.ArgumentParser) -> None:
    made.add_argument("--layer", type=int, default=0, help="layer to show (default: 0)")
    made.add_argument("--clamp", type=float, default=0.3, metavar="C",
                      help="show weights within -C to C (default: 0.3, as Trifecta)")


def _tsne(made: argparse.ArgumentParser) -> None:
    made.add_argument("--layer", type=int, help="layer to show (default: the last)")
    made.add_argument("--samples", type=int, default=1000, metavar="N",
                      help="first N test samples, at most 2000 (default: 1000)")
    made.add_argument("--untrained", action="store_true",
                      help="also of the same network before training")
    made.add_argument("--seed", type=int, default=0, help="of the embedding")
    _label(made, "neutral")


def _probes(made: argparse.ArgumentParser) -> None:
    _samples(made)
    _label(made, "neutral")
    made.add_argument("--hidden", type=int, nargs="+", default=[256], metavar="UNITS",
                      help="units of the heads' hidden layers (default: 256)")
    made.add_argument("--epochs", type=int, default=5, help="of the heads (default: 5)")
    made.add_argument("--lr", type=float, default=1e-3, help="of Adam (default: 0.001)")
    made.add_argument("--features", choices=("z", "h"), default="z",
                      help="as the next layer sees them, or before their normalisation")
    made.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _grid(made: argparse.ArgumentParser) -> None:
    made.add_argument("--over", action="append", required=True, metavar="KEY=V1,V2,...",
                      help="values of lr, epochs, seed, batch_size or of an option of the model "
                           "(heatmap: give it twice, columns first)")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="options",
                      help="an option of the model that all cells share (default: the run's)")
    made.add_argument("--data-set", action="append", default=[], metavar="KEY=VALUE",
                      dest="data_options", help="an option of the data set (default: the run's)")
    made.add_argument("--epochs", type=int, help="of each cell (default: the run's)")
    made.add_argument("--jobs", type=int, help="cells at once (default: the machine's cores)")
    made.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _degeneration(made: argparse.ArgumentParser) -> None:
    _samples(made)
    made.add_argument("--layer", type=int, help="layer to remove from (default: the last one that "
                      "the scores read)")
    one = made.add_mutually_exclusive_group()
    one.add_argument("--fractions", type=float, nargs="+", metavar="F",
                     help="remove what responds at most F times its set's strongest neuron "
                          "(default: 0 to 0.5)")
    one.add_argument("--lowest", type=int, nargs="+", metavar="N",
                     help="remove the N neurons that respond least")


def _ttest(made: argparse.ArgumentParser) -> None:
    made.add_argument("--against", nargs="+", required=True, metavar="RUN",
                      help="the second group of runs")
    made.add_argument("--paired", action="store_true",
                      help="the groups' runs are pairs, e.g. of the same seed, in order")
    made.add_argument("--equal-variances", action="store_true",
                      help="Student's test in place of Welch's")
    made.add_argument("--training-data", action="store_true",
                      help="also accuracy on training data, and the gap to the test's")


def _prunability(made: argparse.ArgumentParser) -> None:
    _samples(made)
    made.add_argument("--by", default="random", metavar="METHOD",
                      help="as of `ffengine prune` (default: random)")
    made.add_argument("--ratios", type=float, nargs="+", default=[1, 2, 4, 8, 16], metavar="R",
                      help="compression ratios (default: 1 2 4 8 16)")
    made.add_argument("--seeds", type=int, default=5, metavar="N",
                      help="each run is pruned with seeds 0 to N-1 (default: 5)")
    made.add_argument("--layers", type=int, nargs="+", metavar="LAYER",
                      help="layers that lose neurons (default: all)")
    made.add_argument("--rank-samples", type=int, default=1000, metavar="N",
                      help="of validation data, that activity is measured on (default: 1000)")
    made.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _report(made: argparse.ArgumentParser) -> None:
    _samples(made)


def _none(made: argparse.ArgumentParser) -> None:
    pass


def _layers_kind(made: argparse.ArgumentParser) -> None:
    _samples(made)


def _history(made: argparse.ArgumentParser) -> None:
    made.add_argument("--columns", nargs="+", metavar="NAME",
                      help="columns to show, e.g. hoyer of every layer or hoyer_0 of one (default: "
                           "losses and accuracies)")
    made.add_argument("--steps", action="store_true",
                      help="what was watched at single steps (steps.csv), not at epochs")


#: Kind -> (what it shows, whether it takes several runs, its options).
KINDS: dict[str, tuple[str, bool, Add]] = {
    "report": ("one HTML page about a run, for people", False, _report),
    "responses": ("mean response of every neuron to every class", False, _responses),
    "activations": ("activation maps of one sample in grey, of a data set in HSV", False,
                    _activations),
    "layers": ("each layer alone: accuracy, goodness, deactivated neurons, weights", True,
               _layers_kind),
    "sip": ("accuracy of goodness summed over every range of layers", False, _sip),
    "sparsity": ("four measures of sparsity and statistics of every layer's weights", True, _none),
    "history": ("curves of the runs' history: losses, accuracies, what was watched", True,
                _history),
    "weights": ("a layer's weight matrix, clamped", False, _weights),
    "tsne": ("t-SNE of a layer before and after its normalisation", False, _tsne),
    "probes": ("accuracy of multi-layer heads trained on each layer's features", False, _probes),
    "heatmap": ("accuracy and sparsity over a grid of two settings, e.g. lr and theta", False,
                _grid),
    "sweep": ("accuracy of each layer over the values of one setting, e.g. phi", False, _grid),
    "prunability": ("accuracy of the runs pruned to rising compression ratios, over seeds", True,
                    _prunability),
    "degeneration": ("accuracy against how many of a layer's weak neurons are removed", False,
                     _degeneration),
    "ttest": ("t-test and Cohen's d between two groups of runs", True, _ttest),
}


def add_kinds(analyze: argparse.ArgumentParser,
              common: Callable[[argparse.ArgumentParser], None]) -> None:
    """A parser of its own for each kind; `common` adds what every one takes."""
    kinds = analyze.add_subparsers(dest="kind", required=True, metavar="KIND",
                                   parser_class=type(analyze))
    for name, (text, several, add) in KINDS.items():
        made = kinds.add_parser(name, help=text, description=text)
        made.add_argument("runs", metavar="RUN", nargs="+" if several else 1,
                          help="run folder, or a checkpoint file")
        made.add_argument("--checkpoint", choices=("latest", "best"), default="latest",
                          help="of the last epoch, or of the best validation accuracy (default: "
                               "latest)")
        made.add_argument("--data-root", help="folder that holds the data")
        made.add_argument("--out", help="FILE.html (default: analysis/report.html in the run)"
                          if name == "report" else
                          "folder for PNG and CSV (default: `analysis` in the first run's folder)")
        add(made)
        common(made)


def _samples(made: argparse.ArgumentParser) -> None:
    made.add_argument("--split", choices=("test", "valid", "train"), default="test",
                      help="part of the run's data set (default: test)")
    made.add_argument("--samples", type=int, metavar="N", help="its first N samples (default: all)")


def _layers(made: argparse.ArgumentParser) -> None:
    made.add_argument("--layers", type=int, nargs="+", metavar="LAYER",
                      help="layers to show, from 0, up to 6 (default: up to 4, spread)")


def _label(made: argparse.ArgumentParser, default: str) -> None:
    made.add_argument("--label", choices=LABELS, default=default,
                      help="what networks that are shown a label see in its place (default: "
                           f"{default})")
