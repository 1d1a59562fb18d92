"""The authors' own training steps, from a checkout of their code that the caller names.

Wired: DeeperForward (folder with model/), FFLib (its package under src/ or there), Trifecta (folder
with main.py). Nothing of theirs is kept here; their networks are built as their scripts build
them, at our sizes, with their own optimizer settings where they take none.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffengine.nn import LocalNet
from ffengine.ops.weight_update import OptimConfig

DEEPERFORWARD = {"deeperforward/resnet17": ("model.resnet", "Resnet"),
                 "deeperforward/cnn14": ("model.vgg", "Vgg"),
                 "deeperforward/tinycnn": ("model.tinycnn", "TinyCNN")}
TRIFECTA = {"trifecta/shallow": "small", "trifecta/deep": "large"}
WIRED = (*DEEPERFORWARD, "fflib/ffnn", *TRIFECTA)


@dataclass
class AuthorsStep:
    """runs: one batch each, in turn; of different work where their code alternates."""

    runs: Sequence[Callable[[], Any]]
    modules: torch.nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    note: str = ""

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Parameters and optimizer states, for the meter."""
        states = [t for o in self.optimizers for s in o.state.values() for t in s.values()
                  if isinstance(t, torch.Tensor) and t.dim()]
        return {"parameter": [p.detach() for p in self.modules.parameters()], "state": states}


def authors_step(model: str, net: LocalNet, checkout: Path, x: torch.Tensor, y: torch.Tensor,
                 optim: OptimConfig, dtype: torch.dtype) -> AuthorsStep:
    """Their step of this model on the batch (x, y), `net` giving sizes.

    Raises:
        ValueError: a model without published code that is wired here, or another checkout.
    """
    if model in DEEPERFORWARD:
        made = deeperforward(model, net, checkout, x, y, optim)
    elif model == "fflib/ffnn":
        made = fflib(net, checkout, x, y, optim)
    elif model in TRIFECTA:
        made = trifecta(TRIFECTA[model], net, checkout, x, y, optim)
    else:
        raise ValueError(f"[bench] the authors' code is wired for {', '.join(WIRED)}, got {model}")
    if dtype is not torch.float32:
        made.runs = [cast(run, x.device.type, dtype) for run in made.runs]
    return made


def cast(run: Callable[[], Any], device: str, dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        with torch.autocast(device, dtype):
            run()
    return call


def expect(checkout: Path, name: str) -> Path:
    """The checkout's file or folder; ValueError without it."""
    if not (checkout / name).exists():
        raise ValueError(f"[bench] expected a checkout with {name}, got {checkout}")
    return checkout / name


def deeperforward(model: str, net: LocalNet, checkout: Path, x: torch.Tensor, y: torch.Tensor,
                  optim: OptimConfig) -> AuthorsStep:
    expect(checkout, "model")
    module, name = DEEPERFORWARD[model]
    sys.path.insert(0, str(checkout))
    options: dict[str, Any] = {"learning_rate": optim.lr}
    if name == "Resnet":
        options |= {"weight_decay": optim.weight_decay, "planes": [100, 200, 400, 800]}
    theirs = getattr(importlib.import_module(module), name)(
        dropout=net.layer(0).dropout, **options).to(x.device)
    return AuthorsStep([lambda: theirs.update([(x, y)])], theirs, theirs.optimizers)


def fflib_net(path: Path, net: LocalNet, theta: float, lr: float) -> Any:
    """FFLib's own network with our initial weights."""
    for folder in (path / "src", path):
        if (folder / "fflib").is_dir():
            sys.path.insert(0, str(folder))
            break
    else:
        expect(path, "src/fflib")
    linear = importlib.import_module("fflib.nn.ff_linear").FFLinear
    layers = []
    for i in range(len(net.layers)):
        layer = net.layer(i)
        theirs = linear(layer.weight.shape[1], layer.weight.shape[0], theta, lr)
        with torch.no_grad():
            theirs.weight.copy_(layer.weight)
            theirs.bias.copy_(layer.bias)
        layers.append(theirs)
    return importlib.import_module("fflib.nn.ff_net").FFNet(layers, None)


def fflib_run(theirs: Any, x: torch.Tensor, y: torch.Tensor, other: torch.Tensor,
              classes: int) -> None:
    """Their step on images and two labels each."""
    rows = [torch.nn.functional.one_hot(t, classes).float() for t in (y, other)]
    theirs.run_train_combined(*(torch.cat([x.flatten(1), r], 1) for r in rows))


def fflib(net: LocalNet, checkout: Path, x: torch.Tensor, y: torch.Tensor,
          optim: OptimConfig) -> AuthorsStep:
    theirs = fflib_net(checkout, net, net.layer(0).config.loss.p[0],  # type: ignore[union-attr]
                       optim.lr).to(x.device)
    classes = net.num_classes

    def run() -> None:
        fflib_run(theirs, x, y, wrong_labels(y, classes), classes)

    return AuthorsStep([run], theirs, [layer.opt for layer in theirs.layers],
                       "Adam, as their layers have it")


def wrong_labels(y: torch.Tensor, classes: int) -> torch.Tensor:
    """A random other label each."""
    return (y + torch.randint_like(y, 1, classes)) % classes


def trifecta(size: str, net: LocalNet, checkout: Path, x: torch.Tensor, y: torch.Tensor,
             optim: OptimConfig) -> AuthorsStep:
    """Even and odd batches in turn: their losses alternate between layers."""
    found = expect(checkout, "main.py")
    spec = importlib.util.spec_from_file_location("trifecta_main", found)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules["trifecta_main"] = code  # their dataclass looks its module up
    with substitutes("lightning", "torchmetrics", "torchvision", "torchvision.datasets",
                     "torchvision.transforms"):
        spec.loader.exec_module(code)
    config = code.Config(lr=optim.lr, model=size, dataset="cifar10", bn=True, olu=True)
    theirs = code.Network(config, net.num_classes, net.in_shape[-1]).to(x.device)
    theirs.train()

    def run(iteration: int) -> None:
        other = wrong_labels(y, net.num_classes)
        theirs(torch.cat([x, x]), torch.cat([y, other]), iteration)

    return AuthorsStep([lambda: run(2), lambda: run(3)], theirs,
                       [layer.optimizer for layer in theirs.layers],
                       "Adam, as their blocks have it")


class Substitute(types.ModuleType):
    """A module that has every name: an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def substitutes(*names: str) -> Iterator[None]:
    """What their file imports for data and logging, and its training step does not touch, stands
    in as empty modules where it is not installed."""
    absent = [n for n in names if n not in sys.modules
              and importlib.util.find_spec(n.partition(".")[0]) is None]
    sys.modules.update({n: Substitute(n) for n in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
