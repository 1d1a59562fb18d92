"""batch_pass against the eager chain it replaces, at the sizes of CwComp's network.

    python -m bench.batch_pass [--batch 128] [--precision fp32] [--order pool_norm]

Ours as the engine calls it: z over the pre-activation where nothing pools. Eager: relu, max-pool,
batch_norm, squares, mean, cross-entropy, backward to the pre-activation and the affine.
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
from ffengine.ops.batch_pass import BatchPassOutput, batch_pass, bytes_moved
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm

#: (channels, height and width, pools) of the convolutions on 32x32 images.
CWCOMP = ((20, 32, False), (80, 32, True), (240, 16, False), (480, 16, True))
GROUPS, EPS = 10, 1e-4


class Layer:
    """One layer's pre-activations and BatchNorm."""

    def __init__(self, batch: int, c: int, size: int, pools: bool, dtype: torch.dtype,
                 order: str = "pool_norm",
                 layout: torch.memory_format = torch.channels_last) -> None:
        a = torch.randn(batch, c, size, size).to(dtype)
        self.a = a.contiguous(memory_format=layout)
        self.y = torch.randint(0, GROUPS, (batch,))
        self.pools, self.order = pools, order
        self.config = LocalPassConfig(groups=GROUPS, goodness="mean_sq", norm=Norm("none"),
                                      pool="max2" if pools else "none")
        self.coupling = BatchNorm(EPS, order=order)  # type: ignore[arg-type]
        self.gamma, self.beta = torch.rand(c) + 0.5, torch.randn(c)
        self.mean, self.var = torch.zeros(c), torch.ones(c)
        self.moved = bytes_moved(tuple(a.shape), dtype, self.config, self.coupling)

    def ours(self, over: torch.Tensor | None = None, backend: str = "auto") -> BatchPassOutput:
        a = self.a if over is None else over
        return batch_pass(a, self.y, config=self.config, coupling=self.coupling, gamma=self.gamma,
                          beta=self.beta, running_mean=self.mean, running_var=self.var,
                          out=over, want_da=True, backend=backend)

    def eager(self, wide: bool = False) -> tuple[torch.Tensor, ...]:
        kind = torch.float64 if wide else torch.float32
        a = (self.a.double() if wide else self.a.detach()).requires_grad_()
        gamma, beta = (t.to(kind).requires_grad_() for t in (self.gamma, self.beta))
        running = [t.to(kind) for t in (self.mean, self.var)]
        h = F.relu(a)
        if self.pools and self.order == "pool_norm":
            h = F.max_pool2d(h, 2)
        z = F.batch_norm(h, *running, gamma, beta, True, 0.1, EPS)
        if self.pools and self.order == "norm_pool":
            z = F.max_pool2d(z, 2)
        n, c, *size = z.shape
        g = z.square().view(n, GROUPS, c // GROUPS, *size).mean((2, 3, 4))
        gradients = torch.autograd.grad(F.cross_entropy(g, self.y), (a, gamma, beta))
        return z.detach(), g.detach(), *gradients

    def check(self) -> None:
        """Agrees with fp64 as well as eager does, or ValueError."""
        out = self.ours()
        exact, theirs = self.eager(wide=True), self.eager()
        ours = (out.z, out.g, out.da, out.dgamma, out.dbeta)
        for mine, their, true in zip(ours, theirs, exact, strict=True):
            assert mine is not None
            error, eager_error = ((t.double() - true).abs().max().item() for t in (mine, their))
            slack = torch.finfo(self.a.dtype).eps * true.abs().max().item() * 8
            if not error <= 2 * eager_error + slack:
                raise ValueError(f"[bench] {tuple(self.a.shape)}: error {error:.2e}, eager's "
                                 f"{eager_error:.2e}")


def rows(batch: int, dtype: torch.dtype, order: str, rounds: int,
         layout: torch.memory_format) -> list[dict[str, Any]]:
    out = []
    for c, size, pools in CWCOMP:
        layer = Layer(batch, c, size, pools, dtype, order, layout)
        layer.check()
        over = None if pools else layer.a.clone(memory_format=torch.preserve_format)
        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda layer=layer, over=over: layer.ours(over),  # type: ignore[misc]
            "eager": lambda layer=layer: layer.eager()}  # type: ignore[misc]
        times = machine.interleaved(sides, rounds, warmup=2)
        ours = machine.spread(times["ours"])
        out.append({"shape": [batch, c, size, size], "pools": pools, "ours": ours,
                    "eager": machine.spread(times["eager"]),
                    "speedup": 1 / machine.ratio(times["ours"], times["eager"]),
                    "gb_per_s": layer.moved / ours["median"] / 1e9})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.batch_pass", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--order", choices=("pool_norm", "norm_pool"), default="pool_norm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    made: dict[str, Any] = {"batch": args.batch, "precision": args.precision, "order": args.order}
    for layout in (torch.channels_last, torch.contiguous_format):
        table = rows(args.batch, dtype, args.order, args.rounds, layout)
        name = str(layout).removeprefix("torch.")
        for row in table:
            print(f"{name:18s} {row['shape']!s:20s} {'pool' if row['pools'] else '':4s} "
                  f"ours {row['ours']['median'] * 1e3:7.2f} ms "
                  f"eager {row['eager']['median'] * 1e3:7.2f} ms  x{row['speedup']:5.1f}  "
                  f"{row['gb_per_s']:5.1f} GB/s")
        ours, theirs = (sum(r[k]["median"] for r in table) for k in ("ours", "eager"))
        made[name] = {"rows": table, "ours": ours, "eager": theirs, "speedup": theirs / ours}
        print(f"{name:18s} CwComp, batch {args.batch}: ours {ours * 1e3:.1f} ms, eager "
              f"{theirs * 1e3:.1f} ms, x{theirs / ours:.1f}")
    if args.json:
        results.write(args.json, "batch_pass", made)


if __name__ == "__main__":
    main()
