"""Feedback alignment, its direct forms and PEPITA against their papers' updates in NumPy, fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import ffengine as ff
from ffengine.nn import LocalNet

ROWS, CLASSES, LR, MOMENTUM = 6, 5, 0.1, 0.9
Array = np.ndarray[Any, np.dtype[np.float64]]


def network(name: str, **options: Any) -> LocalNet:
    torch.manual_seed(0)
    return ff.models.create(name, **{"num_classes": CLASSES, "in_channels": 2, "image_size": 6,
                                     "layers": (7, 8), **options})


def trained(net: LocalNet, step: Callable[[Array, Array, dict[str, Array]], None],
            momentum: float = 0.0, still: str = "") -> None:
    """Three steps of SGD by the trainer and by `step`, which overwrites weights, end the same.

    Feedback stands still, and layer `still` if there is one; all else moves.
    """
    net.recipe = ff.models.Recipe(optimizer="sgd", lr=LR, momentum=momentum)
    t = ff.Trainer(net, epochs=1, precision="fp64", progress=False)
    slow = {n: v.detach().numpy().copy() for n, v in net.state_dict().items() if v.dim()}
    start = {n: v.copy() for n, v in slow.items()}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(ROWS, 2, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (ROWS,), generator=generator)
        torch.manual_seed(seed)
        t.step(x, y)
        torch.manual_seed(seed)
        step(x.numpy(), np.eye(CLASSES)[y.numpy()], slow)
    for name, mine in net.state_dict().items():
        if mine.dim():
            np.testing.assert_allclose(mine.numpy(), slow[name], rtol=0, atol=1e-12, err_msg=name)
            fixed = name.startswith(("feedback", "projection", "_extra", still or "-"))
            assert fixed == bool((start[name] == slow[name]).all()), name


def softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("rule", ["fa", "dfa", "drtp"])
@pytest.mark.parametrize(("activation", "loss"), [("relu", "ce"), ("tanh", "bce")])
def test_random_feedback(rule: str, activation: str, loss: str) -> None:
    """fa: d1 = B2'd2 * f'; dfa: d = B'e * f'; drtp: d = B'y* * f'; all as means over the batch."""
    act = np.tanh if activation == "tanh" else lambda a: np.maximum(a, 0)
    out = sigmoid if loss == "bce" else softmax

    def slope(a: Array) -> Array:
        return 1 - np.tanh(a)**2 if activation == "tanh" else (a > 0).astype(float)

    def step(x: Array, target: Array, p: dict[str, Array]) -> None:
        w = [p["hidden.0.weight"], p["hidden.1.weight"], p["layers.0.weight"]]
        b = [p["hidden.0.bias"], p["hidden.1.bias"], p["layers.0.bias"]]
        x = x.reshape(ROWS, -1)
        a1 = x @ w[0].T + b[0]
        h1 = act(a1)
        a2 = h1 @ w[1].T + b[1]
        h2 = act(a2)
        e = out(h2 @ w[2].T + b[2]) - target
        first, second = p["feedback_0"], p["feedback_1"]
        d2 = {"fa": e, "dfa": e, "drtp": target}[rule] @ second * slope(a2)
        d1 = {"fa": d2, "dfa": e, "drtp": target}[rule] @ first * slope(a1)
        for weight, bias, d, seen in zip(w, b, (d1, d2, e), (x, h1, h2), strict=True):
            weight -= LR * d.T @ seen / ROWS
            bias -= LR * d.sum(0) / ROWS

    trained(network(f"baselines/{rule}", activation=activation, loss=loss), step)


def correlate(x: Array, w: Array, padding: int) -> Array:
    """Convolution of x (N, C, H, W) with w (O, C, k, k), kernel tap by kernel tap."""
    x = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    side = x.shape[2] - w.shape[2] + 1
    return sum(np.einsum("nchw,oc->nohw", x[:, :, r:r + side, c:c + side], w[:, :, r, c])
               for r in range(w.shape[2]) for c in range(w.shape[3]))


def tap_gradient(x: Array, d: Array, k: int, padding: int) -> Array:
    """(O, C, k, k): d (N, O, H, W) against the input under every tap, summed over positions."""
    x = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    side = d.shape[2]
    return np.stack([np.stack([
        np.einsum("nohw,nchw->oc", d, x[:, :, r:r + side, c:c + side])
        for c in range(k)], -1) for r in range(k)], -2)


def pooled(h: Array) -> tuple[Array, Array]:
    """(2x2 maxima, 1 at each window's first maximum)."""
    n, c, s, _ = h.shape
    windows = h.reshape(n, c, s // 2, 2, s // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(
        n, c, s // 2, s // 2, 4)
    chosen = np.eye(4)[windows.argmax(-1)].reshape(n, c, s // 2, s // 2, 2, 2)
    return windows.max(-1), chosen.transpose(0, 1, 2, 4, 3, 5).reshape(h.shape)


@pytest.mark.parametrize("frozen", [False, True])
def test_targets_projected_to_a_convolution(frozen: bool) -> None:
    """DRTP on a map: the projection arrives before the pool."""
    def step(x: Array, target: Array, p: dict[str, Array]) -> None:
        a = correlate(x, p["hidden.0.weight"], 1) + p["hidden.0.bias"][:, None, None]
        z = pooled(np.tanh(a))[0].reshape(ROWS, -1)
        e = sigmoid(z @ p["layers.0.weight"].T + p["layers.0.bias"]) - target
        d = np.einsum("nk,kchw->nchw", target, p["feedback_0"]) * (1 - np.tanh(a)**2)
        p["layers.0.weight"] -= LR * e.T @ z / ROWS
        p["layers.0.bias"] -= LR * e.mean(0)
        if not frozen:
            p["hidden.0.weight"] -= LR * tap_gradient(x, d, 3, 1) / ROWS
            p["hidden.0.bias"] -= LR * d.sum((0, 2, 3)) / ROWS

    trained(network("baselines/drtp", channels=(3,), layers=(), frozen=frozen), step,
            still="hidden" if frozen else "")


def test_feedback_alignment_through_a_convolution() -> None:
    """The error returns through the pool and through B, of the next layer's shape."""
    def step(x: Array, target: Array, p: dict[str, Array]) -> None:
        w1, w2, top = (p[n] for n in ("hidden.0.weight", "hidden.1.weight", "layers.0.weight"))
        a1 = correlate(x, w1, 1) + p["hidden.0.bias"][:, None, None]
        z1, at1 = pooled(np.maximum(a1, 0))
        a2 = z1.reshape(ROWS, -1) @ w2.T + p["hidden.1.bias"]
        h2 = np.maximum(a2, 0)
        e = softmax(h2 @ top.T + p["layers.0.bias"]) - target
        d2 = e @ p["feedback_1"] * (a2 > 0)
        back = (d2 @ p["feedback_0"]).reshape(z1.shape)
        d1 = back.repeat(2, 2).repeat(2, 3) * at1 * (a1 > 0)
        for name, d, grad in (("layers.0", e, e.T @ h2),
                              ("hidden.1", d2, d2.T @ z1.reshape(ROWS, -1)),
                              ("hidden.0", d1, tap_gradient(x, d1, 3, 1))):
            p[f"{name}.weight"] -= LR * grad / ROWS
            p[f"{name}.bias"] -= LR * d.sum((0, 2, 3) if d.ndim == 4 else 0) / ROWS

    trained(network("baselines/fa", channels=(3,), layers=(7,)), step)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_pepita(dropout: float) -> None:
    """Algorithm 1, momentum as torch has it, one mask for both passes."""
    speed: dict[str, Array] = {}

    def step(x: Array, target: Array, p: dict[str, Array]) -> None:
        w = [p["hidden.0.weight"], p["hidden.1.weight"], p["layers.0.weight"]]
        masks = [(torch.rand(ROWS, n) >= dropout).double().numpy() / (1 - dropout)
                 if dropout else 1.0 for n in (7, 8)]
        x = x.reshape(ROWS, -1)

        def run(x: Array) -> tuple[list[Array], Array]:
            h = [x]
            for weight, mask in zip(w[:2], masks, strict=True):
                h.append(np.maximum(h[-1] @ weight.T, 0) * mask)
            return h, softmax(h[-1] @ w[2].T)

        h, out = run(x)
        e = out - target
        changed, _ = run(x + e @ p["projection"].T)
        deltas = [(h[1] - changed[1]).T @ changed[0], (h[2] - changed[2]).T @ changed[1],
                  e.T @ changed[2]]
        for name, weight, delta in zip("abc", w, deltas, strict=True):
            speed[name] = MOMENTUM * speed.get(name, 0.0) + delta / ROWS
            weight -= LR * speed[name]

    net = network("baselines/pepita", dropout=dropout)
    net.get_buffer("projection").mul_(30)  # of an input this small, or hardly a unit would change
    trained(net, step, MOMENTUM)


def test_pepita_in_a_convolution() -> None:
    """A kernel learns at every position it stands at, and takes the mean of what it learns."""
    def step(x: Array, target: Array, p: dict[str, Array]) -> None:
        w, top = p["hidden.0.weight"], p["layers.0.weight"]

        def run(x: Array) -> tuple[Array, Array]:
            h = np.maximum(correlate(x, w, 0), 0)
            return h, pooled(h)[0].reshape(ROWS, -1)

        h, z = run(x)
        e = softmax(z @ top.T) - target
        modulated = x + (e @ p["projection"].T).reshape(x.shape)
        changed, z = run(modulated)
        delta = tap_gradient(modulated, h - changed, 3, 0) / h[0, 0].size
        w -= LR * delta / ROWS
        top -= LR * e.T @ z / ROWS

    net = network("baselines/pepita", channels=(3,), layers=(), kernel=3, dropout=0.0)
    net.get_buffer("projection").mul_(30)
    trained(net, step)
