"""Tools that look into a program (compute-sanitizer, ncu): their lines as they come, and which
kernels are ours."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Begins the last line of a program that was ended.
STOPPED = "STOPPED"
GLOBAL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(")


def triton_kernels(root: Path = ROOT) -> list[str]:
    """Names of the Triton kernels."""
    found = [name for path in sorted((root / "kernels").glob("*.py"))
             for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)]
    return list(dict.fromkeys(found))


def cuda_kernels(root: Path = ROOT) -> list[str]:
    """Names of the CUDA C++ kernels, without their namespace."""
    found = [name for path in sorted((root / "csrc" / "cuda").glob("*.cu*"))
             for name in GLOBAL.findall(path.read_text())]
    return list(dict.fromkeys(found))


def lines(words: list[str], seconds: float, **environment: str) -> Iterator[str]:
    """What a program prints, line by line as it comes: it writes to a terminal, which is not
    buffered. After `seconds` it is ended, with all that it started, and the last line says so."""
    ours, theirs = os.openpty()
    end = time.monotonic() + seconds
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**os.environ, **environment}, preexec_fn=os.setpgrp)
    os.close(theirs)
    rest, late = b"", False
    try:
        while True:
            late = time.monotonic() > end
            came = _read(ours) if not late else b""
            if came is None:
                continue
            if not came:
                break
            *whole, rest = (rest + came).split(b"\n")
            yield from (line.decode(errors="replace").rstrip() for line in whole)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)
    if rest:
        yield rest.decode(errors="replace").rstrip()
    if late:
        yield f"{STOPPED} after {seconds:.0f} s"


def _read(terminal: int) -> bytes | None:
    """What came; None: nothing yet; empty: nobody writes to the terminal any more."""
    if not select.select([terminal], [], [], 0.2)[0]:
        return None
    try:
        return os.read(terminal, 1 << 16)
    except OSError as gone:
        if gone.errno != errno.EIO:
            raise
        return b""
