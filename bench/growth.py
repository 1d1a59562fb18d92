"""Growth and degeneration of support-neuron sets: tables 3 and 4 of the paper, MNIST's half.

    python -m bench.growth --data-root DIR [--data mnist] [--seeds 10] [--batch-size 128]
                           [--json FILE]

Linear 784 -> 50 after one epoch. Growth: one neuron for the class that is weakest on validation
data, cloned, then trained for 5 epochs at 1e-4. Degeneration: the neuron that responds least of
all, twice. Accuracies are of the test set, in percent; the paper's are of a single run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ffengine as ff
from ffengine import data
from ffengine.adapt.growth import Degeneration, Growth, degenerate, grow, growing
from ffengine.engine.run.evaluation import class_accuracy
from ffengine.nn import LocalNet

#: The paper's rows: accuracy, then that of classes 1 to 10 (of the digits 0 to 9).
PAPER_GROWTH = {
    "net": (76.95, 95.82, 94.98, 87.89, 6.73, 89.82, 79.93, 90.71, 93.19, 81.11, 48.66),
    "net_clone": (82.09, 95.82, 94.98, 87.79, 58.31, 89.82, 79.26, 90.71, 93.19, 81.11, 48.66),
    "net_train": (83.01, 95.82, 94.98, 87.69, 69.11, 89.82, 77.80, 90.71, 93.19, 80.80, 48.66)}
PAPER_DEGENERATION = {
    "0 removed": (79.20, 90.51, 91.98, 76.64, 75.64, 63.95, 81.61, 93.11, 40.27, 85.83, 92.76),
    "1 removed": (79.08, 98.06, 91.98, 74.32, 74.85, 63.74, 78.69, 91.64, 39.88, 85.42, 92.36),
    "2 removed": (79.36, 97.75, 91.89, 88.85, 68.71, 63.03, 78.25, 89.97, 39.01, 83.88, 91.87)}
Rows = dict[str, tuple[float, ...]]


def once(splits: data.Splits, seed: int, size: int) -> dict[str, Any]:
    """One seed: the class that grew, the units that were removed, and the tables' rows."""
    torch.manual_seed(seed)
    net = ff.models.create("sn/mlp", num_classes=splits.num_classes,
                           in_channels=splits.shape[0], image_size=splits.shape[1],
                           layers=(5 * splits.num_classes,))
    trainer = ff.Trainer(net, epochs=1, batch_size=size, seed=seed, progress=False)
    trainer.fit(data.loader(splits.train, batch_size=size, shuffle=True, seed=seed))
    train, valid, test = (data.loader(part, batch_size=1000)
                          for part in (splits.train, splits.valid, splits.test))
    label = growing(class_accuracy(net, valid)[1], Growth())[0]
    clone, _ = grow(net, 0, label, train, Growth(epochs=0, seed=seed))
    trained, _ = grow(net, 0, label, train, Growth(seed=seed))
    one, first = degenerate(net, 0, train, Degeneration(lowest=1))
    two, second = degenerate(one, 0, train, Degeneration(lowest=1))
    assert first is not None and second is not None
    return {"seed": seed, "grown_class": label,
            "removed_of_class": [edit.gone(0)[0] // 5 for edit in (first, second)],
            "growth": {name: row(n, test) for name, n in (
                ("net", net), ("net_clone", clone), ("net_train", trained))},
            "degeneration": {name: row(n, test) for name, n in (
                ("0 removed", net), ("1 removed", one), ("2 removed", two))}}


def row(net: LocalNet, test: data.Loader) -> tuple[float, ...]:
    """Accuracy of all samples, then of each class, in percent."""
    total, by_class = class_accuracy(net, test)
    return tuple(100 * (a or 0.0) for a in (total, *by_class))


def table(rows: Rows) -> str:
    lines = []
    for name, values in rows.items():
        lines.append(f"{name:12s}" + "".join(f"{v:7.2f}" for v in values))
    return "\n".join(lines)


def report(found: Sequence[dict[str, Any]]) -> str:
    """The tables of every seed, the paper's, and what growth changed over the seeds."""
    count = len(found[0]["growth"]["net"]) - 1
    head = f"{'':12s}{'Acc.':>7s}" + "".join(f"{k:7d}" for k in range(count))
    lines = []
    for one in found:
        lines += [f"seed {one['seed']}: class {one['grown_class']} grows; removed of classes "
                  f"{one['removed_of_class']}", head, table(one["growth"]),
                  table(one["degeneration"]), ""]
    lines += ["the paper, table 3", head, table(PAPER_GROWTH), "the paper, table 4", head,
              table(PAPER_DEGENERATION), ""]
    for name in ("net_clone", "net_train"):
        own = [one["growth"][name][1 + one["grown_class"]]
               - one["growth"]["net"][1 + one["grown_class"]] for one in found]
        total = [one["growth"][name][0] - one["growth"]["net"][0] for one in found]
        lines.append(f"{name}: the grown class rises in {sum(v > 0 for v in own)} of {len(own)} "
                     f"seeds, by {sum(own) / len(own):+.2f} on average ({min(own):+.2f} to "
                     f"{max(own):+.2f}); all classes {sum(total) / len(total):+.2f} "
                     f"({min(total):+.2f} to {max(total):+.2f})")
    for name in ("1 removed", "2 removed"):
        total = [one["degeneration"][name][0] - one["degeneration"]["0 removed"][0]
                 for one in found]
        lines.append(f"{name}: all classes {sum(total) / len(total):+.2f} ({min(total):+.2f} to "
                     f"{max(total):+.2f})")
    return "\n".join(lines)


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--data", default="mnist")
    made.add_argument("--data-root")
    made.add_argument("--seeds", type=int, default=10)
    made.add_argument("--batch-size", type=int, default=128, help="of the one epoch")
    made.add_argument("--json", help="file for the rows")
    args = made.parse_args()
    splits = data.load(args.data, root=args.data_root, normalize="off")
    found = [once(splits, seed, args.batch_size) for seed in range(args.seeds)]
    print(report(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
