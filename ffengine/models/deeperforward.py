"""DeeperForward (Sun et al., ICLR 2025): mean goodness, group normalisation, deep CNNs.

Tables 1, 2, 7; appendix A and B. Deviations kept from the published code: relu gates the
gradient (paper eq. 6 does not; `relu_gradient="straight_through"`), AdamW with decay 0.01 for
TinyCNN and 5e-4 for the ResNets, Adam without decay for CNN-14 (paper: Adam, 5e-4), the first
layer's goodness is left out of the default score, the input passes a layer norm.
"""

from __future__ import annotations

from typing import Any, Literal

from ffengine.models.registry import Recipe, register
from ffengine.nn import LocalConv2d, LocalNet, Wire
from ffengine.nn.checks import as_many
from ffengine.nn.residual import Row, residual_blocks
from ffengine.ops.config import LocalPassConfig, Norm

#: Of the others the code takes the set's own; a layer norm of every image follows.
SCALE = {"cifar100": (0.5, 0.5)}
PLANES = (100, 200, 400, 800)


def _config(num_classes: int, goodness: str, relu_gradient: str) -> LocalPassConfig:
    """Mean goodness and group norm; the ablation (eq. 2) squares and divides by the length.

    "mean_sq" is 1/m of the sum that eq. 2 prints, "sum_sq" that sum.
    """
    norm = Norm("group") if goodness == "mean" else Norm("length", scope="group")
    return LocalPassConfig(groups=num_classes, goodness=goodness, norm=norm,  # type: ignore[arg-type]
                           relu_gradient=relu_gradient)  # type: ignore[arg-type]


def chain(rows: list[Row], wires: list[Wire], *, num_classes: int,
          in_shape: tuple[int, int, int], dropout: float = 0.2, bias: bool = False,
          goodness: Literal["mean", "mean_sq", "sum_sq"] = "mean",
          relu_gradient: Literal["masked", "straight_through"] = "masked") -> LocalNet:
    """A network from rows of (in channels, out channels, kernel, stride)."""
    config = _config(num_classes, goodness, relu_gradient)
    layers = [LocalConv2d(i, o, k, stride=s, bias=bias, dropout=dropout, config=config)
              for i, o, k, s in rows]
    return LocalNet(layers, wires, num_classes=num_classes, in_shape=in_shape)


@register("deeperforward/tinycnn", paper="DeeperForward",
          recipe=Recipe(optimizer="adamw", lr=0.08, lr_min=0.008, weight_decay=0.01),
          shared=chain, scale=SCALE)
def tinycnn(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
            widths: tuple[int, ...] = (100, 200, 400, 400), **options: Any) -> LocalNet:
    """5x5 conv 100; avgpool, 5x5 conv 200; avgpool, 3x3 conv 400; 3x3 conv 400."""
    as_many("deeperforward", "widths", widths, 4)
    ins = (in_channels, *widths[:-1])
    rows = [(i, o, k, 1) for i, o, k in zip(ins, widths, (5, 5, 3, 3), strict=True)]
    wires = [Wire(pool_before=p) for p in (False, True, True, False)]
    return chain(rows, wires, num_classes=num_classes,
                 in_shape=(in_channels, image_size, image_size), **options)


@register("deeperforward/cnn14", paper="DeeperForward",
          recipe=Recipe(optimizer="adam", lr=0.08, lr_min=0.008, weight_decay=0.0,
                        lr_epochs=150), digits={"epochs": 10}, shared=chain, scale=SCALE)
def cnn14(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
          widths: tuple[int, ...] = (70, 140, 280, 560, 560), **options: Any) -> LocalNet:
    """VGG-like, 3x3: 70,70 | 140x3 | 280x3 | 560x3 | 560x3, average pool before each bar."""
    as_many("deeperforward", "widths", widths, 5)
    rows, wires, last = [], [], in_channels
    for stage, (width, count) in enumerate(zip(widths, (2, 3, 3, 3, 3), strict=True)):
        for j in range(count):
            rows.append((last, width, 3, 1))
            wires.append(Wire(pool_before=stage > 0 and j == 0))
            last = width
    return chain(rows, wires, num_classes=num_classes,
                 in_shape=(in_channels, image_size, image_size), **options)


RESNET = Recipe(optimizer="adamw", lr=0.08, lr_min=0.008, weight_decay=5e-4)


@register("deeperforward/resnet17", paper="DeeperForward", recipe=RESNET, shared=chain,
          digits={"epochs": 6}, scale=SCALE)
def resnet17(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
             planes: tuple[int, ...] = PLANES, shortcuts: bool = True, scale: int = 1,
             **options: Any) -> LocalNet:
    """Stem 3x3, four stages of four 3x3 convs, stride 2 into stages 2-4 (published `Resnet`).

    The concatenation stands at a stage's end; its pooled copy is the next stage's shortcut. The
    last stage's concatenation is computed by nobody, since no layer reads it. `scale=3` is CHx3.
    Without shortcuts (the ablation) a stage's input is the previous stage's width.
    """
    planes = tuple(p * scale for p in planes)
    rows, wires, last = [(in_channels, planes[0], 3, 1)], [Wire(branch=shortcuts)], planes[0]
    for stage, width in enumerate(planes):
        for j in range(4):
            rows.append((last, width, 3, 2 if stage and j == 0 else 1))
            last = width
            wires.append(Wire())
        if shortcuts:
            end = stage == len(planes) - 1
            wires[-3] = Wire(join="add", branch=True)
            wires[-1] = Wire() if end else Wire(join="concat", branch=True, branch_pool=True)
            last = width if end else 2 * width
    return chain(rows, wires, num_classes=num_classes,
                 in_shape=(in_channels, image_size, image_size), **options)


@register("deeperforward/resnet33", paper="DeeperForward", recipe=RESNET, shared=chain,
          digits={"epochs": 5}, scale=SCALE)
def resnet33(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
             planes: tuple[int, ...] = PLANES, counts: tuple[int, ...] = (3, 4, 6, 3),
             shortcuts: bool = True, scale: int = 1, **options: Any) -> LocalNet:
    """ResNet-34 without its head: basic blocks {3, 4, 6, 3} (appendix D)."""
    rows, wires = residual_blocks(in_channels, tuple(p * scale for p in planes), counts,
                                  bottleneck=False, shortcuts=shortcuts)
    return chain(rows, wires, num_classes=num_classes,
                 in_shape=(in_channels, image_size, image_size), **options)


@register("deeperforward/resnet100", paper="DeeperForward", recipe=RESNET, shared=chain,
          digits={"epochs": 5}, scale=SCALE)
def resnet100(num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
              planes: tuple[int, ...] = PLANES, counts: tuple[int, ...] = (3, 4, 23, 3),
              shortcuts: bool = True, scale: int = 1, **options: Any) -> LocalNet:
    """ResNet-101 without its head: bottlenecks 1-3-1, x4 expansion, {3, 4, 23, 3}."""
    rows, wires = residual_blocks(in_channels, tuple(p * scale for p in planes), counts,
                                  bottleneck=True, shortcuts=shortcuts)
    return chain(rows, wires, num_classes=num_classes,
                 in_shape=(in_channels, image_size, image_size), **options)
