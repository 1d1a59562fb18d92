"""`pytest -p tests.aarch64.plugin`: whatever is collected runs on the kernels built for aarch64."""

from __future__ import annotations

import importlib.util
import os
import sys

from tests.aarch64.build import BUILD, guest_command


def load() -> None:
    """ffengine._C becomes the module that forwards its calls to the guest."""
    os.environ["FFENGINE_GUEST"] = guest_command()
    spec = importlib.util.spec_from_file_location("ffengine._C", BUILD / "_C.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["ffengine._C"] = module


load()
