"""SymBa's MLP: Trifecta's symmetric loss on 3 x 2000 units (Lee & Song 2023).

Deviation: alpha (g_pos - g_neg) with the sign of Trifecta's code; its paper prints the opposite.
"""

from __future__ import annotations

from ffengine.engine.schedule import Together
from ffengine.models.registry import Recipe, register
from ffengine.nn import LocalLinear, LocalNet, Overlay
from ffengine.ops.config import LocalPassConfig, Norm, symba

L2 = Norm("length", eps=1e-4, length="l2")


@register("symba/mlp", paper="SymBa", recipe=Recipe(optimizer="adam", lr=1e-3, epochs=120),
          digits={"epochs": 20, "lr": 0.1, "lr_min": 0.01})
def mlp(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
        layers: tuple[int, ...] = (2000, 2000, 2000), alpha: float = 4.0,
        negatives: str = "random") -> LocalNet:
    """Label overlay, length-normalised linear layers, softplus(-alpha (g_pos - g_neg)) a pair."""
    config = LocalPassConfig(groups=1, goodness="mean_sq", loss=symba(alpha), norm=L2)
    encoding = Overlay(num_classes, (in_channels, image_size, image_size), value="max")
    ins = (encoding.shape[0], *layers[:-1])
    net = LocalNet([LocalLinear(i, o, config=config, init="torch")
                    for i, o in zip(ins, layers, strict=True)],
                   num_classes=num_classes, in_shape=encoding.in_shape, input_norm=L2,
                   layer_range=(0, len(layers) - 1), encoding=encoding, negatives=negatives)
    net.schedule, net.selects_range = Together(), False
    return net
