"""Changing a trained network: which layers are read, which neurons there are."""

from ffengine.adapt.edits import (
    Edit,
    add_units,
    apply,
    invert,
    remove_units,
    reorder_units,
    restructure,
)
from ffengine.adapt.sip import SipResult, prune, select

__all__ = ["Edit", "SipResult", "add_units", "apply", "invert", "prune", "remove_units",
           "reorder_units", "restructure", "select"]
