"""Curves over seeds: the mean, a shade of one standard deviation, dashed extremes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ffengine.analysis.plots.style import figure, line_of, png, tidy
from ffengine.analysis.prunability import Spread


def bands(title: str, curves: Mapping[str, Sequence[Spread]]) -> bytes:
    """Accuracy against compression ratio, a curve a name."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    made = figure(6.4, title)
    axes = made.subplots()
    for i, (name, rows) in enumerate(curves.items()):
        style, x = line_of(i), [r.compression for r in rows]
        axes.plot(x, [100 * r.mean for r in rows], label=name, **style)
        axes.fill_between(x, [100 * (r.mean - r.deviation) for r in rows],
                          [100 * min(1, r.mean + r.deviation) for r in rows],
                          color=style["color"], alpha=0.18, linewidth=0)
        for extreme in ("least", "most"):
            axes.plot(x, [100 * getattr(r, extreme) for r in rows], "--", color=style["color"],
                      linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({r.ratio for rows in curves.values() for r in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("compression ratio, parameter bytes before / after (line: mean, shade: ± one "
                    "standard deviation, dashed: smallest and largest)")
    axes.set_ylabel("accuracy on test data, %")
    tidy(axes)
    made.legend(loc="outside lower center", ncols=3, frameon=False)
    return png(made)
