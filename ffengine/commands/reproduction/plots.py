"""Pictures of reproduced rows; matplotlib is only needed here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ffengine.commands.reproduction.tables import Row
from ffengine.engine.run.checkpoint import write_atomically
from ffengine.needs import need

PAPER, OURS = "#3b6ea5", "#c1272d"


def rows_beside(path: Path, rows: Sequence[Row]) -> None:
    """PNG: a line a row from the paper's number to ours, bars of one standard deviation."""
    need("matplotlib", "[reproduce] --report").use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.34 * len(rows)), dpi=110)
    places = list(range(len(rows)))[::-1]
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["paper_mean"], row["mean"]], [place, place], color="0.8", linewidth=3,
                  solid_capstyle="round", zorder=1)
        axes.annotate(f"{row['difference']:+.2f}", (1.01, place), fontsize=8, va="center",
                      xycoords=("axes fraction", "data"))
    for name, mean, sd, colour, marker in (("paper", "paper_mean", "paper_sd", PAPER, "D"),
                                           ("ours", "mean", "sd", OURS, "o")):
        axes.errorbar([row[mean] for row in rows], places, xerr=[row[sd] or 0 for row in rows],
                      fmt=marker, color=colour, markersize=6, elinewidth=1.2, capsize=2,
                      linestyle="none", label=name, zorder=3)
    axes.set_yticks(places, [label(row) for row in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("accuracy, % (bars: one standard deviation over seeds)")
    axes.grid(True, axis="x", color="0.92", zorder=0)
    for spine in ("top", "right", "left"):
        axes.spines[spine].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1),
                borderaxespad=0.2)
    axes.set_title(rows[0]["paper"], loc="left", fontsize=11)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    write_atomically(path, file.getvalue())


def label(row: Row) -> str:
    """The recipe, and how far it was trained where that is not all."""
    short = "" if row["epochs"] == row["paper_epochs"] else (
        f" ({row['epochs']} of {row['paper_epochs']} epochs)")
    return f"{row['recipe'].partition('-')[2]}{short}"
