"""Neurons: mean responses by class, and activation maps in grey and in HSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ffengine.analysis.hsv import Colours, columns_of, grey, shaped
from ffengine.analysis.plots.style import GROWN, OTHER, OWN, figure, png
from ffengine.analysis.responses import LayerSums

#: Class names that stand beside a row; longer ones are cut.
NAME = 12


def responses(title: str, layers: dict[int, LayerSums], classes: dict[int, str],
              neurons: slice = slice(None), grown: Mapping[int, Sequence[int]] | None = None,
              ) -> bytes:
    """Bars of every neuron's mean response: a column a layer, a row a class shown.

    Args:
        layers, classes: what is shown, by index.
        neurons: those shown of each layer.
        grown: neurons that a layer has grown, told apart (support neurons, fig. 4).
    """
    grown = grown or {}
    made = figure(1.6 + 1.02 * len(classes), title)
    grid = made.subplots(len(classes), len(layers), sharex="col", sharey="col", squeeze=False)
    for column, (layer, sums) in enumerate(layers.items()):
        values, sets = sums.mean_response(), sums.set_of()
        shown = range(*neurons.indices(sums.neurons))
        edges = np.arange(shown.start, shown.stop + 1) - 0.5
        for row, (k, name) in enumerate(classes.items()):
            axes = grid[row][column]
            bars = values[k, neurons].numpy()
            axes.stairs(bars, edges, fill=True, color=OTHER)
            if sets is not None:
                own = np.where(sets[neurons].numpy() == k, bars, np.nan)
                axes.stairs(own, edges, fill=True, color=OWN)
            if layer in grown:
                new = np.isin(np.arange(shown.start, shown.stop), grown[layer])
                axes.stairs(np.where(new, bars, np.nan), edges, fill=True, color=GROWN)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0)
            if column == 0:
                axes.set_ylabel(name[:NAME], rotation=0, ha="right", va="center", fontsize=11)
        what = "h" if sums.goodness == "mean" else "h²"
        grid[0][column].set_title(f"layer {layer}: mean of {what}", fontsize=11, loc="left")
        grid[-1][column].set_xlabel("neuron")
    made.supylabel("class of the samples", fontsize=11)
    if any(s.set_of() is not None for s in layers.values()):
        more = (("grown neurons", GROWN),) if set(grown) & set(layers) else ()
        _legend(made, (("own support-neuron set", OWN), ("neurons of other classes", OTHER), *more))
    return png(made)


def _legend(made: Any, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    made.legend(handles=[Patch(color=colour, label=name) for name, colour in entries],
                loc="outside upper right", ncols=len(entries), frameon=False, fontsize=11)


def grey_map(title: str, image: torch.Tensor | None, layers: dict[int, torch.Tensor]) -> bytes:
    """One sample (C, H, W) and its activations (neurons,) by layer, black lowest, white highest."""
    made = figure(6.5, title)
    panels = made.subplots(1, len(layers) + (image is not None), squeeze=False)[0]
    if image is not None:
        axes, panels = panels[0], panels[1:]
        spread = grey(image.flatten()).view_as(image).permute(1, 2, 0).numpy()
        axes.imshow(spread if spread.shape[2] == 3 else spread[..., 0], cmap="gray")
        axes.set_title("input", fontsize=11, loc="left")
        axes.set_axis_off()
    shades = None
    for axes, (layer, h) in zip(panels, layers.items(), strict=True):
        picture = shaped(grey(h)).numpy()
        shades = axes.imshow(picture, cmap=_on_blue("gray"), vmin=0, vmax=1, aspect="auto",
                             interpolation="nearest")
        share = 100 * float((h > 0).double().mean())
        axes.set_title(f"layer {layer}: {len(h)} neurons\n{share:.0f} % active\n"
                       f"h from {float(h.min()):.3g} to {float(h.max()):.3g}", fontsize=11,
                       loc="left")
        _neuron_axes(axes, picture.shape)
    bar = made.colorbar(shades, ax=list(panels), shrink=0.9)
    bar.set_label("activation, between the layer's lowest (0) and highest (1)")
    return png(made)


def _on_blue(name: str) -> Any:
    """A colour map that shows places without a neuron in pale blue."""
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad="#dbe7f3")


def _neuron_axes(axes: Any, shape: tuple[int, ...]) -> None:
    rows, columns = shape[:2]
    step = max(1, -(-rows // 10))
    ticks = list(range(0, rows, step))
    axes.set_yticks(ticks, [str(t * columns) for t in ticks], fontsize=9)
    axes.set_ylabel("first neuron of the row")
    _within_a_row(axes)


def _within_a_row(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("neuron within the row")


def hsv_maps(title: str, layers: dict[int, Colours], classes: Sequence[str]) -> bytes:
    """A column a layer: neurons in their order (FFLib's picture), and sorted by class below it, so
    that place tells what hue tells; there the value's square root shows weak neurons too."""
    made = figure(11.5, title)
    rows = made.subplots(3, len(layers), squeeze=False, height_ratios=[0.32, 5, 5])
    strip = rows[0][0].get_gridspec()
    for axes in rows[0]:
        axes.remove()
    _hues(made.add_subplot(strip[0, :]), classes)
    for column, (layer, found) in enumerate(layers.items()):
        colours = torch.stack([found.hue, found.saturation, found.value], 1)
        clear = 100 * float((found.saturation > 0.5).double().mean())
        above, below = rows[1][column], rows[2][column]
        _hsv(above, colours)
        above.set_title(f"layer {layer}: {len(colours)} neurons\n{clear:.0f} % specialised",
                        fontsize=11, loc="left")
        _neuron_axes(above, shaped(colours).shape)
        order = found.sorted()
        _hsv(below, torch.stack([found.hue, found.saturation, found.value.sqrt()], 1)[order])
        below.set_title(f"layer {layer}: sorted by\nclass, brightened", fontsize=11, loc="left")
        _class_axes(below, found.preferred[order], classes)
    return png(made)


def _hues(axes: Any, classes: Sequence[str]) -> None:
    from matplotlib.colors import hsv_to_rgb

    hue = np.arange(len(classes)) / len(classes)
    axes.imshow(hsv_to_rgb(np.stack([hue, np.ones_like(hue), np.ones_like(hue)], 1))[None],
                aspect="auto")
    step = -(-len(classes) // 20)
    axes.set_xticks(range(0, len(classes), step),
                    [name[:NAME] for name in classes[::step]], fontsize=10)
    axes.set_yticks([])
    axes.set_title("hue: the class a neuron responds to most; pale: to all alike; dark: weakly; "
                   "specialised: one class has over half of its response", fontsize=11, loc="left")


def _hsv(axes: Any, colours: torch.Tensor) -> None:
    from matplotlib.colors import hsv_to_rgb

    picture = shaped(colours).numpy()
    absent = np.isnan(picture).any(2)
    rgb = hsv_to_rgb(np.clip(np.nan_to_num(picture), 0, 1))
    rgb[absent] = 1.0
    axes.imshow(rgb, aspect="auto", interpolation="nearest")


def _class_axes(axes: Any, preferred: torch.Tensor, classes: Sequence[str]) -> None:
    """Each class, with its number of neurons, where they stand."""
    columns = columns_of(len(preferred))
    rows = -(-len(preferred) // columns)
    found = [(name[:NAME], int((preferred == k).sum())) for k, name in enumerate(classes)]
    ticks, names, last, start = [], [], -np.inf, 0
    for name, count in [*found, ("silent", int((preferred < 0).sum()))]:
        middle = (start + count / 2) / columns
        if count and middle - last > rows / 25:  # room for a line of text
            last = middle
            ticks.append(middle - 0.5)
            names.append(f"{name} ({count})")
        if count and start:
            axes.axhline(round(start / columns) - 0.5, color="white", linewidth=0.6)
        start += count
    axes.set_yticks(ticks, names, fontsize=9)
    _within_a_row(axes)
