"""Devices by their data sheets: memory, bandwidth and arithmetic rates, each with its source.

Bundled ones are ffengine/devices/NAME.toml; a user's own file has the same form (`template`). The
numbers are what vendors print, read from the documents they name; a number that no document gives
says how it was derived, or that it is assumed. Rates of tensor cores are dense, at the boost clock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ffengine import env
from ffengine.devices.rates import Rates, machine_rates
from ffengine.engine.run.settings import PRECISIONS
from ffengine.tables import Expected, flag, mapping, number, one_of, read, table, text

FOLDER = Path(__file__).parent
#: Measured steps over their floors, by device type: written by `python -m bench.devices`.
MEASURED = FOLDER / "measured.json"
#: What a source may begin with instead of a key of [sources].
OWN_WORD = ("derived", "assumed", "measured")
#: Keys of [figures].
REQUIRED = ("memory_bytes", "usable", "bytes_per_second", "launch_seconds")
OPTIONAL = ("sm_count", "cuda_cores", "clock_hz", "watts")


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    source: str = "not given"


@dataclass(frozen=True)
class Device:
    """A device profile.

    figures: memory_bytes, usable (the share of it that a training step may hold), bytes_per_second,
    launch_seconds (from one kernel to the next), and where known sm_count, cuda_cores, clock_hz
    and watts. flops_per_second: by precision, dense; a multiply-add is two. kind: torch's device
    type. prediction_only: nothing here runs on it; `note` says why.
    """

    name: str
    title: str
    figures: Mapping[str, Figure]
    flops_per_second: Mapping[str, Figure]
    sources: Mapping[str, str] = field(default_factory=dict)
    kind: str = "cuda"
    mode: str = ""
    compute_capability: str = ""
    reported_as: str = ""
    prediction_only: bool = False
    note: str = ""

    def value(self, name: str) -> float:
        """A figure that every profile has."""
        return self.figures[name].value

    @property
    def usable_bytes(self) -> int:
        """What a training step may hold."""
        return int(self.value("memory_bytes") * self.value("usable"))

    def rates(self, precision: str) -> Rates:
        """Bytes and FLOP per second, for training in `precision`.

        Raises:
            ValueError: the device has no rate for it.
        """
        if precision not in self.flops_per_second:
            raise ValueError(f"[device] {self.name} has no {precision} rate; known: "
                             f"{', '.join(self.flops_per_second)}")
        known = {PRECISIONS[p]: f.value for p, f in self.flops_per_second.items()
                 if p in PRECISIONS}
        return Rates(self.value("bytes_per_second"), known, self.value("launch_seconds"))

    def values(self) -> dict[str, Any]:
        """Everything, sources included, as plain values."""
        return {**asdict(self), "usable_bytes": self.usable_bytes}


def names() -> list[str]:
    """The bundled devices, the smallest memory first."""
    found = [load(path) for path in FOLDER.glob("*.toml")]
    return [d.name for d in sorted(found, key=lambda d: (d.usable_bytes,
                                                         d.flops_per_second["fp32"].value))]


def load(name_or_path: str | os.PathLike[str]) -> Device:
    """A bundled device by name, or a file by a path that ends in .toml.

    Raises:
        ValueError: no such device or file, not TOML, an unknown or missing key, a number that is
            none or not above zero; one line that names the file and the key.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = FOLDER / f"{name_or_path}.toml"
        if path.parent != FOLDER or not path.exists():
            raise ValueError(f"[device] unknown device {str(name_or_path)!r}; known: "
                             f"{', '.join(names())}; or a .toml file of your own (`ffengine "
                             "devices --template` prints one)")
    file = f"[device] {path.name}"
    top = table(file, "", read(path, "device"), _TOP, ("name", "figures", "flops_per_second"))
    top["figures"] = table(file, "figures", top["figures"], _FIGURES, REQUIRED)
    top["flops_per_second"] = table(file, "flops_per_second", top["flops_per_second"], _RATES,
                                    ("fp32",))
    for where in ("figures", "flops_per_second"):
        for key, figure in top[where].items():
            _check_source(f"{file}: [{where}] {key}", figure, top.get("sources", {}))
    return Device(**{"title": top["name"], **top})


def _check_source(place: str, figure: Figure, sources: Mapping[str, str]) -> None:
    word = figure.source.partition(":")[0]
    if word not in (*sources, *OWN_WORD, Figure(0).source):
        raise ValueError(f"{place}: source expected to begin with one of "
                         f"{', '.join((*sources, *OWN_WORD))} and a colon, got {figure.source!r}")


def _figure(kind: Any) -> Any:
    """A plain number, or a table of value and source."""
    def checked(value: Any) -> Figure:
        if not isinstance(value, dict):
            return Figure(kind(value))
        if set(value) != {"value", "source"}:
            raise Expected("a number, or a table of value and source")
        return Figure(kind(value["value"]), text(value["source"]))
    return checked


def _sources(value: Any) -> dict[str, str]:
    if not all(isinstance(v, str) for v in mapping(value).values()):
        raise Expected("texts by a short name")
    return dict(value)


_TOP = {**dict.fromkeys(("name", "title", "mode", "compute_capability", "reported_as", "note"),
                        text),
        "kind": one_of(("cuda", "cpu")), "prediction_only": flag, "sources": _sources,
        **dict.fromkeys(("figures", "flops_per_second"), mapping)}
_POSITIVE = _figure(number(above_zero=True))
_FIGURES = {**dict.fromkeys((*REQUIRED, *OPTIONAL), _POSITIVE),
            "usable": _figure(number(1.0, above_zero=True))}
_RATES = dict.fromkeys((*PRECISIONS, "tf32"), _POSITIVE)

#: A user's own file to begin with.
TEMPLATE = """\
# A device profile of your own: ffengine plan MODEL --device-profile FILE.toml
# A figure is a number, or { value = NUMBER, source = "WHERE FROM" }; a source begins with a key of
# [sources], or with derived:, assumed: or measured:. Keys behind a # may be left out.
name = "my-device"
# title = "what it is"
# mode = "power mode"
# kind = "cuda"                   # or cpu
# compute_capability = "8.7"
# reported_as = "NVIDIA ..."      # its name as the driver has it
# prediction_only = false
# note = "anything to know"

[sources]
sheet = "title of the data sheet, address"

[figures]
memory_bytes = { value = 8_589_934_592, source = "sheet: 8 GB" }
usable = { value = 0.75, source = "assumed: share of it that a training step may hold" }
bytes_per_second = { value = 100e9, source = "sheet: memory bandwidth" }
launch_seconds = { value = 5e-6, source = "assumed: from one kernel to the next" }
# sm_count = 8
# cuda_cores = 1024
# clock_hz = 1e9
# watts = 15

[flops_per_second]                # dense, a multiply-add is two
fp32 = { value = 2e12, source = "derived: 2 x cores x clock" }
# tf32 = 8e12
# fp16 = 16e12
# bf16 = 16e12
"""


def this_machine(device: torch.device | str, precisions: tuple[str, ...]) -> Device:
    """The machine at hand: its rates measured now, its memory as it reports it."""
    device = torch.device(device)
    rates = machine_rates([PRECISIONS[p] for p in precisions], device)
    measured = "measured: ffengine.devices.rates"
    figures = {"usable": Figure(1.0, "assumed: all of it"),
               "bytes_per_second": Figure(rates.bytes_per_second, measured),
               "launch_seconds": Figure(rates.launch_seconds, measured)}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        title, reported = gpu.name, "measured: reported by the driver"
        figures["memory_bytes"] = Figure(gpu.total_memory, reported)
        figures["sm_count"] = Figure(gpu.multi_processor_count, reported)
        clock = getattr(gpu, "clock_rate", 0)  # kHz; absent in older versions of torch
        if clock:
            figures["clock_hz"] = Figure(1e3 * clock, reported)
    else:
        title = f"{env.cpu_name()}, threads: {torch.get_num_threads()}"
        figures["memory_bytes"] = Figure(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "measured: reported by the system")
    flops = {p: Figure(rates.flops_per_second[PRECISIONS[p]], measured) for p in precisions}
    return Device("this-machine", title, figures, flops, kind=device.type)


def sheet_of(device: torch.device | str) -> Device | None:
    """The bundled profile of the GPU at hand, by the name its driver reports."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((d for d in map(load, names()) if d.reported_as == name), None)


def not_emulated(device: Device, here: Device, precision: str) -> dict[str, dict[str, float]]:
    """What a run here, with the device's memory, does not take over: its number there, here, and
    their ratio, of everything that both profiles have."""
    pairs = {key: (device.figures[key], here.figures[key])
             for key in ("sm_count", "clock_hz", "bytes_per_second")
             if key in device.figures and key in here.figures}
    pairs[f"{precision} FLOP/s"] = (device.flops_per_second[precision],
                                    here.flops_per_second[precision])
    return {key: {"there": a.value, "here": b.value, "ratio": a.value / b.value}
            for key, (a, b) in pairs.items()}


@dataclass(frozen=True)
class Slowdown:
    """What real steps took beside their floors: smallest, median and largest ratio; seconds of the
    host a call, whatever it computes; where it was measured, and on what kind of device."""

    low: float
    median: float
    high: float
    call_seconds: float
    where: str
    kind: str

    def expected(self, kind: str, floor: float, calls: int) -> tuple[float, float, float]:
        """Seconds (low, median, high) of a step on a device of this kind.

        A GPU computes while the host prepares the next calls: the longer of the two counts.
        """
        host = calls * self.call_seconds
        ranged = [floor * ratio for ratio in (self.low, self.median, self.high)]
        low, median, high = (max(s, host) if kind == "cuda" else s + host for s in ranged)
        return low, median, high


def slowdown(kind: str, precision: str) -> Slowdown | None:
    """What was measured on a device of this kind, else on any; None: nothing for the precision.

    Where fp16 was not, bf16 stands for it: as wide, on the same units.
    """
    if not MEASURED.exists():
        return None
    found = json.loads(MEASURED.read_text())["slowdown"]
    for key in (kind, *sorted(found)):
        for measured in (precision, *["bf16"] * (precision == "fp16")):
            ratios = found.get(key, {}).get("ratios", {}).get(measured)
            if ratios:
                return Slowdown(ratios["min"], ratios["median"], ratios["max"],
                                found[key]["call_seconds"], f"{found[key]['where']}, {measured}",
                                key)
    return None
