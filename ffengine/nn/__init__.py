"""Groups of neurons as layers, and the networks they form."""

from ffengine.nn.chain import Wire
from ffengine.nn.collaborative import CollaborativeNet
from ffengine.nn.encoding import Concat, LabelChannel, LabelEncoding, Overlay
from ffengine.nn.heads import LinearHead
from ffengine.nn.layers import LocalConv2d, LocalLayer, LocalLinear
from ffengine.nn.network import LocalNet
from ffengine.nn.norms import PreNorm
from ffengine.nn.readout import Readout
from ffengine.nn.recurrent import RecurrentNet

__all__ = ["CollaborativeNet", "Concat", "LabelChannel", "LabelEncoding", "LinearHead",
           "LocalConv2d", "LocalLayer", "LocalLinear", "LocalNet", "Overlay", "PreNorm", "Readout",
           "RecurrentNet", "Wire"]
