"""Builds ffengine._C with CMake; where that cannot be done, installs without it and says so.

Environment: FFENGINE_EXTENSION=0 leaves the kernels out, =1 makes a failure to build them fatal;
FFENGINE_CUDA=0|1 forces the CUDA kernels off or on; CMAKE_CUDA_ARCHITECTURES or
TORCH_CUDA_ARCH_LIST choose their architectures. No network, no GPU probe, no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OFF, ON = ("0", "off", "false"), ("1", "on", "true")


class CMakeBuild(build_ext):
    """Configure and build csrc/ in a persistent folder under build/."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(target)
        except RuntimeError as reason:
            target.unlink(missing_ok=True)
            if os.environ.get("FFENGINE_EXTENSION", "").lower() in ON:
                raise
            print(f"ffengine: C++ kernels unavailable ({reason}); the reference still works",
                  file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """In place: the old module goes first, so none is left stale or overwritten in use."""
        for old in (ROOT / "ffengine").glob("_C.*"):
            old.unlink()
        super().copy_extensions_to_source()

    def _build(self, target: Path) -> None:
        if os.environ.get("FFENGINE_EXTENSION", "").lower() in OFF:
            raise RuntimeError("FFENGINE_EXTENSION=0")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake not found")
        cuda = os.environ.get("FFENGINE_CUDA", "auto").lower()
        cuda = "OFF" if cuda in OFF else "ON" if cuda in ON else "AUTO"
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
        import pybind11

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
                broken = "CMAKE_CXX_COMPILER" in log.read()
                raise RuntimeError(NO_COMPILER if broken else f"cmake failed, see {log.name}")
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
            if _run([cmake, "--build", str(work), "--parallel", jobs], log):
                raise RuntimeError(f"compilation failed, see {log.name}")
        (built,) = work.glob("_C*.so")
        return built


NO_COMPILER = "no working C++ compiler found"


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


setup(
    packages=[*find_packages(include=["ffengine", "ffengine.*"]), "ffengine.kernels"],
    package_dir={"ffengine.kernels": "kernels"},
    package_data={"ffengine": ["recipes/*.toml", "devices/*.toml", "devices/*.json", "models/*.md",
                               "py.typed", "analysis/profile/*.html"]},
    ext_modules=[Extension("ffengine._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
