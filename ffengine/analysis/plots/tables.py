"""Tables as pictures: heat maps, ranges of layers, confusion, a clamped weight matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ffengine.analysis.plots.style import COLOURS, MARKERS, figure, png, tidy

#: Cells up to which every one tells its number.
TOLD = 15


def heat_map(title: str, cells: Sequence[tuple[str, torch.Tensor, str]],
             rows: tuple[str, Sequence[Any]], columns: tuple[str, Sequence[Any]],
             absent: str = "diverged") -> bytes:
    """One map or several side by side; a cell that is NaN stays white.

    Args:
        cells: (title, (rows, columns) fp64, unit) of each map.
        rows, columns: (label, values).
        absent: what a white cell means.
    """
    height = 2.2 + min(10.0, max(3.6, 0.62 * len(rows[1])))
    made = figure(height, title)
    for axes, (name, values, unit) in zip(made.subplots(1, len(cells), squeeze=False)[0], cells,
                                          strict=True):
        _cells(axes, values.numpy(), absent)
        shown = axes.images[0]
        made.colorbar(shown, ax=axes, label=unit, shrink=0.9)
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xticks(range(len(columns[1])), list(map(str, columns[1])))
        axes.set_yticks(range(len(rows[1])), list(map(str, rows[1])))
        axes.set_xlabel(columns[0])
        axes.set_ylabel(rows[0])
    return png(made)


def _cells(axes: Any, values: Any, absent: str) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(bad="white")
    shown = axes.imshow(values, cmap=colours, aspect="auto", interpolation="nearest")
    if max(values.shape) > TOLD:
        return
    low, high = shown.get_clim()
    digits = 2 if high > 2 else 3
    for (i, j), v in np.ndenumerate(values):
        if np.isnan(v):
            axes.text(j, i, absent, ha="center", va="center", fontsize=9, color="#555555")
        else:
            light = high > low and (v - low) / (high - low) > 0.6
            axes.text(j, i, f"{v:.{digits}f}", ha="center", va="center", fontsize=10,
                      color="black" if light else "white")


def ranges(title: str, table: torch.Tensor, best: tuple[int, int]) -> bytes:
    """Accuracy (0 to 1) of goodness summed over layers start to end; the best range is framed."""
    from matplotlib.patches import Rectangle

    depth = len(table)
    made = figure(3.0 + 0.42 * max(depth, 6), title)
    axes = made.subplots()
    shown = (100 * table).masked_fill(torch.ones_like(table).tril(-1).bool(), torch.nan)
    _cells(axes, shown.numpy(), "")
    made.colorbar(axes.images[0], ax=axes, label="accuracy, %")
    axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, linewidth=3,
                             edgecolor=COLOURS[1]))
    axes.set_xticks(range(depth))
    axes.set_yticks(range(depth))
    axes.set_xlabel("last layer whose goodness is summed")
    axes.set_ylabel("first layer")
    axes.set_title(f"framed: the best range, layers {best[0]} to {best[1]}, "
                   f"{100 * float(table[best]):.2f} %", fontsize=11, loc="left")
    return png(made)


def confusion(title: str, counts: torch.Tensor, classes: Sequence[str]) -> bytes:
    """Share of each true class (row) taken for each class (column), %."""
    share = 100 * counts.double() / counts.sum(1, keepdim=True)
    return heat_map(title, [("", share, "% of the class's samples")], ("true class", classes),
                    ("taken for", classes), absent="")


def weight(title: str, values: torch.Tensor, limit: float) -> bytes:
    """A clamped weight matrix (outputs, inputs): blue below 0, red above, white 0."""
    made = figure(8.5, title)
    axes = made.subplots()
    shown = axes.imshow(values.float().cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit,
                        aspect="auto", interpolation="nearest")
    made.colorbar(shown, ax=axes, label=f"weight, clamped to ±{limit:g}", extend="both")
    axes.set_xlabel("input")
    axes.set_ylabel("output neuron")
    return png(made)


def embedding(title: str, maps: Sequence[tuple[str, torch.Tensor]], y: torch.Tensor,
              classes: Sequence[str]) -> bytes:
    """Two-dimensional embeddings (N, 2), two a row, of samples with labels y (N,)."""
    columns = min(2, len(maps))
    made = figure(0.9 + 6.0 * -(-len(maps) // columns), title)
    grid = made.subplots(-(-len(maps) // columns), columns, squeeze=False).flatten()
    for axes, (name, at) in zip(grid, maps, strict=True):
        for k in range(len(classes)):
            rows = at[y == k].numpy()
            if not len(rows):
                continue
            axes.scatter(*rows.T, s=14, marker=MARKERS[k % len(MARKERS)], linewidths=0,
                         color=COLOURS[k % len(COLOURS)], alpha=0.75, label=classes[k])
            axes.text(*np.median(rows, 0), classes[k], fontsize=11, fontweight="bold",
                      ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.8,
                                                      "edgecolor": "none", "pad": 1.5})
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("t-SNE 1 (no unit)")
        axes.set_ylabel("t-SNE 2 (no unit)")
        tidy(axes, "both")
    handles, labels = grid[0].get_legend_handles_labels()
    if len(labels) <= 20:
        made.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 10),
                    frameon=False, markerscale=2, title="class")
    return png(made)
