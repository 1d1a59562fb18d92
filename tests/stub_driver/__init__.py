"""Triton's real launcher on a machine without a GPU: kernels compile for a given architecture and
launch into a driver that does nothing (driver.c), with CPU tensors as arguments.

In a process of its own, before any other use of Triton:

    python -m tests.stub_driver MODULE [ARGUMENTS...]     runs MODULE as __main__ under the stub

or, at the top of such a module, `driver = stub_driver.install(folder)`. Ops then take
`backend="triton"` on CPU tensors. What results hold is undefined: nothing was computed.

    with driver.recorded() as launches: ...   a Launch for each: kernel, grid, arguments
    driver.count()                            launches so far

A module run by the first form finds the driver as `stub_driver.DRIVER`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCE = Path(__file__).with_name("driver.c")


class Launch(NamedTuple):
    """One kernel launch as Triton's launcher got it."""

    kernel: str
    grid: tuple[int, int, int]
    addresses: tuple[int, ...]  # of its tensors, in order
    numbers: tuple[Any, ...]  # its other arguments in order: what a captured graph freezes


def build(folder: Path) -> Path:
    """The driver as folder/libcuda.so.1, with the cuda.h that Triton ships."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    spec = find_spec("triton")
    if compiler is None or spec is None or spec.origin is None:
        raise ValueError("[stub driver] expected a C compiler and triton, got "
                         f"{compiler or 'no compiler'}, {'triton' if spec else 'no triton'}")
    include = Path(spec.origin).parent / "backends/nvidia/include"
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-I",
                    str(include), "-o", str(library), str(SOURCE)], check=True)
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return library


class Stub:
    """An active stub driver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._launches = ctypes.c_long.in_dll(library, "stub_launches")
        self.log: list[Launch] | None = None

    def count(self) -> int:
        """Launches since the process began."""
        return self._launches.value

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Launch]]:
        """Collects the launches made inside."""
        before, self.log = self.log, []
        try:
            yield self.log
        finally:
            self.log = before


#: The process's driver, where `python -m tests.stub_driver` installed one.
DRIVER: Stub | None = None


def install(folder: Path, arch: int = 90) -> Stub:
    """Build the driver into `folder` and make it Triton's active one for this process."""
    # loaded first and by this name, it is what every later look-up of libcuda.so.1 finds
    library = ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from ffengine.ops import backends

    stub = Stub(library)

    class Launcher(CudaLauncher):  # type: ignore[misc]
        def __init__(self, src: Any, metadata: Any) -> None:
            super().__init__(src, metadata)
            self.kernel = src.fn.__name__

        def __call__(self, *args: Any) -> None:
            # grid (3), stream, function, two metadata, two hooks, then the kernel's arguments
            if stub.log is not None:
                tensors = tuple(x.data_ptr() for x in args[9:] if isinstance(x, torch.Tensor))
                numbers = tuple(x for x in args[9:] if not isinstance(x, torch.Tensor))
                stub.log.append(Launch(self.kernel, args[:3], tensors, numbers))
            super().__call__(*args)

    class StubDriver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = Launcher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device: divmod(arch, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

    driver.set_active(StubDriver())
    asked = backends.why_not

    def why_not(backend: str, device: str, dtype: torch.dtype) -> str | None:
        return asked(backend, "cuda" if backend == "triton" else device, dtype)

    backends.why_not = why_not
    return stub

