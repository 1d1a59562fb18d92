"""The networks of the papers, by name."""

from ffengine.models import deeperforward as deeperforward
from ffengine.models.registry import Recipe, create, entry, names

__all__ = ["Recipe", "create", "entry", "names"]
