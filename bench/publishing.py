"""What a results page may show: at least three timing rounds of every row of ours, from a commit.

What falls short is left out and listed with the reason, so that it can be measured anew. A file
that holds many trainings loses those whose tree had uncommitted changes, and keeps the others.
"""

from __future__ import annotations

from typing import Any

from ffengine.commands.reproduction.results import rows_in

#: Timing rounds that every row of ours must have.
LEAST_ROUNDS = 3
#: Exact values that the gate compares again at every change: written beside the change they are of.
EXACT = ("counters",)

Content = dict[str, Any]


def left_out(content: Content) -> str | None:
    """Why the numbers of a result file, or of the facts and rows of a GPU run, are not shown."""
    reasons = []
    if content["machine"]["dirty"] and content["kind"] not in EXACT:
        reasons.append("the tree had uncommitted changes")
    rows = content.get("rows")
    few = [(len(r["rounds"]), r["name"]) for r in rows if r.get("kind") == "ffengine"
           and not r.get("failed") and len(r.get("rounds", ())) in range(1, LEAST_ROUNDS)
           ] if isinstance(rows, list) else []
    if few:
        count, name = min(few)
        reasons.append(f"{count} timing round{'s' if count > 1 else ''} of `{name}`, expected "
                       f"{LEAST_ROUNDS}")
    return "; ".join(reasons) or None


def committed(content: Content) -> Content:
    """The file with only those of its trainings that ran from a commit; the file itself if that
    is all or none of them."""
    if content["kind"] == "variants":
        name, trainings = "runs", content["runs"]
        machines = [[run["machine"]] for run in trainings]
    elif content["kind"] == "reproduction":
        name, trainings = "rows", rows_in(content)
        machines = [row["machines"] for row in trainings]
    else:
        return content
    kept = [(training, facts) for training, facts in zip(trainings, machines, strict=True)
            if not any(f["dirty"] for f in facts)]
    if not kept:
        return content
    return {**content, name: [training for training, _ in kept], "machine": kept[-1][1][-1],
            "omitted": len(trainings) - len(kept)}


def again(content: Content) -> str | None:
    """The command that measures a fair table anew; None for another kind."""
    if content["kind"] != "fair":
        return None
    authors = any(row["kind"] == "authors" for row in content["rows"])
    return (f"python -m bench.fair {content['model']} --batch-size {content['batch']} --precision "
            f"{content['precision']}" + " --authors PATH" * authors)
