"""Run a module under the stub driver; see the package."""

import runpy
import sys
import tempfile
from pathlib import Path

from tests import stub_driver

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        stub_driver.DRIVER = stub_driver.install(Path(folder))
        module, sys.argv = sys.argv[1], sys.argv[1:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
