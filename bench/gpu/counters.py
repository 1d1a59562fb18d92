"""The gate's baseline for this device: bench/baselines/<gpu>.json, and a copy among the results.

A rehearsal counts the same rows on the processor, and writes no baseline.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import compare, counters
from bench.gpu.run import DONE, FAILED
from bench.gpu.session import Session, options

#: What a device decides; declared bytes and Triton's machine code are every machine's.
PARTS = ("memory", "launches", "nvcc")


def main() -> int:
    args = options(__doc__).parse_args()
    session = Session(args)
    device = session.device.type
    parts = counters.collect(PARTS[:2] if args.rehearse else PARTS, device)
    wanted = [args.out / "counters.json"]
    if not args.rehearse:
        wanted.append(compare.own_baseline(device))
    for path in wanted:
        counters.write(Path(path), parts, device)
    for name, part in parts.items():
        print(f"{name}: " + (part["absent"] if "absent" in part else f"{len(part['rows'])} rows"))
    failed = counters.failures(parts)
    print("\n".join([*failed, f"wrote {', '.join(path.name for path in wanted)}"]))
    return FAILED if failed else DONE


if __name__ == "__main__":
    sys.exit(main())
