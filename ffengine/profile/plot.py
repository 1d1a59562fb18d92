"""A profile as a PNG: seconds of every layer by part, and live memory over time by kind."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np

from ffengine.engine.memory.budget import megabytes
from ffengine.engine.memory.meter import KINDS
from ffengine.profile.spans import Profile, Span, Sum
from ffengine.profile.table import WORDS, place
from ffengine.profile.watch import PARTS

#: Okabe and Ito's colours, which colour-blind readers tell apart.
PART_COLOURS = {"forward": "#0072B2", "sweep": "#E69F00", "update": "#009E73",
                "linear_step": "#56B4E9", "input_gradient": "#CC79A7", "maps": "#F0E442",
                "head": "#D55E00", "rest": "#999999"}
KIND_COLOURS = {"parameter": "#999999", "state": "#56B4E9", "gradient": "#009E73",
                "feature": "#E69F00", "scratch": "#D55E00"}
#: Layers up to which every bar is labelled.
LABELLED = 24


def check() -> None:
    """ValueError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("[profile] profile.png expected matplotlib, got none: pip install "
                         "ffengine[plot], or --no-png")


def png(profile: Profile) -> bytes:
    """The PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    figure.suptitle(f"{profile.model}, batch {profile.batch}, {profile.precision}, "
                    f"on {profile.device}, back-end {profile.backend}", fontsize=14,
                    fontweight="bold")
    _times(above, profile)
    _memory(below, profile)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def rows_of(profile: Profile) -> list[tuple[str, Sum]]:
    """(name, sums over all phases) of every layer, then of what lies outside them."""
    spans: dict[int | None, list[Span]] = {}
    for phase in profile.phases:
        for span in phase.spans:
            spans.setdefault(span.layer, []).append(span)
    layers = sorted(i for i in spans if i is not None)
    return [(str(i), Sum.of(spans[i])) for i in layers] + [("outside", Sum.of(spans[None]))]


def _times(axes: Any, profile: Profile) -> None:
    rows = rows_of(profile)
    at, base = np.arange(len(rows)), np.zeros(len(rows))
    for part in PARTS:
        values = np.array([1e3 * row.parts.get(part, 0.0) for _, row in rows])
        if values.any():
            axes.bar(at, values, 0.72, base, color=PART_COLOURS[part], label=PARTS[part],
                     edgecolor="white", linewidth=0.5)
            base += values
    floors = [1e3 * row.floor for _, row in rows]
    axes.hlines(floors, at - 0.42, at + 0.42, color="black", linewidth=2,
                label="least time at this machine's rates (roofline)")
    if len(rows) <= LABELLED:
        for x, top, (_, row) in zip(at, base, rows, strict=True):
            axes.annotate(f"{100 * row.share:.0f} %", (x, max(top, 1e3 * row.floor)), (0, 3),
                          textcoords="offset points", ha="center", fontsize=9)
    step = -(-len(rows) // LABELLED)
    shown = [i for i in range(len(rows) - 1) if i % step == 0] + [len(rows) - 1]
    axes.set_xticks(shown, [rows[i][0] for i in shown])
    total, seconds = sum(p.total().floor for p in profile.phases), sum(
        p.seconds for p in profile.phases)
    axes.set_title(f"Time by layer{_of_phases(profile)}: {1e3 * seconds:.2f} ms, "
                   f"{100 * total / seconds:.0f} % of the roofline", loc="left")
    axes.set_xlabel("layer")
    axes.set_ylabel("ms")
    axes.margins(x=0.01, y=0.12)
    _tidy(axes)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _of_phases(profile: Profile) -> str:
    return "" if len(profile.phases) == 1 else f", one step of each of {len(profile.phases)} phases"


def _memory(axes: Any, profile: Profile) -> None:
    times, live, starts = timeline(profile)
    base = np.zeros(len(times))
    for kind, row in zip(KINDS, live / 1e6, strict=True):
        if row.any():
            axes.fill_between(times * 1e3, base, base + row, step="post", linewidth=0,
                              color=KIND_COLOURS[kind], label=WORDS[kind])
            base = base + row
    limits = [("planned peak", profile.planned_bytes, "--")]
    if profile.budget is not None:
        limits.append(("budget", profile.budget, "-"))
    for name, level, style in limits:
        axes.axhline(level / 1e6, color="black", linestyle=style, linewidth=1.2,
                     label=f"{name}, {megabytes(level)}")
    _mark_segments(axes, profile, starts)
    _mark_peak(axes, profile, starts, base.max())
    axes.set_xlim(0, times[-1] * 1e3)
    axes.set_ylim(0, max(base.max(), *(level / 1e6 for _, level, _ in limits)) * 1.18)
    axes.set_title(f"Live memory over time{_of_phases(profile)}", loc="left")
    axes.set_xlabel("ms")
    axes.set_ylabel("MB (10⁶ bytes)")
    _tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    kinds = len(handles) - len(limits)  # listed as they are stacked, top first
    axes.legend(handles[:kinds][::-1] + handles[kinds:], labels[:kinds][::-1] + labels[kinds:],
                frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def timeline(profile: Profile) -> tuple[Any, Any, list[float]]:
    """(times (T,), live bytes (kinds, T), where each phase starts), phases one after another."""
    times: list[float] = []
    live: list[tuple[int, ...]] = []
    starts, start = [], 0.0
    for phase in profile.phases:
        starts.append(start)
        times += [start + s.time for s in phase.samples]
        live += [s.live for s in phase.samples]
        start += phase.seconds
    return np.array([*times, start]), np.array([*live, live[-1]], dtype=float).T, starts


def _mark_segments(axes: Any, profile: Profile, starts: list[float]) -> None:
    """Where runs of the plan begin; with several phases, where these do."""
    marks = [(start, f"phase {phase.number}") for start, phase in zip(
        starts, profile.phases, strict=True)]
    if len(starts) == 1:
        phase, tiles = profile.phases[0], profile.phases[0].plan.tile
        marks = [(s.begin, f"segment {s.segment}\ntile {tiles[s.segment or 0]}")
                 for s in phase.spans if s.name == "segment"]
    whole = sum(p.seconds for p in profile.phases)
    for (at, name), (end, _) in zip(marks, [*marks[1:], (whole, "")], strict=False):
        axes.axvline(1e3 * at, color="black", linewidth=0.8, linestyle=":")
        if end - at > 0.055 * whole:
            axes.annotate(name, (500 * (at + end), 0.02), xycoords=("data", "axes fraction"),
                          ha="center", va="bottom", fontsize=9,
                          bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none",
                                "pad": 1.5})


def _mark_peak(axes: Any, profile: Profile, starts: list[float], top: float) -> None:
    phase = profile.highest
    at = 1e3 * (starts[profile.phases.index(phase)] + phase.peak.time)
    right = at < 500 * sum(p.seconds for p in profile.phases)
    axes.plot([at], [top], "v", color="black", markersize=7, clip_on=False)
    axes.annotate(f"peak {megabytes(phase.peak.total)}\n{place(profile, phase)}, "
                  f"{phase.at_peak().name}", (at, top), (10 if right else -10, 12),
                  textcoords="offset points", ha="left" if right else "right", fontsize=9,
                  bbox={"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 1.5})


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
