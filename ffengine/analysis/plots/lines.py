"""Curves: over layers, over epochs or steps, and over the values of a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffengine.analysis.plots.style import figure, line_of, png, tidy

Line = tuple[Sequence[float], Sequence[float | None]]
#: Points up to which every one is marked.
MARKED = 40


def panels(title: str, panels_: Mapping[str, Mapping[str, Line]], xlabel: str,
           ylabels: Mapping[str, str], *, whole: bool = False, log: bool = False) -> bytes:
    """A panel a quantity, two a row; in each a line a name.

    Args:
        panels_: lines (x, y) by panel and name; None is a gap.
        ylabels: unit of a panel, where its name does not say it.
        whole: x are whole numbers (layers, epochs).
        log: a logarithmic x axis.
    """
    columns = 1 if len(panels_) == 1 else 2
    rows = -(-len(panels_) // columns)
    made = figure(1.0 + 4.0 * rows, title)
    grid = made.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, lines) in zip(grid, panels_.items(), strict=False):
        for i, (label, (x, y)) in enumerate(lines.items()):
            style = line_of(i)
            if len(x) > MARKED:
                style["markevery"] = len(x) // 10
            axes.plot(x, [float("nan") if v is None else v for v in y], label=label, **style)
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabels.get(name, name))
        if log:
            axes.set_xscale("log")
        if whole:
            axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
    for axes in grid[len(panels_):]:
        axes.set_axis_off()
    _one_legend(made, grid, list(panels_.values()))
    return png(made)


def _one_legend(made: Any, grid: Sequence[Any], lines: Sequence[Mapping[str, Line]]) -> None:
    """One for all panels where they show the same lines, else one each."""
    if all(list(these) == list(lines[0]) for these in lines):
        if len(lines[0]) > 1:
            handles, labels = grid[0].get_legend_handles_labels()
            made.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5),
                        frameon=False, fontsize=10)
        return
    for axes, these in zip(grid, lines, strict=False):
        if len(these) > 1:
            axes.legend(frameon=False, fontsize=9)


def removals(title: str, values: Sequence[float], accuracy: Sequence[float],
             counts: Sequence[int], whole: float, xlabel: str, ylabel: str) -> bytes:
    """Accuracy after removals, each point with the number of neurons removed; dashed: before.

    Values that are those numbers lie on a scale, others (fractions, close to 0) side by side.
    """
    made = figure(5.4, title)
    axes = made.subplots()
    at = list(values) if list(values) == list(counts) else list(range(len(values)))
    axes.axhline(whole, color="black", linestyle="--", linewidth=1.2, label="before any removal")
    axes.plot(at, accuracy, label="after it; below: neurons removed", **line_of(0))
    for x, y, count in zip(at, accuracy, counts, strict=True):
        axes.annotate(str(count), (x, y), (0, -16), textcoords="offset points", ha="center",
                      fontsize=10)
    axes.set_xticks(at, [f"{v:g}" for v in values])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.margins(y=0.15)
    tidy(axes)
    made.legend(loc="outside lower center", ncols=2, frameon=False)
    return png(made)


def bars(title: str, groups: Mapping[str, Mapping[str, tuple[float, float]]],
         ylabel: str) -> bytes:
    """Bars of (mean, sd) by group and name, side by side."""
    made = figure(5.4, title)
    axes = made.subplots()
    names = list(dict.fromkeys(n for group in groups.values() for n in group))
    wide = 0.8 / len(names)
    for j, name in enumerate(names):
        at = [i + (j - (len(names) - 1) / 2) * wide for i, g in enumerate(groups.values())
              if name in g]
        values = [g[name] for g in groups.values() if name in g]
        axes.bar(at, [m for m, _ in values], wide * 0.94, label=name, color=line_of(j)["color"],
                 yerr=[s for _, s in values] if any(s for _, s in values) else None, capsize=2,
                 hatch=("", "//", "..", "xx")[j % 4], edgecolor="white")
        for x, (m, _) in zip(at, values, strict=True):
            if len(groups) * len(names) <= 24:
                axes.annotate(f"{m:.3f}", (x, m), (0, 3), textcoords="offset points", ha="center",
                              fontsize=9)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=11)
    axes.set_ylabel(ylabel)
    axes.margins(y=0.12)
    tidy(axes)
    made.legend(loc="outside lower center", ncols=min(len(names), 8), frameon=False)
    return png(made)
