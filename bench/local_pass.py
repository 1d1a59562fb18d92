"""local_pass against the eager chain it replaces, over a network's shapes.

    python -m bench.local_pass [--batch 32] [--precision fp32] [--dropout 0]

Ours writes z over the pre-activation, as the engine calls it. Eager: relu, (dropout,) view and
mean, cross-entropy, group norm, backward to the pre-activation.
A shape whose check is not green raises; no time is printed for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import machine, results
from ffengine.ops.config import Dropout, LocalPassConfig
from ffengine.ops.local_pass import bytes_moved, local_pass

#: (channels, height and width, layers of this shape) in ResNet-17 on 32x32 images.
RESNET17 = ((100, 32, 5), (200, 16, 4), (400, 8, 4), (800, 4, 4))
GROUPS = 10
#: Calls timed together: one by one, each side pays for the state in which the other leaves the
#: caches and the allocator.
BLOCK = 5


def eager(a: torch.Tensor, y: torch.Tensor, p: float) -> tuple[torch.Tensor, ...]:
    leaf = a.detach().requires_grad_()
    h = F.relu(leaf)
    h = F.dropout(h, p) if p else h
    g = h.reshape(h.shape[0], GROUPS, -1).mean(2)
    loss = F.cross_entropy(g, y)
    z = F.group_norm(h, GROUPS)
    (da,) = torch.autograd.grad(loss, leaf)
    return z.detach(), g.detach(), da


def check(a: torch.Tensor, y: torch.Tensor, config: LocalPassConfig, backend: str) -> None:
    """The very shape about to be timed agrees with fp64 as well as eager does, or ValueError."""
    ours = local_pass(a, y, config=config, want_da=True, backend=backend)
    exact = eager(a.double(), y, 0.0)
    theirs = eager(a, y, 0.0)
    for mine, their, true in zip((ours.z, ours.g, ours.da), theirs, exact, strict=True):
        assert mine is not None
        error, eager_error = ((t.double() - true).abs().max().item() for t in (mine, their))
        slack = torch.finfo(a.dtype).eps * true.abs().max().item() * 8
        if not error <= 2 * eager_error + slack:
            raise ValueError(f"[bench] {tuple(a.shape)}: error {error:.2e}, eager's "
                             f"{eager_error:.2e}")


def repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def block() -> None:
        for _ in range(BLOCK):
            call()

    return block


def rows(batch: int, dtype: torch.dtype, p: float, rounds: int, layout: torch.memory_format,
         backend: str = "auto") -> list[dict[str, Any]]:
    out = []
    for c, size, count in RESNET17:
        a = torch.randn(batch, c, size, size).to(dtype).contiguous(memory_format=layout)
        y = torch.randint(0, GROUPS, (batch,))
        config = LocalPassConfig(groups=GROUPS, dropout=Dropout(p))
        check(a, y, LocalPassConfig(groups=GROUPS), backend)
        mine = a.clone(memory_format=torch.preserve_format)
        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda a=mine, y=y, config=config: local_pass(  # type: ignore[misc]
                a, y, config=config, want_da=True, out=a, backend=backend),
            "eager": lambda a=a, y=y: eager(a, y, p)}  # type: ignore[misc]
        blocks = machine.interleaved({k: repeated(call) for k, call in sides.items()}, rounds,
                                     warmup=2)
        times = {k: [t / BLOCK for t in block] for k, block in blocks.items()}
        moved = bytes_moved(tuple(a.shape), dtype, config)
        ours = machine.spread(times["ours"])
        out.append({"shape": [batch, c, size, size], "count": count, "ours": ours,
                    "eager": machine.spread(times["eager"]),
                    "speedup": 1 / machine.ratio(times["ours"], times["eager"]),
                    "gb_per_s": moved / ours["median"] / 1e9})
    return out


def total(table: list[dict[str, Any]], side: str) -> float:
    """Seconds of all the network's layers."""
    return sum(row["count"] * row[side]["median"] for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.local_pass", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    made: dict[str, Any] = {"batch": args.batch, "precision": args.precision,
                            "dropout": args.dropout}
    for layout in (torch.contiguous_format, torch.channels_last):
        table = rows(args.batch, dtype, args.dropout, args.rounds, layout)
        name = str(layout).removeprefix("torch.")
        for row in table:
            print(f"{name:18s} {row['shape']!s:20s} ours {row['ours']['median'] * 1e3:7.2f} ms "
                  f"eager {row['eager']['median'] * 1e3:7.2f} ms  x{row['speedup']:5.1f}  "
                  f"{row['gb_per_s']:5.1f} GB/s")
        ours, theirs = total(table, "ours"), total(table, "eager")
        made[name] = {"rows": table, "ours": ours, "eager": theirs, "speedup": theirs / ours}
        print(f"{name:18s} ResNet-17, batch {args.batch}: ours {ours * 1e3:.1f} ms, eager "
              f"{theirs * 1e3:.1f} ms, x{theirs / ours:.1f}")
    if args.json:
        results.write(args.json, "local_pass", made)


if __name__ == "__main__":
    main()
