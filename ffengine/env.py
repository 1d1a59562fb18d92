"""What this machine can run: back-ends and why not, versions, instruction set, `auto`'s choice."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from ffengine.ops import backends
from ffengine.version import __version__

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "fp64": torch.float64}
#: The environment variable that holds oneDNN's kernels to an instruction set.
LIBRARY_LIMIT = "ONEDNN_MAX_CPU_ISA"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "scikit-learn", "scipy", "pooch",
            "tensorboard", "tqdm", "matplotlib")


def env_report() -> dict[str, Any]:
    """A plain dictionary; `ffengine env` prints it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = {name: backends.why_not(name, device, torch.float32) for name in backends.BACKENDS}
    if device == "cuda" and reasons["cpu"]:
        reasons["cpu"] = backends.why_not("cpu", "cpu", torch.float32)
    extension = backends.extension()
    build: dict[str, Any] = dict(extension.build_info()) if extension is not None else {}
    return {
        "ffengine": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": device,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": cuda_report(build.get("cuda_toolkit")),
        "backends": {name: {"usable": reason is None, "why_not": reason}
                     for name, reason in reasons.items()},
        "auto": {name: backends.resolve("env", "auto", device, dtype)
                 for name, dtype in DTYPES.items()},
        "auto_order": {name: {"order": list(order), "why": why} for name, dtype in DTYPES.items()
                       for order, why in [backends.auto_order(device, dtype)]},
        "extension": {
            "built": extension is not None,
            "compiler": build.get("compiler"),
            "instruction_sets": str(build.get("isas", "")).split(),
            "instruction_sets_here": extension.isas() if extension is not None else [],
            "instruction_set_in_use": extension.isa() if extension is not None else None,
            "instruction_set_forced": os.environ.get("FFENGINE_ISA") or None,
            "cuda_architectures": str(build.get("cuda_architectures", "")).split(),
        },
        "library": {"vectors": torch.backends.cpu.get_cpu_capability().lower(),
                    "onednn_limit": os.environ.get(LIBRARY_LIMIT)},
        "threads": {"torch": torch.get_num_threads(),
                    "kernels": extension.num_threads() if extension is not None else None,
                    "cores": os.cpu_count()},
    }


def cuda_report(toolkit: str | None) -> dict[str, str | None]:
    """Which code the GPU runs, and which CUDA its driver, torch and our kernels are of; or why
    there is no GPU. toolkit: what the kernels were built with."""
    gpu, driver = backends.gpu(), backends.driver_version()
    return {
        "capability": "sm_{}{}".format(*gpu.capability) if gpu is not None else None,
        "driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else None,
        "torch": torch.version.cuda,
        "kernels": toolkit or None,
        "why_no_gpu": None if gpu else backends.no_gpu_reason(torch.version.cuda, driver)}


def instruction_set() -> str:
    """What computes on the CPU: our kernels' set, and the library's where it is held to less."""
    ext = backends.extension()
    ours = ext.isa() if ext is not None else "no extension"
    limit = os.environ.get(LIBRARY_LIMIT)
    return f"{ours}, oneDNN {limit}" if limit else ours


def machine_class() -> str:
    """What exact counters depend on: architecture, instruction set, threads, or the GPU's."""
    if torch.cuda.is_available():
        return "cuda sm_{}{}".format(*torch.cuda.get_device_capability())
    return f"{platform.machine()} {instruction_set()}, threads: {torch.get_num_threads()}"


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def env_text(report: dict[str, Any]) -> str:
    """The report for people."""
    packages = ", ".join(f"{k} {v or 'absent'}" for k, v in report["packages"].items())
    rows = [f"ffengine {report['ffengine']}, Python {report['python']}, {packages}",
            f"device: {report['device']}" + "".join(f", {g}" for g in report["gpus"])
            + cuda_text(report["cuda"])]
    for name, state in report["backends"].items():
        rows.append(f"back-end {name:10s}" + ("usable" if state["usable"]
                                              else f"not usable: {state['why_not']}"))
    rows.append("auto picks " + ", ".join(f"{v} for {k}" for k, v in report["auto"].items()))
    rules: dict[str, list[str]] = {}
    for name, rule in report["auto_order"].items():
        rules.setdefault(f"first usable of {' > '.join(rule['order'])} on {report['device']}: "
                         f"{rule['why']}", []).append(name)
    rows += [f"auto in {', '.join(names)}: {rule}" for rule, names in rules.items()]
    extension, threads = report["extension"], report["threads"]
    if extension["built"]:
        architectures = " ".join(extension["cuda_architectures"]) or "none"
        forced = ", as FFENGINE_ISA says" if extension["instruction_set_forced"] else ""
        rows.append(f"kernels: {extension['compiler']}, compiled for "
                    f"{' '.join(extension['instruction_sets'])}, here up to "
                    f"{extension['instruction_sets_here'][-1]}, using "
                    f"{extension['instruction_set_in_use']}{forced}; CUDA architectures: "
                    f"{architectures}")
    library = report["library"]
    limit = f", {LIBRARY_LIMIT}={library['onednn_limit']}" if library["onednn_limit"] else ""
    rows.append(f"library: PyTorch's own loops in {library['vectors']}{limit}")
    rows.append(f"threads: torch {threads['torch']}, kernels {threads['kernels'] or '-'}, "
                f"cores {threads['cores']}")
    return "\n".join(rows)


def cuda_text(cuda: dict[str, str | None]) -> str:
    if cuda["why_no_gpu"]:
        return f" ({cuda['why_no_gpu']})"
    whose = ", ".join(f"{who} {cuda[who] or '-'}" for who in ("driver", "torch", "kernels"))
    return f" ({cuda['capability']}; CUDA of {whose})"
