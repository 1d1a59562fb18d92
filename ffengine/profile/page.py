"""A profile as one HTML file that needs nothing else: page.html with its data filled in."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffengine.engine.memory.meter import KINDS
from ffengine.profile import trace
from ffengine.profile.spans import Phase, Profile, Sample, Span, Sum
from ffengine.profile.table import HEADS, HOW, WORDS, headline, text
from ffengine.profile.watch import PARTS

#: More of either are not told apart on a screen: spans of a lane are joined, samples thinned.
MOST_SPANS, MOST_SAMPLES = 4000, 8000


def page(profile: Profile) -> str:
    """The page's text; several phases of a schedule are chosen from on it."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    content = json.dumps(values(profile), separators=(",", ":")).replace("</", "<\\/")
    tables = "\n".join(table(profile, i, phase) for i, phase in enumerate(profile.phases))
    words = {"title": f"{profile.model}, batch {profile.batch}, {profile.precision}, "
                      f"on {profile.device}, back-end {profile.backend}",
             "lead": headline(profile, profile.highest), "how": HOW.format(steps=profile.steps),
             "text": text(profile)}
    filled = {**{k: html.escape(v) for k, v in words.items()}, "data": content, "tables": tables}
    return re.sub(r"\{\{(\w+)\}\}", lambda field: filled[field[1]], template)


def values(profile: Profile) -> dict[str, Any]:
    """What the page's script reads: times in microseconds, memory in bytes."""
    used = {s.part for p in profile.phases for s in p.spans}
    return {"kinds": list(KINDS), "kind_words": WORDS, "part_words": PARTS,
            "parts": [p for p in PARTS if p in used],
            "budget": profile.budget,
            "highest": profile.phases.index(profile.highest),
            "phases": [_phase(profile, p) for p in profile.phases]}


def _phase(profile: Profile, phase: Phase) -> dict[str, Any]:
    samples = thinned(phase.samples, phase.seconds, MOST_SAMPLES)
    lanes = {"segments": [s for s in phase.spans if s.name in ("segment", "frame")],
             "layers": [s for s in phase.spans if s.name == "layer"],
             "calls": [s for s in phase.spans if s.floor]}
    if not lanes["layers"]:  # schedules whose layers have no turn of their own
        lanes["layers"] = turns(lanes["calls"])
    return {"label": f"{phase.number}: {phase.label}", "end": micro(phase.seconds),
            "headline": headline(profile, phase),
            "floor": sum(n for k, n in zip(KINDS, phase.peak.live, strict=True)
                         if k in ("parameter", "state")),
            "planned": phase.plan.peak_bytes,
            "peak": {"t": micro(phase.peak.time), "bytes": phase.peak.total},
            "t": [micro(s.time) for s in samples],
            "live": [[s.live[k] for s in samples] for k in range(len(KINDS))],
            **{name: joined(phase, spans, MOST_SPANS) for name, spans in lanes.items()}}


def micro(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def thinned(samples: Sequence[Sample], end: float, most: int) -> list[Sample]:
    """At most about `most` samples: of each small stretch of time the highest and the last."""
    if len(samples) <= most:
        return list(samples)
    stretches: dict[int, list[Sample]] = {}
    for s in samples:
        stretches.setdefault(int(s.time / end * most / 2) if end else 0, []).append(s)
    kept = []
    for stretch in stretches.values():
        highest = max(stretch, key=lambda s: s.total)
        kept += [highest] if highest is stretch[-1] else [highest, stretch[-1]]
    return kept


def turns(calls: Sequence[Span]) -> list[Span]:
    """A span for each stretch of calls that belong to one layer."""
    made: list[Span] = []
    for call in calls:
        if call.layer is None:
            continue
        if made and made[-1].layer == call.layer:
            made[-1].end = call.end
        else:
            made.append(Span("layer", call.part, -1, call.layer, call.segment, call.tile,
                             call.begin, call.end))
    return made


def joined(phase: Phase, spans: Sequence[Span], most: int) -> list[dict[str, Any]]:
    """At most `most` blocks of a lane, neighbours joined where there are more."""
    several = -(-len(spans) // most) if spans else 1
    made = []
    for start in range(0, len(spans), several):
        block = spans[start:start + several]
        first, last = block[0], block[-1]
        name = trace.title(phase, first)
        if len(block) > 1:
            name += f" to {trace.title(phase, last)} ({len(block)})"
        elif first.tile is not None and first.name == "layer":
            name += f", rows {first.tile[0]}-{sum(first.tile) - 1}"
        short = str(first.layer) if first.name == "layer" else name
        made.append({"name": name, "short": short, "part": first.part,
                     "begin": micro(first.begin), "end": micro(last.end), "said": said(block)})
    return made


def said(block: Sequence[Span]) -> str:
    """What a call moves and computes, in words."""
    total = Sum.of(block)
    if not total.floor:
        return ""
    seconds = sum(s.seconds for s in block)
    share = f", {100 * total.floor / seconds:.0f} % of the roofline" if seconds else ""
    return (f"{total.bytes / 1e6:.3f} MB moved, {total.flops / 1e6:.2f} MFLOP{share}, bound by "
            f"{total.bound}")


def table(profile: Profile, index: int, phase: Phase) -> str:
    """One line a layer, as HTML."""
    total = phase.total()
    parts = [p for p in HEADS if p in total.parts]
    heads = ["layer", "segment", "rows a tile", "input", "MFLOP", "MB moved",
             *(f"{HEADS[p]} ms" for p in parts), "ms", "roofline", "bound by", "peak MB"]
    rows = [[str(i), _or_dash(phase.segment_of(i)), str(phase.tile_of(i) or profile.rows),
             "x".join(map(str, profile.shapes[i])), *_cells(row, parts)]
            for i, row in phase.by_layer().items()]
    rows += [["outside", "", "", "", *_cells(phase.outside(), parts)],
             ["all", "", "", "", *_cells(total, parts)]]
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>'
                     + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return (f'<div class="wide" data-phase="{index}"><table><caption>'
            f"{html.escape(phase.label)}: {1e3 * phase.seconds:.2f} ms a step</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>")


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _cells(row: Sum, parts: list[str]) -> list[str]:
    times = [f"{1e3 * row.parts[p]:.3f}" if p in row.parts else "" for p in parts]
    return [f"{row.flops / 1e6:.1f}", f"{row.bytes / 1e6:.2f}", *times, f"{1e3 * row.seconds:.3f}",
            f"{100 * row.share:.0f} %", row.bound, f"{row.peak_bytes / 1e6:.2f}"]
