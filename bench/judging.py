"""Who beats whom in a fair table, the table itself, and the gate."""

from __future__ import annotations

from typing import Any

from bench import machine
from bench.contenders import OTHER_STATISTICS
from bench.problem import Problem
from ffengine.engine.batch import paired
from ffengine.engine.schedules.schedule import Together
from ffengine.nn.differentiable import batch_statistics

#: Most that a step of ours may take over backpropagation's, where it does more arithmetic.
TIME_LIMITS = {"fflib/ffnn": 1.6}
Row = dict[str, Any]


def judged(rows: list[Row], problem: Problem) -> list[Row]:
    """The rows with what they are compared by: the front, and who beats which.

    Gated: single-pass networks without batch statistics (in memory and time together; layer by
    layer: in memory), those with batch statistics (in memory, rows of the whole batch), and what
    TIME_LIMITS names. Networks of positive and negative rows hold two rows a sample.
    """
    ok = [r for r in rows if r["failed"] is None]
    mark_front(ok)
    net = problem.network()
    single, other = not paired(net), batch_statistics(problem.network(f"bp/{problem.model}"))
    together = isinstance(net.schedule or Together(), Together)
    limit = TIME_LIMITS.get(problem.model, 1.0 if single and together and not other else None)
    judges = single or other or limit is not None
    for row in rows:
        row |= {"gated": False, "front": row.get("front", False)}
        if row["kind"] != "bp" or row["failed"] is not None:
            continue
        pieces = row["note"] == OTHER_STATISTICS
        ours = [r for r in ok if r["kind"] == "ffengine"
                and (pieces or r["note"] != OTHER_STATISTICS)]
        row |= {"dominated": any(beats(r, row, 1.0) for r in ours),
                "leaner": any(beats(r, row, None) for r in ours),
                "gated": judges and not pieces, "time_limit": limit,
                "passes": any(beats(r, row, limit) for r in ours)}
    return rows


def beats(ours: Row, row: Row, limit: float | None) -> bool:
    """A plan of ours holds less and takes at most `limit` times as long (None: however long)."""
    if ours["peak_bytes"] >= row["peak_bytes"]:
        return False
    if limit is None:
        return True
    ratio = machine.ratio(ours["rounds"], row["rounds"])
    return ratio < 1.0 if limit == 1.0 else ratio <= limit


def mark_front(rows: list[Row]) -> None:
    """Rows that no other row is at least as good as in memory and time, and better in one."""
    def point(row: Row) -> tuple[float, float]:
        return row["peak_bytes"], row["seconds"]["median"]

    for row in rows:
        p = point(row)
        row["front"] = not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in map(point, rows))


def table(rows: list[Row]) -> str:
    """All rows, MB = 10^6 bytes."""
    ours = next((r for r in rows if r["failed"] is None), None)
    lines = [f"  {'':42s} {'planned':>8s} {'metered':>8s} {'alloc.':>8s} {'working':>8s} "
             f"{'s/step':>8s} {'min..max':>15s} {'img/s':>8s} {'min..max':>15s} {'ours/it':>7s}"]
    for row in rows:
        mark = "* " if row["front"] else "  "
        if row["failed"] is not None:
            lines.append(f"{mark}{row['name']:42s} failed: {row['failed']}")
            continue
        planned = f"{row['planned_bytes'] / 1e6:8.1f}" if row["planned_bytes"] else " " * 8
        memory = " ".join(f"{row[k] / 1e6:8.1f}" for k in (
            "peak_bytes", "allocated_bytes", "working_bytes"))
        numbers = " ".join(f"{v['median']:8.{d}f} {v['min']:7.{d}f}-{v['max']:7.{d}f}"
                           for v, d in ((row["seconds"], 4), (row["images_per_second"], 1)))
        assert ours is not None
        note = f"  {row['note']}" if row["note"] else ""
        beaten = ("  dominated" if row["dominated"] else "  leaner" if row["leaner"] else
                  "  NOT beaten") if row["kind"] == "bp" else ""
        lines.append(f"{mark}{row['name']:42s} {planned} {memory} {numbers} "
                     f"{machine.ratio(ours['rounds'], row['rounds']):7.2f}{beaten}{note}")
    return "\n".join(lines)


def broken(rows: list[Row]) -> bool:
    """Ours does not run at all; a plan that was asked for and does not fit is a row."""
    return any(r["name"] == "ffengine" and r["failed"] is not None for r in rows)


def verdict(rows: list[Row]) -> str:
    """One line: which gated rows none of our plans beats."""
    gated = [r for r in rows if r["gated"]]
    lost = [r["name"] for r in gated if not r["passes"]]
    if broken(rows):
        return f"  our own contender failed: {rows[0]['failed']}"
    if not gated:
        return "  gate: no row is gated"
    limits = {r["time_limit"] for r in gated}
    terms = "in memory" if limits == {None} else "in memory and time" if limits == {1.0} else (
        "in memory, at most " + ", ".join(f"{v:g} x its time" for v in limits if v))
    if lost:
        return f"  gate: {len(gated) - len(lost)} of {len(gated)} beaten {terms}; not {lost}"
    return f"  gate: {len(gated)} of {len(gated)} backpropagation rows beaten {terms}"
