"""What starting costs beside `import torch`: bytes that the process grows by, processor seconds.

    python -m bench.start

Each number is the least of a few fresh processes, against a fixed limit: nothing here is exact, as
counters are, nor slow enough to be compared with the commit before. Seconds count as shares of what
torch's own import takes on this machine, about one second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6
SCRIPT = """
import io, json, sys, time
from contextlib import redirect_stdout
from resource import RUSAGE_SELF, getrusage
import torch
torch.set_num_threads(1)
start, clock = getrusage(RUSAGE_SELF).ru_maxrss * 1024, time.process_time()

def note(what):
    told[what] = [getrusage(RUSAGE_SELF).ru_maxrss * 1024 - start, time.process_time() - clock]

told = {"torch": [start, clock]}
import ffengine as ff
ff.Trainer, ff.models.create
note("names")
from ffengine.cli import main
with redirect_stdout(io.StringIO()):
    assert main(["models"]) == 0
note("models")
net = ff.models.create("deeperforward/tinycnn", in_channels=1, image_size=8,
                       widths=(10, 20, 20, 20))
ff.Trainer(net, epochs=1, progress=False).step(torch.rand(8, 1, 8, 8), torch.arange(8))
note("step")
print(json.dumps(told))
"""


class Limit(NamedTuple):
    """Bytes, and shares of the seconds of `import torch`."""

    what: str
    bytes: int
    share: float


#: About half as much again as a Zen 5 takes (6.9 MB and 0.24, 7.5 and 0.26, 34.3 and 0.56, beside
#: other work): pages and processors differ, what is looked for is a module too many.
LIMITS = {"names": Limit("up to ff.Trainer and ff.models.create", 15 * MB, 0.4),
          "models": Limit("`ffengine models`", 35 * MB, 0.5),
          "step": Limit("with a first step of a small TinyCNN", 50 * MB, 1.5)}


def measure(processes: int = 3) -> dict[str, tuple[int, float]]:
    """(bytes, processor seconds) over `import torch`, whose own are "torch"."""
    found: list[dict[str, list[float]]] = []
    for _ in range(processes):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                              check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {what: (int(min(one[what][0] for one in found)), min(one[what][1] for one in found))
            for what in found[0]}


def lines(told: dict[str, tuple[int, float]]) -> list[str]:
    """A line for each limit."""
    return [f"{limit.what}: {told[name][0] / MB:.1f} MB of {limit.bytes / MB:.0f}, "
            f"{told[name][1]:.2f} s, {told[name][1] / told['torch'][1]:.2f} of torch's "
            f"{told['torch'][1]:.2f} s ({limit.share:.2f} allowed)"
            for name, limit in LIMITS.items()]


def failures(told: dict[str, tuple[int, float]]) -> list[str]:
    """The lines of limits that are passed."""
    over = [told[name][0] > limit.bytes or told[name][1] > limit.share * told["torch"][1]
            for name, limit in LIMITS.items()]
    return [f"start: {line}" for line, bad in zip(lines(told), over, strict=True) if bad]


if __name__ == "__main__":
    measured = measure()
    print("\n".join(lines(measured)))
    sys.exit(bool(failures(measured)))
