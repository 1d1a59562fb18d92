"""The C++ kernels for aarch64, and a way to call them from here: `python -m tests.aarch64.build`.

build/aarch64/module   the extension as its own CMakeLists.txt cross-compiles it
build/aarch64/guest    its kernels' objects and guest.cpp: a program that makes calls for others
build/aarch64/_C.so    csrc/bindings.cpp and host.cpp: an ffengine._C that calls the guest
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "aarch64"
COMPILER = "aarch64-linux-gnu-g++"
#: Where Debian's cross compiler has the C library of the other machine.
SYSROOT = "/usr/aarch64-linux-gnu"


def emulator() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def guest_command() -> str:
    return f"{emulator()} -L {SYSROOT} {BUILD / 'guest'}"


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def build() -> None:
    import pybind11

    module = BUILD / "module"
    run("cmake", "-S", ROOT, "-B", module, "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
        "-DFFENGINE_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    run("cmake", "--build", module, "--parallel", "2")
    objects = sorted(module.glob("CMakeFiles/*.dir/csrc/cpu/*.o"))
    run(COMPILER, "-std=c++17", "-O2", "-fopenmp", "-Wall", "-Wextra", "-Werror",
        HERE / "guest.cpp", *objects, "-o", BUILD / "guest")
    run("g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra",
        "-Werror", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}",
        '-DFF_COMPILER="aarch64"', '-DFF_ISAS="baseline"', '-DFF_CUDA_ARCHITECTURES=""',
        ROOT / "csrc" / "bindings.cpp", HERE / "host.cpp", "-o", BUILD / "_C.so")


if __name__ == "__main__":
    build()
