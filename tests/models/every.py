"""Every registered network at a size that trains in milliseconds, and a trainer for it."""

from __future__ import annotations

from typing import Any

import torch

import ffengine as ff
from ffengine.nn import LocalNet
from tests.engine.training import grouped

TINY: dict[str, dict[str, Any]] = {
    "cafo/cnn": {"image_size": 8, "width": 2},
    "cff/fixed": {"image_size": 8, "layers": (20, 16)},
    "cff/adaptive": {"image_size": 8, "layers": (20, 16)},
    "cwcomp/cfse": {"image_size": 8, "channels": (10, 20, 10, 20), "ilt": "none"},
    "cwcomp/ffcnn": {"image_size": 8, "channels": (10, 20, 10, 20), "predictor": "softmax",
                     "ilt": "none"},
    "deeperforward/cnn14": {"image_size": 16, "widths": (10, 10, 20, 20, 20)},
    "deeperforward/resnet17": {"image_size": 8, "planes": (10, 20, 40, 80)},
    "deeperforward/resnet33": {"image_size": 8, "planes": (10, 20, 40, 80),
                               "counts": (1, 1, 2, 1)},
    "deeperforward/resnet100": {"image_size": 16, "planes": (10, 10, 20, 20),
                                "counts": (1, 1, 2, 1)},
    "deeperforward/tinycnn": {"image_size": 8, "widths": (10, 20, 20, 20)},
    "fflib/ffnn": {"image_size": 8, "layers": (20, 16), "theta": 2.0},
    "fflib/ffnn-c": {"image_size": 8, "layers": (20, 16), "theta": 2.0},
    "fflib/ffrnn": {"image_size": 8, "layers": (20, 16), "theta": 2.0, "frames": 2,
                    "test_frames": (0, 3)},
    "hinton/peer-norm": {"image_size": 8, "layers": (20, 16, 16)},
    "hinton/threshold": {"image_size": 8, "layers": (20, 16)},
    "sn/cifar10": {"image_size": 8, "widths": (10, 10, 20, 20)},
    "sn/cifar100": {"image_size": 8, "widths": (5, 10, 10, 10, 20, 20, 20),
                    "superclasses": (0, 1, 2, 3, 4, 4, 3, 2, 1, 0)},
    "sn/mlp": {"image_size": 8, "layers": (20, 20)},
    "symba/mlp": {"image_size": 8, "layers": (20, 16, 16)},
    "trifecta/deep": {"image_size": 8, "widths": (4, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8)},
    "trifecta/fcn": {"image_size": 8, "width": 16, "depth": 4},
    "trifecta/shallow": {"image_size": 8, "widths": (4, 6, 8, 8, 8, 8)},
}
#: Networks of backpropagation that are no model's twin.
OPPONENTS: dict[str, dict[str, Any]] = {
    "bp/deeperforward/resnet18": {"image_size": 8, "widths": (4, 6, 8, 8), "counts": (1, 2, 1, 1)},
    "bp/fflib/bpnn": {"image_size": 8, "layers": (20, 16)},
}
#: Other papers' methods, which tests/baselines looks at.
COMPARATORS: dict[str, dict[str, Any]] = {
    "baselines/blockwise": {"image_size": 8, "channels": (6, 8), "pools": (2,), "layers": (16,)},
    "baselines/cafo": {"image_size": 8, "channels": (6,), "pools": (1,), "layers": (16,)},
    "baselines/cfse": {"image_size": 8, "channels": (10, 20), "pools": (2,)},
    "baselines/deeperforward": {"image_size": 8, "channels": (10,), "pools": (1,),
                                "layers": (20,)},
    "baselines/dfa": {"image_size": 8, "layers": (20, 16)},
    "baselines/drtp": {"image_size": 8, "channels": (6,), "layers": (16,), "frozen": True},
    "baselines/fa": {"image_size": 8, "channels": (6,), "layers": (20, 16)},
    "baselines/ffconv": {"image_size": 8, "channels": (6, 8), "pools": (2,), "layers": (16,)},
    "baselines/pepita": {"image_size": 8, "channels": (6,), "layers": (20, 16), "kernel": 3},
}
NAMES = [name for name in ff.models.names() if not name.startswith("baselines/")]


def options(name: str) -> dict[str, Any]:
    own = {**COMPARATORS, **OPPONENTS}
    small = own[name] if name in own else TINY[name.removeprefix("bp/")]
    return {"num_classes": 10, "in_channels": 1, **small}


def network(name: str, seed: int = 0, **changed: Any) -> LocalNet:
    torch.manual_seed(seed)
    return ff.models.create(name, **{**options(name), **changed})


def trainer(net: LocalNet, **settings: Any) -> ff.Trainer:
    return grouped(net, **{"epochs": 2, "lr": 0.01, "progress": False, **settings})


def batch(net: LocalNet, n: int = 8, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = next(net.parameters())
    return (torch.rand(n, *net.in_shape, generator=generator).to(weight.dtype),
            torch.randint(net.num_classes, (n,), generator=generator))


def state(net: LocalNet) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def moved(before: dict[str, torch.Tensor], net: LocalNet) -> set[str]:
    """Names of the parameters and buffers that a step changed."""
    return {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
