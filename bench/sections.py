"""Result files as Markdown: a title in words and a table for every kind of measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import states, variants
from bench.markdown import brief, mega, quantity, table
from ffengine.commands.reproduction import tables
from ffengine.commands.reproduction.results import rows_in

Content = dict[str, Any]


def fair(content: Content) -> list[str]:
    def row(r: Content) -> list[str]:
        mark = "**" if r["kind"] == "ffengine" else ""
        name = f"{'★ ' if r.get('front') else ''}{mark}{r['name']}{mark}"
        if r.get("failed"):
            return [name, *[""] * 6, f"failed: {r['failed']}"]
        beaten = {True: "dominated", False: "leaner" if r.get("leaner") else "no"}
        return [name, mega(r.get("planned_bytes")), mega(r["peak_bytes"]),
                mega(r["allocated_bytes"]), mega(r["working_bytes"]), quantity(r.get("seconds")),
                quantity(r.get("images_per_second"), digits=1),
                "; ".join(filter(None, (
                    beaten[r["dominated"]] if "dominated" in r else "",
                    "not gated" if r["kind"] == "bp" and r.get("gated") is False else "",
                    r.get("note"))))]

    floor, error = content["floor_seconds"], content["gradient_error"]
    return [f"{content['model']}, batch {content['batch']}, {content['precision']}, "
            f"{content['optimizer']}; gradients within {error:.1e} of fp64"
            + (f"; {content['step']}" if "step" in content else "")
            + (f"; {content['clock']}" if content.get("clock", "seconds") != "seconds" else "")
            + (f". Floor by copy and product rates: {floor:.4f} s" if floor else "") + ".", "",
            *table(["★ on the Pareto front", "planned MB", "metered MB", "allocated MB",
                    "working MB", "s/step (min–max)", "images/s (min–max)", "beaten by ours"],
                   map(row, content["rows"]))]


def fflib(content: Content) -> list[str]:
    step = content["step"]
    said = f"A training step of FFNN 784-2000-2000, batch {content['batch']}: " + ", ".join(
        f"{name} {quantity(s, 1e3, 1)} ms" for name, s in step.items())
    gain = f"; {content['gain']:.2f} × the authors' speed" if "gain" in content else ""
    return [said + gain + ". Prediction, all labels in one pass against one forward a label:", "",
            *table(["images", "batched, ms", "one by one, ms", "gain", "extra MB"], (
                [str(r["images"]), quantity(r["batched"], 1e3, 2),
                 quantity(r["one by one"], 1e3, 2), f"{r['gain']:.2f}", mega(r["extra_bytes"])]
                for r in content["prediction"]))]


def rates(content: Content) -> list[str]:
    """The device's own rates, and steps against the floor they give and what was predicted."""
    device = content["device"]
    figures = ", ".join(f"{name} {brief(figure['value'])}"
                        for name, figure in device["figures"].items() if "value" in figure)
    over = "; ".join(f"{p} {brief(s)}" for p, s in content["ratios"].items())
    return [f"{device.get('title', '')}: {figures}. Measured over floor: {over}.", "",
            *table(["", "batch", "precision", "floor, ms", "predicted, ms", "measured, ms",
                    "over floor", "planned MB", "metered MB"], (
                [r["model"], str(r["batch"]), r["precision"], f"{1e3 * r['floor_seconds']:.2f}",
                 f"{1e3 * r['expected_seconds']:.2f}", quantity(r["seconds"], 1e3, 2),
                 f"{r['ratio']:.2f}", mega(r["planned_bytes"]), mega(r["metered_bytes"])]
                for r in content["rows"]))]


def digits(content: Content) -> list[str]:
    means = content["means"]
    return [f"{content['model']} on the bundled digits, {content['epochs']} epochs; mean: ffengine "
            f"{100 * means['ffengine']:.2f} %, unfused {100 * means['unfused']:.2f} %.", "",
            *table(["seed", "ffengine, %", "unfused, %", "ffengine, s", "unfused, s"], (
                [str(r["seed"]), *(f"{100 * r[k]:.2f}" for k in ("ffengine", "unfused")),
                 *(f"{r[f'{k}_seconds']:.1f}" for k in ("ffengine", "unfused"))]
                for r in content["rows"]))]


def sweeps(content: Content) -> list[str]:
    """local_pass and batch_pass: layouts of rows, ours against eager."""
    asked = ", ".join(f"{k} {content[k]}" for k in ("batch", "precision", "dropout", "order")
                      if k in content)
    lines = [f"{asked}; ms."]
    for layout, made in content.items():
        if not isinstance(made, dict) or "rows" not in made:
            continue
        lines += ["", f"{layout}: ours {1e3 * made['ours']:.1f} ms in all, eager "
                  f"{1e3 * made['eager']:.1f}, × {made['speedup']:.1f}.", "",
                  *table(["shape", "ours", "eager", "speed-up", "GB/s"], (
                      ["×".join(map(str, r["shape"])) + (" pool" if r.get("pools") else ""),
                       quantity(r["ours"], 1e3, 2), quantity(r["eager"], 1e3, 2),
                       f"{r['speedup']:.1f}", f"{r['gb_per_s']:.1f}"] for r in made["rows"]))]
    return lines


def dense(content: Content) -> list[str]:
    rows, features, out = content["shape"]
    return [f"{rows} × {features} → {out}, {content['dtype']}, tiles of {content['tile_rows']} "
            f"rows; {mega(content['bytes_moved'])} MB must move.", "",
            *table(["", "ms", "ours is faster", "MB beside input, weights, states"], (
                [name, quantity(s, 1e3, 1), f"{s['ours_is_faster']:.2f}", mega(s["working_bytes"])]
                for name, s in content["sides"].items()))]


def counter_parts(content: Content) -> list[str]:
    """What the gate holds every change to: how many rows, of what, and the totals."""
    def row(name: str, part: Content) -> list[str]:
        if "absent" in part:
            return [name, "", "", part["absent"]]
        totals: dict[str, int] = {}
        for counters in part["rows"].values():
            for counter, value in counters.items():
                if isinstance(value, int):
                    totals[counter] = totals.get(counter, 0) + value
        return [name, ", ".join(f"{k} {v}" for k, v in part["needs"].items()),
                str(len(part["rows"])), ", ".join(f"{k} {v:,}" for k, v in totals.items())]

    return ["The regression gate's baseline; every counter at 0 %. Sums over the rows:", "",
            *table(["part", "of", "rows", "sums"],
                   (row(*part) for part in content["parts"].items()))]


def repeats(content: Content) -> list[str]:
    runs = content["runs"]
    seconds = sorted(r["seconds"] for r in runs)
    cases = [row for r in runs for row in r["rows"]]
    looks = sum("ratio" in row for row in cases)
    over = sum(r["first_looks_over"] for r in runs)
    worst = max((row["ratio"] for row in cases if "ratio" in row), default=0.0)
    return [f"The gate's timing part, {len(runs)} times over: **{content['alarms']} alarms**; "
            f"{looks} of {len(cases)} cases timed, {over} first looks over their threshold, "
            f"largest ratio {worst:.3f}; {seconds[0]:.0f} to {seconds[-1]:.0f} s a run."]


def state_curves(content: Content) -> list[str]:
    curves = content["curves"]["fp32"]
    return [f"{content['model']}, batch {content['batch']}, {content['precision']}, "
            f"{len(curves)} seeds, {len(curves[0])} steps on class prototypes plus noise. Training "
            f"with optimizer states in", "", *(f"- {line}" for line in states.said(content))]


def reproduction(content: Content) -> list[str]:
    return ["The papers' numbers beside ours; `docs/reproduction.md` has them with pictures.", "",
            *table(list(tables.HEAD), map(tables.cells, rows_in(content)))]


def plain(content: Content) -> list[str]:
    """Any other file: its values, and its rows where it has some."""
    skipped = ("kind", "format", "version", "machine", "checksum")
    values = {k: v for k, v in content.items() if k not in skipped}
    rows = values.pop("rows", None)
    if isinstance(rows, dict) and all(isinstance(r, dict) for r in rows.values()):
        rows = [{"row": name, **r} for name, r in rows.items()]
    lines = [f"- {k}: {brief(v)}" for k, v in values.items()]
    if isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows):
        head = list(dict.fromkeys(k for r in rows for k in r))
        lines += ["", *table(head, ([brief(r.get(k)) for k in head] for r in rows))]
    return lines


SECTIONS: dict[str, Callable[[Content], list[str]]] = {
    "fair": fair, "fflib": fflib, "digits": digits, "local_pass": sweeps, "batch_pass": sweeps,
    "linear_step": dense, "counters": counter_parts,
    "gate_repeats": repeats, "devices": rates, "states-curves": state_curves,
    "reproduction": reproduction,
    "variants": lambda content: [variants.markdown(content["runs"])],
}


def machine_name(content: Content) -> str:
    """The hardware in a title: a GPU's name, or the instruction set and the threads."""
    facts = content["machine"]
    threads = facts["threads"]
    return str(facts["gpu"] or f"{facts['isa']}, {threads} thread{'s' if threads > 1 else ''}")


def title(content: Content, name: str) -> str:
    """A heading in words; `name` for a kind that has none."""
    words = TITLES.get(content["kind"])
    return name if words is None else words.format(
        **content, on=machine_name(content), stem=name.rpartition("/")[2],
        dropped=f", dropout {content['dropout']:g}" if content.get("dropout") else "")


#: Headings, filled from a file's values.
TITLES = {
    "fair": "{model}, batch {batch}, {precision}, on {on}",
    "fflib": "FFLib's FFNN beside its authors' code, and prediction by all labels",
    "digits": "{model} on the bundled digits, fused and unfused",
    "variants": "Every model on the bundled digits",
    "local_pass": "local_pass on a ResNet-17's layers, batch {batch}, {precision}{dropped}",
    "batch_pass": "batch_pass: layers with batch statistics, batch {batch}, {precision}",
    "linear_step": "linear_step: a dense layer on a full batch, {dtype}",
    "weight_update": "weight_update: gradient and optimizer as one act",
    "states-sweep": "Optimizer states in fewer bits: time of an update",
    "states-curves": "Optimizer states in fewer bits: loss curves of {model}",
    "devices": "Training steps against the floor that this machine's rates give",
    "counters": "Exact counters that every change is held to, {stem}",
    "gate_repeats": "How often the gate's timing raises a false alarm",
    "reproduction": "The papers' numbers beside ours",
    "gpu step": "Training steps", "gpu local_pass": "local_pass on cold data",
    "gpu smoke": "How the run went", "gpu ncu": "Counters of the hardware",
}
