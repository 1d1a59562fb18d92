"""Builds ffengine._C with CMake; where that cannot be done, installs without it and says so.

Environment: FFENGINE_EXTENSION=0 leaves the kernels out, =1 makes a failure to build them fatal;
FFENGINE_CUDA=0 leaves the CUDA kernels out, =1 makes it fatal that they cannot be built;
CMAKE_CUDA_ARCHITECTURES or TORCH_CUDA_ARCH_LIST choose their architectures. What is fatal is one
line, exit status 2. No network, no GPU probe, no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = {"0": "OFF", "off": "OFF", "false": "OFF", "1": "ON", "on": "ON", "true": "ON",
           "auto": "AUTO", "": "AUTO"}
#: The first that builds an editable install from [project]; older ones install an empty package
#: without a word, and pip asks nobody's version where it builds without isolation.
OLDEST_SETUPTOOLS = 65


def refuse(text: str) -> NoReturn:
    print(f"ffengine: {text}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def choice(variable: str) -> str:
    """OFF, ON or AUTO."""
    value = os.environ.get(variable, "auto").lower()
    if value not in CHOICES:
        refuse(f"{variable} expected 0, 1 or auto, got {value!r}")
    return CHOICES[value]


class CMakeBuild(build_ext):
    """Configure and build csrc/ in a persistent folder under build/."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(target)
        except RuntimeError as reason:
            target.unlink(missing_ok=True)
            if "ON" in (choice("FFENGINE_EXTENSION"), choice("FFENGINE_CUDA")):
                refuse(f"cannot build the kernels that were asked for: {reason}")
            print(f"ffengine: C++ kernels unavailable ({reason}); the reference still works",
                  file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """In place: the old module goes first, so none is left stale or overwritten in use."""
        for old in (ROOT / "ffengine").glob("_C.*"):
            old.unlink()
        super().copy_extensions_to_source()

    def _build(self, target: Path) -> None:
        cuda = choice("FFENGINE_CUDA")
        if choice("FFENGINE_EXTENSION") == "OFF":
            raise RuntimeError("FFENGINE_EXTENSION=0")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake not found")
        try:
            built = self._cmake(cmake, cuda)
        except RuntimeError as reason:
            # a broken CUDA toolchain must not cost the CPU kernels, unless CUDA was asked for
            if cuda != "AUTO" or str(reason) == NO_COMPILER:
                raise
            print("ffengine: building without the CUDA kernels", file=sys.stderr)
            built = self._cmake(cmake, "OFF")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    def _cmake(self, cmake: str, cuda: str) -> Path:
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        with _alone(work / "lock"):
            return self._cmake_in(work, cmake, cuda)

    def _cmake_in(self, work: Path, cmake: str, cuda: str) -> Path:
        try:
            import pybind11
        except ImportError:
            raise RuntimeError("pybind11 is not installed") from None
        configure = [
            cmake, "-S", str(ROOT), "-B", str(work),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFFENGINE_CUDA={cuda}",
        ]
        if not (work / "CMakeCache.txt").exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        with (work / "build.log").open("w+") as log:
            if _run(configure, log):
                (work / "CMakeCache.txt").unlink(missing_ok=True)
                log.seek(0)
                raise RuntimeError(why(log.read()) or f"cmake failed, see {log.name}")
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
            if _run([cmake, "--build", str(work), "--parallel", jobs], log):
                raise RuntimeError(f"compilation failed, see {log.name}")
        (built,) = work.glob("_C*.so")
        return built


NO_COMPILER = "no working C++ compiler found"


def why(log: str) -> str:
    """What CMake's first error says, on one line; empty if there is none."""
    if "CMAKE_CXX_COMPILER" in log:
        return NO_COMPILER
    error = re.search(r"^CMake Error at .*:\n((?:[ \t]+\S.*\n)+)", log, re.M)
    return " ".join(error.group(1).split()) if error else ""


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One build at a time in a build folder."""
    with path.open("w") as lock:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str], log: TextIO) -> int:
    """Exit status of a command; its output goes to the log and to ours."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        for line in process.stdout or ():
            log.write(line)
            print(line, end="")
    return process.returncode


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    refuse(f"expected setuptools >= {OLDEST_SETUPTOOLS}, got {setuptools.__version__}: pip install "
           "--upgrade setuptools")
setup(
    # not in pyproject.toml: before setuptools 77 it had to be a table there, and since then a text
    license="Apache-2.0",
    packages=[*find_packages(include=["ffengine", "ffengine.*"]), "ffengine.kernels"],
    package_dir={"ffengine.kernels": "kernels"},
    include_package_data=False,
    package_data={"ffengine": ["recipes/*.toml", "devices/*.toml", "devices/*.json", "models/*.md",
                               "py.typed", "analysis/*.html", "profile/*.html"]},
    ext_modules=[Extension("ffengine._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
