"""python -m bench.gpu.keep FOLDER: a run's files into bench/results/<gpu>/, where pages find them.

`python -m bench.prefer` then lets `auto` follow them, and `make page` prints them. Refused, in one
line: a rehearsal, files that were edited, files of several runs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench.gpu import pages

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: Kept beside what has a section.
LOGS = ("summary.txt", "tests.log", "sanitize.log")


def keep(folder: Path, results: Path = RESULTS) -> Path:
    """Copy a run's files; where they are now.

    Raises:
        ValueError: nothing was measured, or it must not be printed; one line.
    """
    files = [folder / name for name in pages.FILES
             if (folder / name).exists() and (folder / name).stat().st_size]
    if not files:
        raise ValueError(f"[keep] expected some of {', '.join(pages.FILES)} in {folder}, got none "
                         "with a row")
    facts = [pages.section(path)[0] for path in files]
    told = [{k: v for k, v in f.items() if k not in ("record", "format")} for f in facts]
    if any(f != told[0] for f in told):
        raise ValueError(f"[keep] {folder} expected files of one run, got several runs' facts")
    target = results / pages.slug(facts[0])
    target.mkdir(parents=True, exist_ok=True)
    for path in [*files, *(folder / name for name in LOGS)]:
        if path.exists():
            shutil.copy(path, target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.keep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    try:
        target = keep(parser.parse_args().folder)
        print(f"kept in {target}; now python -m bench.prefer, then make page")
    except ValueError as bad:
        print(f"bench.gpu.keep: {bad}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
