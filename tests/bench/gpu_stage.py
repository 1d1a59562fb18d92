"""A stage of bench/gpu.sh in a process, with folders of its own and fakes of the tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "bench" / "gpu" / "fakes"
FACTS = {"kind": "rehearsal", "version": "0", "gpu": None}


class Stage:
    """Runs modules of bench.gpu on a processor."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        for made in (self.out, folder / "scratch"):
            made.mkdir()
        (folder / "scratch" / "facts.json").write_text(json.dumps(FACTS))
        self.path = os.pathsep.join((str(FAKES), os.environ["PATH"]))
        self.said = self.complaint = ""

    def run(self, module: str, *words: str, seconds: float = 100, **environment: str) -> int:
        done = subprocess.run(
            [sys.executable, "-m", module, "--rehearse", "--seconds", str(seconds), "--out",
             str(self.out), "--scratch", str(self.folder / "scratch"), *words], cwd=ROOT,
            capture_output=True, text=True, check=False, env={
                **os.environ, "PATH": self.path, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1",
                "OMP_NUM_THREADS": "1", **environment})
        self.said, self.complaint = done.stdout, done.stderr
        return done.returncode

    def program(self, name: str, text: str) -> None:
        """A tool of our own before all others."""
        tools = self.folder / "tools"
        tools.mkdir(exist_ok=True)
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
        self.path = os.pathsep.join((str(tools), self.path))
