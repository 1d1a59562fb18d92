"""FFNN 784-2000-2000's training step, ours against the authors' own code, and prediction.

    python -m bench.fflib [--authors PATH] [--batch-size 128] [--rounds 15] [--json FILE]

PATH is a checkout of FFLib (its package lies under src/ or there). Both sides start from the same
weights and see the same batches; their weights are compared after three steps before anything is
timed. Prediction: all labels in one bounded pass, against one forward a label.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ffengine as ff
from bench import machine, results
from bench.authors import fflib_net, fflib_run
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.nn import LocalNet

CLASSES, WIDTHS, THETA, LR = 10, (2000, 2000), 20.0, 0.02


def network() -> LocalNet:
    torch.manual_seed(0)
    return ff.models.create("fflib/ffnn", layers=WIDTHS, theta=THETA)


def batches(count: int, batch: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [(torch.rand(batch, 1, 28, 28, generator=source),
             torch.randint(CLASSES, (batch,), generator=source),
             torch.randint(CLASSES, (batch,), generator=source)) for _ in range(count)]


def authors_net(path: str, net: LocalNet) -> Any:
    """FFLib's own network with our initial weights."""
    return fflib_net(Path(path), net, THETA, LR)


def steps(net: LocalNet, theirs: Any | None,
          data: list[Any]) -> dict[str, Callable[[], object]]:
    """One training step of each side on the data's batches in turn."""
    trainer = ff.Trainer(net, lr=LR, batch_size=len(data[0][0]), progress=False)
    turns = {"ours": 0, "authors": 0}

    def following(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        turns[name] += 1
        return data[turns[name] % len(data)]

    def ours() -> None:
        x, y, other = following("ours")
        trainer.step({"x": x, "y": y, "negatives": other})

    def authors() -> None:
        fflib_run(theirs, *following("authors"), CLASSES)

    return {"ours": ours, **({"authors": authors} if theirs is not None else {})}


def same_trajectory(net: LocalNet, theirs: Any, data: list[Any]) -> float:
    """Largest goodness difference, relative, after three steps of both from the same weights."""
    sides = steps(net, theirs, data[:3])
    for _ in range(3):
        for step in sides.values():
            step()
    x = data[0][0]
    with torch.no_grad():
        rows = torch.eye(CLASSES)
        ours = net.goodness(x)
        worst = 0.0
        for k in range(CLASSES):
            z = torch.cat([x.flatten(1), rows[k].expand(len(x), -1)], 1)
            for i, layer in enumerate(theirs.layers):
                z = layer(z)
                want = z.pow(2).mean(1)
                worst = max(worst, float(((ours[i][:, k] - want).abs() / want.abs()).max()))
    return worst


def one_by_one(net: LocalNet, x: torch.Tensor) -> torch.Tensor:
    """Scores by one forward a label."""
    with torch.no_grad():
        columns = [net.readout.of_goodness(
            net.run(net.prepare(x, torch.full((len(x),), k)))) for k in range(CLASSES)]
        return torch.cat(columns, 1)


def prediction(net: LocalNet, counts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Try-all-labels, batched against one forward a label, for some numbers of images."""
    out = []
    for count in counts:
        x = torch.rand(count, 1, 28, 28)
        assert torch.allclose(net(x), one_by_one(net, x), rtol=1e-4)
        with MemoryMeter(parameter=net.parameters(), feature=[x]) as meter:
            net(x)
        times = machine.interleaved({"batched": lambda x=x: net(x),
                                     "one by one": lambda x=x: one_by_one(net, x)}, rounds, 2)
        gain = 1 / machine.ratio(times["batched"], times["one by one"])
        known = sum(p.numel() * 4 for p in net.parameters()) + x.numel() * 4
        out.append({"images": count, "gain": gain, "extra_bytes": meter.report.peak_bytes - known,
                    **{k: machine.spread(v) for k, v in times.items()}})
        print(f"{count:5d} images: batched {out[-1]['batched']['median'] * 1e3:8.2f} ms, one by "
              f"one {out[-1]['one by one']['median'] * 1e3:8.2f} ms: {gain:.2f} x, extra "
              f"{out[-1]['extra_bytes'] / 1e6:.1f} MB")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", help="checkout of FFLib")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    result: dict[str, Any] = {"batch": args.batch_size}
    data = batches(8, args.batch_size)
    theirs = authors_net(args.authors, network()) if args.authors else None
    if theirs is not None:
        result["goodness_difference"] = same_trajectory(network(), theirs, data)
        print(f"after three steps goodness differs by {result['goodness_difference']:.1e}")
        if not result["goodness_difference"] < 1e-3:
            raise SystemExit("[bench] the trajectories differ; nothing was timed")
        theirs = authors_net(args.authors, network())
    times = machine.interleaved(steps(network(), theirs, data), args.rounds, 3)
    result["step"] = {k: machine.spread(v) for k, v in times.items()}
    print({k: f"{v['median'] * 1e3:.1f} ms" for k, v in result["step"].items()})
    if theirs is not None:
        result["gain"] = 1 / machine.ratio(times["ours"], times["authors"])
        print(f"step {result['gain']:.2f} x as fast as the authors'")
    result["prediction"] = prediction(network(), (1, 2, 4, 16, 128, 1000), args.rounds)
    if args.json:
        results.write(Path(args.json), "fflib", result)


if __name__ == "__main__":
    main()
