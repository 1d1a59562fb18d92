"""Groups of neurons as layers, and the networks they form."""

from ffengine.nn.layers import LocalConv2d, LocalLayer, LocalLinear
from ffengine.nn.network import LocalNet, Wire

__all__ = ["LocalConv2d", "LocalLayer", "LocalLinear", "LocalNet", "Wire"]
