"""What every stage's process is told, and knows of its run. torch is imported where it is used: a
stage that only starts other programs does without."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu.records import Row
from bench.gpu.scale import FULL, REHEARSAL, Scale

if TYPE_CHECKING:
    import torch


class Session:
    """What a stage's process knows: sizes, folders, facts, and the time it has."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.scale: Scale = REHEARSAL if args.rehearse else FULL
        self.out, self.scratch = args.out, args.scratch
        self.end = time.monotonic() + args.seconds

    @functools.cached_property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.scale.device)

    def left(self) -> float:
        return self.end - time.monotonic()

    def facts(self) -> Row:
        return dict(json.loads((self.scratch / "facts.json").read_text()))

    def kept(self, name: str, make: Callable[[], Row]) -> Row:
        """What an earlier process of this run kept under a name, or what `make` gives now."""
        path = self.scratch / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
        return dict(json.loads(path.read_text()))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def lives(self) -> bool:
        """Whether the CUDA context still computes."""
        import torch

        try:
            value = torch.ones(2, device=self.device).sum().item()
            self.synchronize()
        except RuntimeError:
            return False
        return value == 2.0


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options of every stage."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny shapes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of everything else")
    parser.add_argument("--seconds", type=float, required=True, help="what there is of time")
    return parser
