"""Test accuracy on the bundled digits, engine against the unfused step, same splits and seeds.

    python -m bench.digits [--epochs 15] [--seeds 0 1 2 3 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import ffengine as ff
from bench import results
from ffengine.adapt import select
from ffengine.baselines.steps import UnfusedStep
from ffengine.engine.run.evaluation import accuracy
from ffengine.models.registry import entry

MODEL = "deeperforward/tinycnn"


def loaders(seed: int, batch: int) -> list[Any]:
    splits = ff.data.load("digits")
    train = ff.data.loader(splits.train, batch_size=batch, shuffle=True, seed=seed)
    rest = (splits.valid, splits.test)
    return [train, *(ff.data.loader(part, batch_size=batch) for part in rest)]


def network(seed: int) -> Any:
    torch.manual_seed(seed)
    return ff.models.create(MODEL, in_channels=1, image_size=8)


def ours(seed: int, epochs: int) -> float:
    """Test accuracy of the engine's recipe."""
    net, recipe = network(seed), entry(MODEL).recipe_for("digits")
    train, valid, test = loaders(seed, recipe.batch_size)
    trainer = ff.Trainer(net, recipe=recipe, epochs=epochs, seed=seed, progress=False)
    trainer.fit(train, valid)
    return trainer.evaluate(test)


def unfused(seed: int, epochs: int) -> float:
    """The same recipe through plain autograd, a layer at a time; SIP once, at the end."""
    net, recipe = network(seed), entry(MODEL).recipe_for("digits")
    train, valid, test = loaders(seed, recipe.batch_size)
    trainer = ff.Trainer(net, recipe=recipe, epochs=epochs, seed=seed, progress=False)
    contender = UnfusedStep(net, trainer.settings.optim(), fused=True, channels_last=True)
    for epoch in range(epochs):
        rate = trainer.rate.move_to(epoch)
        for optimizer in contender.optimizers():
            optimizer.param_groups[0]["lr"] = rate
        train.set_epoch(epoch)
        net.train()
        for x, y in train:
            contender.step(x, y)
    select(net, valid)
    return accuracy(net, test, "auto")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.digits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        row: dict[str, Any] = {"seed": seed}
        for name, run in (("ffengine", ours), ("unfused", unfused)):
            start = time.perf_counter()
            row[name] = run(seed, args.epochs)
            row[f"{name}_seconds"] = time.perf_counter() - start
        rows.append(row)
        print(f"seed {seed}: ffengine {row['ffengine']:.4f} in {row['ffengine_seconds']:.1f} s, "
              f"unfused {row['unfused']:.4f} in {row['unfused_seconds']:.1f} s", flush=True)
    means = {name: statistics.mean(r[name] for r in rows) for name in ("ffengine", "unfused")}
    print(f"mean: ffengine {means['ffengine']:.4f}, unfused {means['unfused']:.4f}")
    if args.json:
        results.write(args.json, "digits", {"model": MODEL, "epochs": args.epochs, "means": means,
                                            "rows": rows})


if __name__ == "__main__":
    main()
