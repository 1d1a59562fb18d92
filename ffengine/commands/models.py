"""`ffengine models`: the networks by name. Apart from other commands, which load far more."""

from __future__ import annotations

import argparse

from ffengine import models


def run_models(args: argparse.Namespace) -> tuple[str, list[dict[str, str]]]:
    found = [{"name": name, "paper": models.entry(name).paper} for name in models.names()]
    return "\n".join(f"{row['name']:28s}{row['paper']}" for row in found), found
