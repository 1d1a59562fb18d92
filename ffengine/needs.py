"""Modules that load when they are used: ours through `load`, packages that only some commands use
through `need`.
"""

from __future__ import annotations

import gc
import importlib
from types import ModuleType

#: Top-level module -> what installs it, where the two names differ.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def need(module: str, who: str) -> ModuleType:
    """The module, imported now.

    Args:
        module: its dotted name.
        who: what cannot do without it, e.g. "[data] digits"; the error begins with it.

    Raises:
        ImportError: one line that names the package to install.
    """
    top = module.partition(".")[0]
    package = PACKAGES.get(top, top)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = (error.name or "").partition(".")[0] == top
        why = "" if absent else f" (it is there, but does not import: {error})"
        raise ImportError(f"{who} needs {package}: pip install {package}{why}") from error


def load(module: str) -> ModuleType:
    """A module of ours, imported now.

    Modules are no garbage: collections rest meanwhile, a full one walks all that torch holds (90 of
    260 ms between `import torch` and the first use of Trainer).
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if collected:
            gc.enable()
