"""Builds ffengine._C for this device only, by CMake alone: no pip, no setuptools.

Where that fails the stage fails, no module of an older build is left, and the run goes on with
Triton. In a rehearsal the folder of `make setup` is built again, which is nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.gpu.run import DONE, FAILED
from bench.gpu.session import Session, options

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ffengine"
Say = Callable[[str], None]


def tool(name: str) -> str:
    """A program beside this interpreter, or on the path.

    Raises:
        RuntimeError: there is none.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"no {name} beside {sys.executable} or on the path")
    return found


def settings(architecture: str | None) -> list[str]:
    """CMake's -D words: for one architecture, or, where None, what the folder has."""
    import pybind11

    words = [f"-DPython_EXECUTABLE={sys.executable}",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    if architecture is not None:
        words += ["-DFFENGINE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real"]
    return words


def built(folder: Path, architecture: str | None, log: Path) -> Path:
    """Configure and compile; the module's path in the folder.

    Raises:
        RuntimeError: either went wrong, or there is no CMake; the log says how.
    """
    generator = []
    if not (folder / "CMakeCache.txt").exists():
        with contextlib.suppress(RuntimeError):
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    cmake = tool("cmake")
    logged([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *settings(architecture)], log)
    logged([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], log)
    found = sorted(folder.glob("_C*.so"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RuntimeError(f"cmake left no _C*.so in {folder}")
    return found[-1]


def logged(command: list[str], log: Path) -> None:
    """Run a command into the log; RuntimeError unless it ends well."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT,
                                stdin=subprocess.DEVNULL, check=False).returncode
    if status:
        raise RuntimeError(f"{Path(command[0]).name} {command[1]} gave {status}, see {log.name}")


def install(module: Path) -> None:
    """Into the package in one move: another process may have the old one open."""
    target = PACKAGE / module.name
    if target.exists() and target.read_bytes() == module.read_bytes():
        return
    beside = target.with_suffix(".new")
    shutil.copyfile(module, beside)
    os.replace(beside, target)


def imported() -> str:
    """What the module says of itself in a process of its own; RuntimeError if it does not load."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch, ffengine._C as c; b = c.build_info(); print("
         "b['compiler'], '; CUDA architectures:', b['cuda_architectures'] or 'none')"],
        capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"the module does not load: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def main() -> int:
    args = options(__doc__).parse_args()
    session = Session(args)
    log, begun = args.out / "build.log", time.monotonic()
    try:
        module = built(*folder_and_architecture(session), log)
        install(module)
        print(f"built in {time.monotonic() - begun:.0f} s: {imported()}")
    except (RuntimeError, ImportError) as reason:
        print(f"no CUDA kernels: {reason}")
        sys.stderr.write("".join(log.read_text(errors="replace").splitlines(True)[-12:]))
        if session.scale.device == "cuda":
            for old in PACKAGE.glob("_C.*"):
                old.unlink()
        return FAILED
    return DONE


def folder_and_architecture(session: Session) -> tuple[Path, str | None]:
    """Where to build, and for what: in a rehearsal where this interpreter has built before, if it
    has, with what that folder is set to."""
    tag = sys.implementation.cache_tag
    if session.scale.device == "cuda":
        import torch

        return ROOT / "build" / f"gpu-{tag}", "{}{}".format(*torch.cuda.get_device_capability())
    known = ROOT / "build" / f"cmake-{tag}"
    cache = known / "CMakeCache.txt"
    own = cache.exists() and re.search(rf"^Python_EXECUTABLE:\w+={re.escape(sys.executable)}$",
                                       cache.read_text(), re.MULTILINE)
    return known if own else ROOT / "build" / f"rehearsed-{tag}", None


if __name__ == "__main__":
    sys.exit(main())
