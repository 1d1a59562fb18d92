"""What all pictures share: size, colours that colour-blind readers tell apart, plain axes."""

from __future__ import annotations

import io
from typing import Any

from ffengine.needs import need

#: Okabe and Ito's colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
OWN, OTHER, GROWN = "#D55E00", "#7F98AD", "#000000"
#: Never told apart by colour alone.
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")
STYLES = ("-", "--", "-.", ":")
#: Inches, at so many dots each: 1200 pixels.
WIDTH, DPI = 12.0, 100


def figure(height: float, title: str) -> Any:
    """An empty figure of WIDTH by `height` inches."""
    need("matplotlib", "[analyze] a picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    return made


def png(made: Any) -> bytes:
    """The figure's file."""
    file = io.BytesIO()
    made.savefig(file, format="png")
    return file.getvalue()


def tidy(axes: Any, grid: str = "y") -> None:
    """No box, a pale grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def line_of(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the index-th line."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)],
            "linestyle": STYLES[index // len(COLOURS) % len(STYLES)], "markersize": 5}
