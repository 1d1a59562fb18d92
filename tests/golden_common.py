"""What every family of golden files shares: reading, digests, the exact limit, the rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tolerances import EPS

#: Everything a file holds, in fp64 on the reference.
EXACT = 1e-9
FP64 = torch.float64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def hash_tensor(seed: int, shape: list[int], m: int, e: int) -> np.ndarray:
    """Initial weights by formula (goldens' README): exact in float32."""
    with np.errstate(over="ignore"):
        i = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        z = np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64) + i * np.uint64(0xD1B54A32D192ED03)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (((z >> np.uint64(48)).astype(np.int64) - 32768) * m * 2.0**-e).reshape(shape)


def digest(t: torch.Tensor) -> np.ndarray:
    a = t.detach().double().contiguous().numpy().ravel()
    wave = np.cos(0.7 * (np.arange(a.size) + 1))
    return np.array([a.sum(), np.abs(a).sum(), np.sqrt((a * a).sum()), (a * wave).sum()])


def sample(t: torch.Tensor) -> np.ndarray:
    a = t.detach().double().contiguous().numpy().ravel()
    return a[[(j * (a.size - 1)) // 15 for j in range(16)]]


@dataclass
class Archive:
    """One golden file and what its config says."""

    path: Path
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, path: Path) -> Self:
        with np.load(path) as data:
            arrays = {k: data[k] for k in data.files if k != "config"}
            return cls(path, json.loads(str(data["config"])), arrays)

    def tensor(self, key: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key].astype(np.float64)).to(dtype)

    def labels(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key].astype(np.int64))

    @property
    def steps(self) -> int:
        return len(self.arrays["x"])

    def initial(self, index: int) -> torch.Tensor:
        """The value that parameter `index` of `param_names` starts from."""
        name = self.config["param_names"][index]
        if f"init.{name}" in self.arrays:
            return self.tensor(f"init.{name}")
        seed, m, e = self.config["init_hash"][name]
        return torch.from_numpy(hash_tensor(seed, self.config["param_shapes"][index], m, e))


class Errors:
    """Collects |got - want| / (1 + scale) and fails with all that exceed the limit.

    NaN (not computed) agrees with NaN alone.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.worst: dict[str, float] = {}

    def note(self, what: str, got, want, scale=None) -> None:
        got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
        assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
        scale = np.abs(want) if scale is None else np.asarray(scale)
        if got.size:
            off = np.where(np.isnan(got) & np.isnan(want), 0.0, np.abs(got - want) / (1 + scale))
            error = float(np.nan_to_num(off, nan=np.inf).max())
            self.worst[what] = max(self.worst.get(what, 0.0), error)

    def note_digest(self, what: str, got: torch.Tensor, want: np.ndarray) -> None:
        """A digest row, relative to 1 + sum|a|."""
        self.note(what, digest(got), want, abs(want[1]))

    def check(self) -> None:
        print(" ".join(f"{k}={v:.1e}" for k, v in self.worst.items()))
        bad = {k: v for k, v in self.worst.items() if not v <= self.limit}
        assert not bad, f"errors above {self.limit}: {bad}"


def draws(x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The input, and the input moved at random by its dtype's rounding.

    Through a hundred normalised layers one run of the same-dtype reference is a single draw of its
    rounding error; the rule's "error of the reference" is the largest of these.
    """
    generator = torch.Generator().manual_seed(0)
    nudges = [EPS[dtype] * torch.randint(-1, 2, x.shape, generator=generator) for _ in range(4)]
    return [x, *(x * (1 + nudge) for nudge in nudges)]


def largest_error(exact: torch.Tensor, same: list[torch.Tensor]) -> float:
    return max((t.double() - exact).abs().max().item() for t in same)


class Envelope:
    """The rule along the depth of a network.

    Rounding is chaotic through a hundred normalised layers, and the reference's error at one layer
    is a single draw of it; what depth does to rounding is the largest relative error so far.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.relative = dtype, {}

    def limit(self, kind: str, exact: torch.Tensor, same: list[torch.Tensor],
              reduction: int) -> float:
        size, error = exact.abs().max().item(), largest_error(exact, same)
        self.relative[kind] = max(self.relative.get(kind, 0.0), error / size if size else 0.0)
        return size * (2 * self.relative[kind] + EPS[self.dtype] * reduction**0.5)


def rule(exact: torch.Tensor, same: list[torch.Tensor], dtype: torch.dtype,
         reduction: int) -> float:
    """tests/tolerances.py's bound with the eps of the compute dtype.

    Goodness, losses and gradients are stored in fp32 whatever the maps' dtype.
    """
    if exact.numel() == 0:
        return 0.0
    return 2 * largest_error(exact, same) + EPS[dtype] * exact.abs().max().item() * reduction**0.5


def broken(what: str, got: torch.Tensor, exact: torch.Tensor, same: torch.Tensor,
           dtype: torch.dtype, reduction: int, jump: float = 0.0) -> list[str]:
    if exact.numel() == 0:
        return []
    error = (got.double() - exact).abs().max().item()
    limit = rule(exact, [same], dtype, reduction) + jump
    return [] if error <= limit else [f"{what}: error {error:.3e} > bound {limit:.3e}"]


def in_the_interpreter(script: Path, path: Path, out: Path,
                       arguments: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """What `python SCRIPT FILE OUT.npz ...` saves under Triton's interpreter.

    Interpreted and compiled kernels cannot share a process.
    """
    done = subprocess.run([sys.executable, script, path, out, *arguments],
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    with np.load(out) as data:
        return {k: torch.from_numpy(data[k]) for k in data.files}


def check_interpreted(script: Path, path: Path, arguments: Sequence[str] = ()) -> None:
    """`python SCRIPT FILE ...`, a check of its own, under Triton's interpreter."""
    done = subprocess.run([sys.executable, script, path, *arguments], capture_output=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
