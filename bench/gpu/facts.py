"""The first stage: what machine this is. Exit status 2 where there is no device to run on.

Writes facts.json for the other stages, and links the kernels' folder into the package where nobody
installed it, so that neither pip nor an installed package is needed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import ffengine
from bench import machine
from bench.gpu.run import DONE, NO_DEVICE
from bench.gpu.scale import Scale
from bench.gpu.session import Session, options

ROOT = Path(__file__).resolve().parents[2]
#: The oldest compute capability that the kernels are written for.
OLDEST = (7, 5)
QUERY = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "power.limit",
         "temperature.gpu", "ecc.mode.current", "mig.mode.current")


def no_device(scale: Scale) -> str | None:
    """Why nothing can run here; None if it can."""
    if scale.device != "cuda":
        return None
    if not torch.cuda.is_available():
        return "expected a CUDA device that torch can use, got none"
    came = torch.cuda.get_device_capability()
    if came < OLDEST:
        return (f"expected compute capability {OLDEST[0]}.{OLDEST[1]} or newer, got "
                f"{came[0]}.{came[1]} ({torch.cuda.get_device_name()})")
    return None


def said(command: list[str]) -> str:
    """A tool's answer on one line, or that there is none."""
    found = shutil.which(command[0])
    if found is None:
        return "not here"
    try:
        done = subprocess.run([found, *command[1:]], capture_output=True, text=True, check=False,
                              timeout=10)
    except subprocess.TimeoutExpired:
        return "no answer"
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


def link_kernels() -> None:
    """ffengine.kernels, which exists only through a package's mapping, as a link to kernels/."""
    if find_spec("ffengine.kernels") is None:
        (ROOT / "ffengine" / "kernels").symlink_to(Path("..") / "kernels", target_is_directory=True)


def main() -> int:
    args = options(__doc__).parse_args()
    session = Session(args)
    reason = no_device(session.scale)
    if reason is not None:
        print(f"gpu.sh: {reason}")
        return NO_DEVICE
    link_kernels()
    tools = {"smi": said(["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]),
             "nvcc": said(["nvcc", "--version"]), "ncu": said(["ncu", "--version"]),
             "sanitizer": said(["compute-sanitizer", "--version"])}
    facts = {"kind": session.scale.kind, "version": ffengine.__version__, **machine.facts(),
             "tools": tools}
    if session.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"capability": f"{gpu.major}.{gpu.minor}", "sm_count": gpu.multi_processor_count,
                  "l2_bytes": gpu.L2_cache_size, "memory_bytes": gpu.total_memory}
    (session.scratch / "facts.json").write_text(json.dumps(facts))
    print(f"{facts['kind']}: {facts['gpu'] or facts['cpu']}; driver {facts['driver']}, torch "
          f"{facts['torch']}, Triton {facts['triton']}, Python {facts['python']}; commit "
          f"{facts['commit']}{' and changes' if facts['dirty'] else ''}")
    for name, text in tools.items():
        print(f"{name}: {text}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
