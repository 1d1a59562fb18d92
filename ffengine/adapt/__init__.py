"""Changing a trained network: which layers are read, which are dropped."""

from ffengine.adapt.sip import SipResult, prune, select

__all__ = ["SipResult", "prune", "select"]
