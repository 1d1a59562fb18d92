"""Hardware counters of a few kernels, as ncu prints them: ncu.csv.

One call each of local_pass by both back-ends at stage 1, of the optimizer and of batch_pass, and
the library's convolution of stage 1, whose kernel's name says how wide it loads; in a process of
their own (bench.gpu.counted). Clocks are left as they are, caches are emptied. A machine that lets
nobody read its counters is told, not failed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.gpu.run import DONE, FAILED, INCOMPLETE
from bench.gpu.session import Session, options
from bench.gpu.tool import STOPPED, cuda_kernels, lines, triton_kernels

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% occupancy",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors a load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors a store",
}
#: Launches that are counted, in all.
LAUNCHES = 16
#: In a library's kernels that convolve or multiply.
LIBRARY = "fprop|conv|gemm"
#: A warning is none: ncu says ==ERROR== where it cannot count.
REFUSED = re.compile(r"==ERROR== |ERR_NVGPUCTRPERM")


def command(session: Session) -> list[str]:
    ours = "|".join([*triton_kernels(), *cuda_kernels()])
    return ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
            "--profile-from-start", "off", "--kernel-name", f"regex:^({ours})$|{LIBRARY}",
            "--launch-count", str(LAUNCHES), "--metrics", ",".join(METRICS), "--", sys.executable,
            "-m", "bench.gpu.counted", *["--rehearse"] * (session.scale.kind == "rehearsal")]


def write(path: Path, table: list[str], facts: dict[str, Any]) -> None:
    """The table as ncu printed it, under a line of facts and the table's checksum."""
    text = "\n".join(table) + "\n"
    head = {**facts, "checksum": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(f"# {json.dumps(head)}\n{text}")


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """(facts, a row a kernel by column) of ncu.csv.

    Raises:
        ValueError: one line: no such file, or edited by hand.
    """
    head, _, text = path.read_text().partition("\n")
    try:
        facts = json.loads(head.removeprefix("# "))
        known = facts.pop("checksum")
    except (json.JSONDecodeError, KeyError, AttributeError):
        raise ValueError(f"[ncu] expected facts on the first line of {path}, got "
                         f"{head[:60]!r}") from None
    if known != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(f"[ncu] {path} was edited by hand; measure it again")
    rows = list(csv.DictReader(text.splitlines()))
    return facts, [row for row in rows if row.get("ID")]  # the row of units has none


def brief(row: dict[str, str]) -> str:
    """A kernel's counters on one line."""
    found = [f"{row[name]} {unit}" for name, unit in METRICS.items() if row.get(name)]
    return f"{row['Kernel Name'].split('(')[0]}: {', '.join(found)}"


def main() -> int:
    args = options(__doc__).parse_args()
    session = Session(args)
    if shutil.which("ncu") is None:
        print("no ncu here")
        return INCOMPLETE
    table, complaints, wrong = list[str](), list[str](), list[str]()
    stopped = False
    for line in lines(command(session), session.left()):
        if line.startswith('"'):
            table.append(line)
        elif REFUSED.search(line):
            complaints.append(line)
        elif line.startswith("WRONG "):
            wrong.append(line)
        stopped |= line.startswith(STOPPED)
        print(line, file=sys.stderr)
    if table:
        write(args.out / "ncu.csv", table, session.facts())
        for row in read(args.out / "ncu.csv")[1]:
            print(brief(row))
    print("\n".join([*wrong, *complaints[:3], *["stopped: out of time"] * stopped]
                    or [f"{max(len(table) - 2, 0)} launches counted"]))
    return FAILED if wrong else DONE if len(table) > 2 else INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
