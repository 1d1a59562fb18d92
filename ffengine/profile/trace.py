"""A profile in the Chrome trace event format, for Perfetto (ui.perfetto.dev) or chrome://tracing.

Spans are complete events (ph X) on one track for the step and one each for segments, layers and
ops; live bytes are counters (ph C); metadata (ph M) names the tracks. Times in microseconds.
"""

from __future__ import annotations

from typing import Any

from ffengine.engine.memory.meter import KINDS
from ffengine.profile.spans import Phase, Profile, Span

PROCESS = 1
TRACKS = {"step": 1, "segments": 2, "layers": 3, "ops": 4}


def trace(profile: Profile) -> dict[str, Any]:
    """The trace as a JSON object; steps of several phases follow each other."""
    events = [_meta("process_name", 0, {"name": f"ffengine profile {profile.model}"})]
    for name, track in TRACKS.items():
        events += [_meta("thread_name", track, {"name": name}),
                   _meta("thread_sort_index", track, {"sort_index": track})]
    start = 0.0
    for phase in profile.phases:
        events += [_complete(phase, s, start) for s in phase.spans]
        events += [_counter(start + s.time, dict(zip(KINDS, s.live, strict=True)))
                   for s in phase.samples]
        start += phase.seconds
    events.append(_counter(start, dict(zip(KINDS, profile.phases[-1].samples[-1].live,
                                           strict=True))))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {
        "model": profile.model, "batch": profile.batch, "precision": profile.precision,
        "device": profile.device, "planned_peak_bytes": profile.planned_bytes}}


def _meta(name: str, track: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": PROCESS, "tid": track, "args": args}


def _counter(seconds: float, live: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": "live bytes", "pid": PROCESS, "tid": 0, "ts": 1e6 * seconds,
            "args": live}


def track_of(span: Span) -> str:
    """Where a span is drawn: scopes have tracks of their own, ops and the rest one together."""
    return {"step": "step", "segment": "segments", "frame": "segments", "layer": "layers"}.get(
        span.name, "ops")


def title(phase: Phase, span: Span) -> str:
    """What a span is called."""
    if span.name == "step":
        return f"step: {phase.label}"
    if span.name == "segment":
        return f"segment {span.segment}"
    where = "" if span.layer is None else f"layer {span.layer}"
    if span.name == "layer":
        return where
    return f"{where} {span.name}".strip()


def _complete(phase: Phase, span: Span, start: float) -> dict[str, Any]:
    args: dict[str, Any] = {"part": span.part, "peak_bytes": span.peak_bytes}
    for name in ("layer", "segment"):
        if getattr(span, name) is not None:
            args[name] = getattr(span, name)
    if span.tile is not None:
        args["rows"] = f"{span.tile[0]}-{sum(span.tile) - 1}"
    if span.floor:
        args |= {"bytes_moved": span.bytes, "flops": span.flops, "bound_by": span.bound,
                 "floor_us": 1e6 * span.floor}
        if span.seconds > 0:
            args["roofline_share"] = span.floor / span.seconds
    return {"ph": "X", "name": title(phase, span), "cat": span.part, "pid": PROCESS,
            "tid": TRACKS[track_of(span)], "ts": 1e6 * (start + span.begin),
            "dur": 1e6 * span.seconds, "args": args}
