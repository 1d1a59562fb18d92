"""Interpreter and compiler each need a process of their own; this starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class Worker:
    """A started `python -m module arguments`; its last line of output is JSON."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT,
            env={**kept, "PYTHONPATH": path, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def result(self) -> Any:
        out, err = self.process.communicate(timeout=600)
        if self.process.returncode:
            pytest.fail(f"worker failed:\n{err[-3000:]}")
        return json.loads(out.splitlines()[-1])
