"""Pictures of measured results; matplotlib is only needed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: On white and on dark pages: text, ours, theirs (Okabe and Ito's palette, safe for colour-blind).
GREY, OURS, THEIRS = "#7d838a", "#e69f00", "#0a7fc2"
#: Colour and marker of a kind of row.
STYLES = {"ffengine": ("#c1272d", "o"), "authors": ("#7b5ea7", "D"), "eager": ("#e59f24", "s"),
          "bp": ("#3b6ea5", "^")}
KINDS = {"ffengine": "ffengine", "authors": "authors' code", "eager": "unfused FF step",
         "bp": "backpropagation"}


def pyplot() -> Any:
    """matplotlib.pyplot without a display; ValueError naming what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("[plot] expected matplotlib: pip install ffengine[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def memory_against_time(path: Path, values: dict[str, Any]) -> None:
    """PNG of bench.fair's rows: peak MB against seconds a step, both log, the front drawn."""
    plt = pyplot()
    from matplotlib import ticker

    rows = [r for r in values["rows"] if r["failed"] is None]
    figure, axes = plt.subplots(figsize=(9.5, 6), dpi=120)
    for kind, (colour, marker) in STYLES.items():
        mine = [r for r in rows if r["kind"] == kind]
        if mine:
            x, y = ([r["seconds"]["median"] for r in mine], [r["peak_bytes"] / 1e6 for r in mine])
            spread = [[m - r["seconds"]["min"] for m, r in zip(x, mine, strict=True)],
                      [r["seconds"]["max"] - m for m, r in zip(x, mine, strict=True)]]
            axes.errorbar(x, y, xerr=spread, fmt=marker, color=colour, markersize=7, elinewidth=1,
                          label=KINDS[kind], zorder=3)
    front = sorted((r["seconds"]["median"], r["peak_bytes"] / 1e6) for r in rows if r["front"])
    axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1.2, zorder=1,
              label="Pareto front")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(
            ticker.LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)) if high > 5 * low
            else ticker.MaxNLocator(8))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(x=0.2, y=0.1)
    axes.grid(True, which="major", color="0.92", zorder=0)
    axes.set_xlabel("seconds a step (median; bars: smallest and largest)")
    axes.set_ylabel("peak of a step, MB (metered)")
    axes.set_title(f"{values['model']}, batch {values['batch']}, {values['precision']}, "
                   f"{values['optimizer']}", loc="left")
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="best")
    figure.tight_layout()
    label(figure, axes, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def headline(path: Path, network: str, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """SVG without a background: peak memory and time of one step, a bar for each (name, row).

    Grey text and the two colours stand out on white and on dark pages, and differ in lightness for
    those who do not see colours. Text stays text, so that it can be searched.
    """
    plt = pyplot()
    places = list(range(len(rows)))[::-1]
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "ffengine", "font.family": "sans-serif",
             "text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    with plt.rc_context(fixed):
        figure, (memory, time) = plt.subplots(1, 2, figsize=(8.6, 1.0 + 0.42 * len(rows)),
                                              sharey=True)
        colours = [OURS if row["kind"] == "ffengine" else THEIRS for _, row in rows]
        held = [(row["parameter"] + row["state"]) / 1e6 for _, row in rows]
        peaks = [row["peak_bytes"] / 1e6 for _, row in rows]
        times = [row["seconds"]["median"] for _, row in rows]
        memory.barh(places, held, height=0.6, color=GREY, alpha=0.55)
        memory.barh(places, [p - h for p, h in zip(peaks, held, strict=True)], left=held,
                    height=0.6, color=colours)
        time.barh(places, times, height=0.6, color=colours)
        for axes, bars, text in ((memory, peaks, "{:.1f} MB"), (time, times, "{:.2f} s")):
            for place, bar, (_, row) in zip(places, bars, rows, strict=True):
                axes.annotate(text.format(bar), (bar, place), xytext=(4, 0), va="center",
                              textcoords="offset points", fontsize=10,
                              fontweight="bold" if row["kind"] == "ffengine" else "normal")
            axes.set_xlim(0, 1.28 * max(bars))
            axes.set_xticks([])
            axes.tick_params(axis="y", length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        memory.set_yticks(places, [name for name, _ in rows], fontsize=10)
        memory.set_title("peak memory (grey: weights, optimizer states)", loc="left",
                         fontsize=9)
        time.set_title("time", loc="left", fontsize=9)
        figure.suptitle(f"One training step of {network}", x=0.012, y=0.97,
                        ha="left", fontsize=11)
        figure.tight_layout()
        figure.savefig(path, format=path.suffix[1:], transparent=True,
                       metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def label(figure: Any, axes: Any, rows: list[dict[str, Any]]) -> None:
    """A name beside every point, moved up or down until it covers no other name and no point."""
    from matplotlib import patheffects

    figure.canvas.draw()
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    places = [(r["seconds"]["median"], r["peak_bytes"] / 1e6) for r in rows]
    points = [tuple(axes.transData.transform(place)) for place in places]
    taken: list[Any] = []

    def written(name: str, place: tuple[float, float], at: tuple[float, float],
                colour: str) -> Any:
        line = {"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "shrinkB": 4}
        return axes.annotate(
            name, place, xytext=at, textcoords="offset points", fontsize=7.5, color=colour,
            ha="left" if at[0] > 0 else "right", va="center", path_effects=halo, zorder=4,
            arrowprops=line if abs(at[1]) > 12 else None)

    for row, place, point in sorted(zip(rows, places, points, strict=True),
                                    key=lambda found: -found[2][1]):
        name, colour = row["name"].removeprefix("bp "), STYLES[row["kind"]][0]
        for at in offsets():
            text = written(name, place, at, colour)
            box = text.get_window_extent(renderer)
            inside = frame.x0 + 2 < box.x0 and box.x1 < frame.x1 and box.y0 > frame.y0
            hidden = any(box.overlaps(b) for b in taken) or any(
                box.x0 - 5 < x < box.x1 + 5 and box.y0 - 5 < y < box.y1 + 5
                for x, y in points if (x, y) != point)
            if inside and not hidden:
                break
            text.remove()
        else:
            box = written(name, place, offsets()[0], colour).get_window_extent(renderer)
        taken.append(box)


def offsets() -> list[tuple[float, float]]:
    """Where a label may stand, in points from its point, nearest first."""
    return [(side * 7, step * 7) for step in (1, -1, 0, 2, -2, 3, -3, 4, -4, 6, -6, 8, -8, 10, -10)
            for side in (1, -1)]
