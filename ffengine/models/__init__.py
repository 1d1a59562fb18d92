"""The networks of the papers, by name."""

from ffengine.models import baselines as baselines
from ffengine.models import cafo as cafo
from ffengine.models import cff as cff
from ffengine.models import cwcomp as cwcomp
from ffengine.models import deeperforward as deeperforward
from ffengine.models import fflib as fflib
from ffengine.models import hinton as hinton
from ffengine.models import sn as sn
from ffengine.models import symba as symba
from ffengine.models import trifecta as trifecta
from ffengine.models.backprop import register_twins
from ffengine.models.registry import Recipe, create, entry, names

register_twins()

__all__ = ["Recipe", "create", "entry", "names"]
