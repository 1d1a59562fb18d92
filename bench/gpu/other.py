"""Longer measurements, where STAGES names them: the device's rates and predictions, and training
curves with optimizer states in fewer bits. Each runs as it would by hand, and its files are copied
into the results' folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.run import DONE, FAILED
from bench.gpu.session import Session, options

ROOT = Path(__file__).resolve().parents[2]


def command(what: str, session: Session) -> list[str]:
    """The words of one measurement."""
    tiny, device = session.scale.kind == "rehearsal", session.scale.device
    if what == "devices":
        return ["bench.devices", "--device", device, "--rounds", "1" if tiny else "10",
                *["--dry", "--only", "fflib"] * tiny]
    small = ["--model", "sn/mlp", "--steps", "3", "--seeds", "2", "--batch-size", "8", "--set",
             "image_size=8", "--set", "layers=(20,20)"]
    return ["bench.states", "curves", "--device", device, "--json",
            str(session.out / "states_curves.json"), *small * tiny]


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("what", choices=("devices", "states"))
    args = parser.parse_args()
    session = Session(args)
    done = subprocess.run([sys.executable, "-m", *command(args.what, session)], cwd=ROOT,
                          check=False)
    if args.what == "devices" and not args.rehearse and not done.returncode:
        for path in (ROOT / "bench" / "results" / session.scale.device / "devices.json",
                     ROOT / "ffengine" / "devices" / "measured.json"):
            shutil.copy(path, session.out)
    return FAILED if done.returncode else DONE


if __name__ == "__main__":
    sys.exit(main())
