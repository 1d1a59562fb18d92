"""What the README tells people to write does run."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import ffengine as ff

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(),
                    re.DOTALL)


def block(word: str) -> str:
    return next(b for b in BLOCKS if word in b)


def test_own_loss() -> None:
    names: dict[str, object] = {}
    exec(block("label_smoothing"), names)
    net = ff.nn.LocalNet([names["layer"]], num_classes=10, in_shape=(3, 8, 8))
    report = ff.Trainer(net, epochs=1, progress=False).step(
        torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 9, 1]))
    assert torch.isfinite(report.losses[0])


def test_own_data() -> None:
    samples = torch.utils.data.TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 4)
    names: dict[str, object] = {"ff": ff, "train_set": samples, "test_set": samples}
    exec(block("ff.data.splits"), names)
    assert [len(names[part].image_set) for part in ("train", "valid", "test")] == [36, 4, 40]


def test_own_layer() -> None:
    splits = ff.data.load("synthetic", shape=(1, 28, 28), train=32, valid=8, test=8)
    train, valid = (ff.data.loader(s, batch_size=8) for s in (splits.train, splits.valid))
    code = block("Norm(\"length\"").replace("lr=0.01", "lr=0.01, progress=False")
    names = {"train_loader": train, "valid_loader": valid}
    exec(code, names)
    assert names["net"](torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_the_face() -> None:
    code = block("memory_budget").replace("trainer.fit(train_loader, valid_loader)", "pass")
    names = {"x": torch.randn(2, 3, 32, 32), "y": torch.tensor([1, 2])}
    exec(code, names)
    assert names["scores"].shape == (2, 10)
