"""SymBa's MLP: Trifecta's symmetric loss on 3 x 2000 units (Lee & Song 2023).

Deviation: alpha (g_pos - g_neg) with the sign of Trifecta's code; its paper prints the opposite.
"""

from __future__ import annotations

from ffengine.engine.schedules.schedule import Together
from ffengine.models.registry import Recipe, register
from ffengine.nn import LocalNet
from ffengine.nn.overlay import overlay_mlp
from ffengine.ops.config import LocalPassConfig, symba


@register("symba/mlp", paper="SymBa", recipe=Recipe(optimizer="adam", lr=1e-3, epochs=120),
          digits={"epochs": 20, "lr": 0.1, "lr_min": 0.01})
def mlp(num_classes: int = 10, in_channels: int = 1, image_size: int = 28,
        layers: tuple[int, ...] = (2000, 2000, 2000), alpha: float = 4.0,
        negatives: str = "random") -> LocalNet:
    """Label overlay, length-normalised linear layers, softplus(-alpha (g_pos - g_neg)) a pair."""
    config = LocalPassConfig(groups=1, goodness="mean_sq", loss=symba(alpha))
    net = overlay_mlp(LocalNet, num_classes, (in_channels, image_size, image_size), layers, config,
                      negatives)
    net.schedule = Together()
    return net
