"""What optimizer states in fewer bits cost and change:

    python -m bench.states sweep [--model deeperforward/resnet17] [--threads 2]
    python -m bench.states curves [--model …] [--batch-size 128] [--steps 200] [--seeds 5]
                                  [--device cuda] [--precision fp32] [--set image_size=16]

sweep: seconds and GB/s of the optimizer step over a network's weights, per format; the gradient
lies in memory. curves: the training loss of the same seeds with every format, on class prototypes
plus noise. Two statistics of the smoothed curves say whether a format can be told from a change of
seed:

    ratio   root mean square, over seeds and steps, of (loss with the format - fp32 loss of the same
            seed), over that of (fp32 loss - fp32 loss of another seed)
    inside  steps, the mean over curves, at which a curve of the format lies between the smallest
            and the largest fp32 curve; beside it the same of each fp32 curve among the others

A format is within the seed-to-seed spread with ratio < 1, inside no less often than fp32 curves are
inside each other's range. Both write JSON, curves a PNG too.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, results
from bench.plots import pyplot
from ffengine.commands.options import assignments
from ffengine.engine.memory.plans import Memory
from ffengine.engine.trainer import Trainer
from ffengine.models import create
from ffengine.nn import LocalNet
from ffengine.ops import backends
from ffengine.ops.optim import OptimConfig, OptimState, state_bytes
from ffengine.ops.optimizer_step import optimizer_step

#: name: (states, weights); the last only where activations are bf16.
FORMATS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "fp32"), "8bit": ("8bit", "fp32"),
           "8bit, bf16 weights": ("8bit", "bf16")}
#: Of a curve: steps of the moving mean.
SMOOTHED = 10
#: Noise beside prototypes of unit variance: hard enough that the loss still falls at the end.
NOISE = 2.0
COLOURS = {"fp32": "0.45", "bf16": "#3b6ea5", "8bit": "#c1272d", "8bit, bf16 weights": "#e59f24"}


def sweep(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step over all weights, interleaved between the formats."""
    net = create(args.model, **options).to(args.device)
    shapes = [p.detach() for p in net.parameters()]
    backend = backends.resolve("weight_update", args.backend, torch.device(args.device).type,
                               torch.float32)
    sides, moved = {}, {}
    for name, (states, weights) in FORMATS.items():
        optim = OptimConfig(lr=1e-4, state_precision=states)  # type: ignore[arg-type]
        dtype = torch.bfloat16 if weights == "bf16" else torch.float32
        held = []
        for p in shapes:
            weight = p.to(dtype) if dtype is torch.bfloat16 else p.clone()
            held.append((weight, torch.randn_like(p) * 1e-3, OptimState.create(weight, optim)))
        moved[name] = sum(2 * (w.numel() * w.element_size() + state_bytes(
            w.numel(), w.dtype, optim)) + 4 * w.numel() for w, _, _ in held)

        def step(held: Any = held, optim: OptimConfig = optim) -> None:
            for weight, grad, state in held:
                optimizer_step(weight, grad, state, optim, 1.0, backend)
                state.step += 1

        sides[name] = step
    times = machine.interleaved(sides, args.rounds, warmup=2)
    return {"model": args.model, "elements": sum(p.numel() for p in shapes), "backend": backend,
            "rows": {n: {"seconds": machine.spread(t), "bytes": moved[n],
                         "gb_per_second": moved[n] / machine.spread(t)["median"] / 1e9}
                     for n, t in times.items()}}


def batches(net: LocalNet, args: argparse.Namespace, seed: int) -> Iterator[tuple[
        torch.Tensor, torch.Tensor]]:
    """Samples of fixed class prototypes plus noise; the seed draws labels and noise."""
    fixed, drawn = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1000 + seed)
    square = args.square
    coarse = [e if i == 0 else e // square for i, e in enumerate(net.in_shape)]
    prototypes = torch.randn(net.num_classes, *coarse, generator=fixed)
    for d in range(2, prototypes.dim()):
        prototypes = prototypes.repeat_interleave(square, d)
    for _ in range(args.steps):
        y = torch.randint(net.num_classes, (args.batch_size,), generator=drawn)
        noise = torch.randn(args.batch_size, *net.in_shape, generator=drawn)
        yield (prototypes[y] + NOISE * noise).to(args.device), y.to(args.device)


def curve(args: argparse.Namespace, options: dict[str, Any], name: str, seed: int) -> list[float]:
    """Mean over layers of the local losses, a value a step."""
    torch.manual_seed(seed)
    net = create(args.model, **options)
    states, weights = FORMATS[name]
    trainer = Trainer(net, batch_size=args.batch_size, precision=args.precision, seed=seed,
                      device=args.device, backend=args.backend, memory=Memory(states, weights),
                      memory_budget=args.memory_budget, lr=args.lr, progress=False)
    losses = []
    for x, y in batches(net, args, seed):
        report = trainer.step(x, y, epoch=0)
        losses.append(torch.stack([v for v in report.losses if v is not None]).mean())
    found: list[float] = torch.stack(losses).cpu().tolist()
    return found


def smoothed(curves: list[list[float]]) -> torch.Tensor:
    """(seeds, steps): the mean of the last SMOOTHED losses, of those there are at the start."""
    total = torch.tensor(curves, dtype=torch.float64).cumsum(1)
    before = torch.nn.functional.pad(total, (SMOOTHED, 0))[:, :-SMOOTHED]
    return (total - before) / torch.arange(1, total.shape[1] + 1).clamp(max=SMOOTHED)


def verdict(plain: torch.Tensor, format_: torch.Tensor) -> dict[str, Any]:
    """The two statistics of smoothed curves (seeds, steps) of one format against fp32's."""
    n = len(plain)
    changed = torch.stack([plain[a] - plain[b] for a, b in itertools.combinations(range(n), 2)])
    ratio = (rms(format_ - plain) / rms(changed)).item()
    inside = sum(within(c, plain) for c in format_) / len(format_)
    others = sum(within(plain[i], torch.cat([plain[:i], plain[i + 1:]])) for i in range(n)) / n
    return {"ratio": ratio, "inside": inside, "fp32_inside": others, "steps": plain.shape[1],
            "passed": ratio < 1 and inside >= others}


def rms(difference: torch.Tensor) -> torch.Tensor:
    return difference.square().mean().sqrt()


def within(curve: torch.Tensor, range_: torch.Tensor) -> int:
    """Steps at which a curve lies in the range of some others."""
    return int(((curve >= range_.amin(0)) & (curve <= range_.amax(0))).sum())


def verdicts(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of every format but fp32, from the curves."""
    made = {name: smoothed(curves) for name, curves in values["curves"].items()}
    return {name: verdict(made["fp32"], c) for name, c in made.items() if name != "fp32"}


def curves(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Curves of every format and seed, and what the statistics say."""
    names = [n for n, (_, weights) in FORMATS.items()
             if n in args.formats and (weights == "fp32" or args.precision == "bf16")]
    found: dict[str, list[list[float]]] = {n: [] for n in names}
    for name in names:
        for seed in range(args.seeds):
            found[name].append(curve(args, options, name, seed))
            print(f"  {name:20s} seed {seed}  loss {found[name][-1][0]:.4f} -> "
                  f"{sum(found[name][-1][-SMOOTHED:]) / SMOOTHED:.4f}", flush=True)
    return {"model": args.model, "options": options, "batch": args.batch_size, "lr": args.lr,
            "square": args.square, "precision": args.precision, "smoothed": SMOOTHED,
            "noise": NOISE, "curves": found}


def picture(path: Path, values: dict[str, Any]) -> None:
    """PNG: the range of the fp32 curves, and every curve of the other formats."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    plain = smoothed(values["curves"]["fp32"])
    steps = range(1, plain.shape[1] + 1)
    axes.fill_between(steps, plain.amin(0), plain.amax(0), color="0.85",
                      label=f"fp32 states, range of {len(plain)} seeds")
    axes.plot(steps, plain.mean(0), color=COLOURS["fp32"], label="fp32 states, mean")
    for name in verdicts(values):
        mine = smoothed(values["curves"][name])
        axes.plot(steps, mine.t(), color=COLOURS[name], linewidth=0.6, alpha=0.5)
        axes.plot(steps, mine.mean(0), color=COLOURS[name], linestyle="--",
                  label=f"{name}, mean")
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {values['smoothed']} steps")
    axes.set_title(f"{values['model']}, batch {values['batch']}, {values['precision']}",
                   loc="left")
    axes.legend(frameon=False)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def report(values: dict[str, Any]) -> str:
    """A line a format."""
    if "rows" in values:
        head = f"{values['model']}, {values['elements']:,} weights, {values['backend']}:"
        return "\n".join([head, *(
            f"  {n:20s} {1e3 * r['seconds']['median']:8.2f} ms ({1e3 * r['seconds']['min']:.2f} to "
            f"{1e3 * r['seconds']['max']:.2f})  {r['bytes'] / 1e6:8.1f} MB  "
            f"{r['gb_per_second']:6.1f} GB/s" for n, r in values["rows"].items())])
    return "\n".join(said(values))


def said(values: dict[str, Any]) -> list[str]:
    """A sentence a format."""
    return [f"{name}: differs from the same seed's fp32 curve by {v['ratio']:.2f} of what fp32 "
            f"curves of two seeds differ by (root mean square); inside the range of fp32 curves at "
            f"{v['inside']:.0f} of {v['steps']} steps, fp32 curves inside each other's at "
            f"{v['fp32_inside']:.0f}: {'within' if v['passed'] else 'NOT within'} the seed-to-seed "
            "spread" for name, v in verdicts(values).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="optimizer states in fewer bits")
    parser.add_argument("what", choices=("sweep", "curves"))
    parser.add_argument("--model", default="deeperforward/resnet17")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="options")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--formats", type=lambda text: ["fp32", *text.split(",")],
                        default=list(FORMATS), help="e.g. 8bit,bf16; fp32 is always among them")
    parser.add_argument("--lr", type=float, help="default: the recipe's")
    parser.add_argument("--square", type=int, default=1, help="pixels of a prototype that are "
                        "equal: deep networks see little of white noise in 200 steps")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--memory-budget")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="default: bench/results/states_WHAT.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    options = assignments(args.options, "--set")
    values = (sweep if args.what == "sweep" else curves)(args, options)
    print(report(values))
    path = args.json or Path("bench/results") / f"states_{args.what}.json"
    results.write(path, f"states-{args.what}", values)
    if args.what == "curves":
        picture(path.with_suffix(".png"), values)


if __name__ == "__main__":
    main()
