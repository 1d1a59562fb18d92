"""What a profile writes: the trace by its format, the page by its parts, the picture, the text."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from ffengine.engine.memory.meter import KINDS
from ffengine.profile import page, plot, table, trace
from ffengine.profile.spans import Sample
from tests.analysis.profiling import fix_rates, profiled, trainer

VOID = {"meta", "br", "input", "link", "img", "hr"}


@pytest.fixture(scope="module")
def made():
    with pytest.MonkeyPatch.context() as patch:
        fix_rates(patch)
        return profiled(trainer(cuts=[1], tile=[2, 8], budget="2MB"))


@pytest.fixture(scope="module")
def phases():
    """Two phases, without segments: even and odd batches of overlapping updates."""
    with pytest.MonkeyPatch.context() as patch:
        fix_rates(patch)
        return profiled(trainer("trifecta/shallow", image_size=8, in_channels=1,
                                widths=(10, 10, 20, 20, 20, 20)))


def test_the_trace_follows_the_format(made, phases):
    for profile in (made, phases):
        content = json.loads(json.dumps(trace.trace(profile)))
        assert content["displayTimeUnit"] == "ms"
        by_kind: dict[str, list] = {}
        for event in content["traceEvents"]:
            by_kind.setdefault(event["ph"], []).append(event)
        assert set(by_kind) == {"X", "C", "M"}
        assert {e["name"] for e in by_kind["M"]} == {"process_name", "thread_name",
                                                     "thread_sort_index"}
        named = {e["tid"] for e in by_kind["M"] if e["name"] == "thread_name"}
        for event in by_kind["X"]:
            assert event["ts"] >= 0 and event["dur"] >= 0 and event["tid"] in named
            assert {"name", "cat", "pid", "args"} <= event.keys()
        ends = max(e["ts"] + e["dur"] for e in by_kind["X"])
        assert ends == pytest.approx(1e6 * sum(p.seconds for p in profile.phases))
        for event in by_kind["C"]:
            assert set(event["args"]) == set(KINDS) and 0 <= event["ts"] <= ends * (1 + 1e-9)
        assert max(sum(e["args"].values()) for e in by_kind["C"]) == profile.highest.peak.total
        assert [e["ts"] for e in by_kind["C"]] == sorted(e["ts"] for e in by_kind["C"])


def test_events_of_a_track_nest(made, phases):
    for profile in (made, phases):
        tracks: dict[int, list] = {}
        for event in trace.trace(profile)["traceEvents"]:
            if event["ph"] == "X":
                tracks.setdefault(event["tid"], []).append(event)
        for events in tracks.values():
            stack: list[float] = []
            for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
                while stack and stack[-1] <= e["ts"] + 1e-6:
                    stack.pop()
                assert not stack or e["ts"] + e["dur"] <= stack[-1] + 1e-6
                stack.append(e["ts"] + e["dur"])


class Page(HTMLParser):
    """Checks that tags close in order; keeps text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.inside: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        name = dict(attrs).get("id") or tag
        if tag not in VOID:
            self.stack.append(f"{tag} {name}")

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop().split()[0] == tag, tag

    def handle_data(self, data):
        if self.stack:
            key = self.stack[-1].split()[1]
            self.inside[key] = self.inside.get(key, "") + data


def test_the_page_needs_nothing_else(made, phases):
    for profile in (made, phases):
        text = page.page(profile)
        read = Page(text)
        assert not re.search(r"https?:|//[a-z]|@import|url\(", text.split("<script type")[0])
        assert not [value for name, value in read.attributes if name in ("src", "href")]
        assert "{{" not in text.replace("${", "")
        assert read.inside["lead"] == table.headline(profile, profile.highest)
        assert "prefers-color-scheme: dark" in text and text.count("<script") == 2
        assert json.loads(read.inside["data"]) == json.loads(json.dumps(page.values(profile)))
        assert table.text(profile) in read.inside["pre"]


def test_the_page_holds_the_timeline(made):
    data = page.values(made)
    (phase,) = data["phases"]
    totals = [sum(kind[i] for kind in phase["live"]) for i in range(len(phase["t"]))]
    assert max(totals) == phase["peak"]["bytes"] == made.highest.peak.total
    assert phase["t"] == sorted(phase["t"]) and phase["t"][-1] <= phase["end"]
    assert phase["planned"] == made.planned_bytes and data["budget"] == 2_000_000
    assert [s["name"] for s in phase["segments"]] == ["segment 0", "segment 1"]
    assert [s["short"] for s in phase["layers"]] == ["0", "1"] * 4 + ["2", "3"]
    assert phase["layers"][2]["name"] == "layer 0, rows 2-3"
    assert all("MB moved" in s["said"] for s in phase["calls"])


def test_layers_without_a_turn_of_their_own_have_a_lane():
    with pytest.MonkeyPatch.context() as patch:
        fix_rates(patch)
        made = profiled(trainer("fflib/ffrnn", image_size=8, layers=(40, 40)))
    (phase,) = page.values(made)["phases"]
    assert [s["short"] for s in phase["layers"]] == ["0", "1"] * 11  # first sweep and ten frames
    assert len(phase["segments"]) == 10


def test_a_name_cannot_break_the_page(made):
    name = "</script><b>{{data}}"
    phase = dataclasses.replace(made.phases[0], label=name)
    read = Page(page.page(dataclasses.replace(made, model=name, phases=[phase])))
    assert name in read.inside["h1"] and name in read.inside["caption"]
    assert json.loads(read.inside["data"])["phases"][0]["label"] == f"0: {name}"


def test_long_steps_are_thinned_without_losing_the_peak():
    many = [Sample(i / 1000, (1, 2, 3, i % 97, 0)) for i in range(1000)]
    many[507] = Sample(0.507, (1, 2, 3, 4000, 0))
    kept = page.thinned(many, 1.0, 100)
    assert len(kept) <= 102 and many[507] in kept and many[-1] in kept
    assert [s.time for s in kept] == sorted(s.time for s in kept)
    assert page.thinned(many, 1.0, 1000) == many


def test_crowded_lanes_are_joined(made):
    phase = made.phases[0]
    calls = [s for s in phase.spans if s.floor]
    blocks = page.joined(phase, calls, 5)
    assert len(blocks) <= 5 and blocks[0]["begin"] == page.micro(calls[0].begin)
    assert blocks[-1]["end"] == page.micro(calls[-1].end)
    assert all(a["end"] <= b["begin"] for a, b in itertools.pairwise(blocks))


def test_the_picture(made, phases):
    import matplotlib.image

    for profile in (made, phases):
        height, width = matplotlib.image.imread(io.BytesIO(plot.png(profile))).shape[:2]
        assert width > 1200 and height > 900


def test_the_pictures_numbers(made, phases):
    for profile in (made, phases):
        rows = plot.rows_of(profile)
        whole = sum(p.seconds for p in profile.phases)
        assert sum(row.seconds for _, row in rows) == pytest.approx(whole)
        times, live, starts = plot.timeline(profile)
        assert live.sum(0).max() == profile.highest.peak.total and times[-1] == pytest.approx(whole)
        assert len(starts) == len(profile.phases) and live.shape == (len(KINDS), len(times))
    assert set(plot.PART_COLOURS) >= {p for _, r in rows for p in r.parts}
    assert set(plot.KIND_COLOURS) == set(KINDS)


def test_without_matplotlib_one_line_names_it(monkeypatch):
    plot.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install ffengine\[plot\]"):
        plot.check()


def test_the_text(made):
    lines = table.text(made).splitlines()
    assert "budget 2.0 MB" in lines[0] and "GB/s" in lines[1]
    (head,) = [i for i, line in enumerate(lines) if line.split()[:2] == ["layer", "seg"]]
    rows = [line.split() for line in lines[head + 1:head + 5]]
    assert [row[:4] for row in rows] == [["0", "0", "2", "1x8x8"], ["1", "0", "2", "10x8x8"],
                                         ["2", "1", "8", "20x4x4"], ["3", "1", "8", "20x2x2"]]
    assert lines[head + 5].split()[:2] == ["segm.", "0"]
    assert len({len(line) for line in lines[head:head + 9]}) == 1, "columns align"
