"""Installing from source: with the kernels, and honestly without them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ffengine.ops import backends
from ffengine.ops.config import (
    GOODNESS_CODES,
    LOSS_CODES,
    NORM_CODES,
    PHASE_APPLY,
    PHASE_FUSED,
    PHASE_STATS,
)

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "LICENSE", "README.md",
           "csrc", "kernels", "ffengine")

# an editable install's finder would answer for what this installation lacks
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f.__module__]
"""
TRY = NO_EDITABLE + """
import torch, ffengine, ffengine.kernels
from ffengine.ops import backends
from ffengine.ops.config import LocalPassConfig
from ffengine.ops.local_pass import local_pass
print("where", ffengine.__file__, ffengine.kernels.__file__)
print("built", backends.extension() is not None)
r = local_pass(torch.randn(2, 20, 4, 4), torch.tensor([1, 9]), config=LocalPassConfig())
print("ran", bool(r.z.isfinite().all()))
try:
    local_pass(torch.randn(2, 20), config=LocalPassConfig(), backend="cpu")
    print("cpu ran")
except ValueError as error:
    print("cpu refused:", error)
"""


def copy_sources(to: Path) -> None:
    """What a source distribution holds, without anything built in the checkout."""
    to.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name,
                            ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)


class Installation:
    """A copy of the sources, installed into a folder of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.source, self.site = folder / "source", folder / "site"
        copy_sources(self.source)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps",
             "--target", str(self.site), str(self.source)],
            capture_output=True, text=True, cwd=folder,
            env={**os.environ, "FFENGINE_CUDA": "0", **environment})
        self.status, self.log = done.returncode, done.stdout + done.stderr

    def run(self, code: str) -> str:
        """Output of a script that imports the installed package from outside any checkout."""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=self.site.parent,
            env={**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    # warnings and a failed kernel must fail here, not fall back
    result = Installation(tmp_path_factory.mktemp("install"), FFENGINE_EXTENSION="1")
    assert result.status == 0, result.log
    return result


@pytest.mark.slow
def test_install_runs_outside_the_checkout(installed: Installation) -> None:
    text = installed.run(TRY)
    for line in (f"where {installed.site}", f"{installed.site}/ffengine/kernels/__init__.py",
                 "built True", "ran True", "cpu ran"):
        assert line in text, text


@pytest.mark.slow
def test_install_carries_its_data_and_license(installed: Installation) -> None:
    assert list(installed.site.glob("ffengine-*.dist-info/licenses/LICENSE"))
    def data(package: Path) -> set[str]:
        return {str(p.relative_to(package)) for p in package.rglob("*")
                if p.is_file() and p.suffix not in (".py", ".pyc", ".so")}

    assert data(installed.site / "ffengine") == data(ROOT / "ffengine")


@pytest.mark.slow
def test_kernel_objects_share_no_symbol(installed: Installation) -> None:
    """A weak symbol of one instruction set's objects could replace another's (csrc/cpu/isa.h)."""
    objects = list(installed.source.glob("build/*/CMakeFiles/ff_*.dir/**/*.o"))
    assert objects
    for path in objects:
        table = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True)
        weak = [s for s in table.stdout.splitlines() if s[17:18] in ("W", "V", "u")]
        assert not weak, f"{path.name}: {weak}"


@pytest.mark.slow
def test_no_compiler_leaves_the_reference_and_says_so(tmp_path: Path) -> None:
    result = Installation(tmp_path, CXX="/nonexistent/c++")
    assert result.status == 0, result.log
    assert "C++ kernels unavailable (no working C++ compiler found); the reference still works" in (
        result.log)
    text = result.run(TRY)
    for line in ("built False", "ran True", "cpu refused: [local_pass] backend 'cpu' cannot run",
                 "usable: reference", "runs on the reference"):
        assert line in text, text


    report = result.run(NO_EDITABLE + "from ffengine.cli import main; main(['env'])")
    assert "not usable: the C++ kernels are not built" in report


@pytest.mark.slow
def test_wheel_built_in_isolation_runs_outside_the_checkout(tmp_path: Path) -> None:
    """Build requirements come from pyproject.toml alone; the pinned torch is never replaced."""
    copy_sources(tmp_path / "source")
    environment = {**os.environ, "FFENGINE_CUDA": "0", "FFENGINE_EXTENSION": "1",
                   "PIP_CONSTRAINT": str(ROOT / ".ci" / "constraints.txt")}

    def pip(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "pip", *words, "-q", "--no-deps"],
                              capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr

    pip("wheel", "-w", "dist", "./source")
    pip("install", "--target", "site", *map(str, (tmp_path / "dist").glob("ffengine-*.whl")))
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert "built True" in done.stdout and "ran True" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_kernels_can_be_demanded(tmp_path: Path) -> None:
    result = Installation(tmp_path, CXX="/nonexistent/c++", FFENGINE_EXTENSION="1")
    assert result.status != 0 and "no working C++ compiler found" in result.log


def setup(folder: Path, before: str = "", **environment: str) -> tuple[int, str]:
    """(exit status, standard error) of `setup.py build_ext` in a copy whose CMake finds no nvcc."""
    copy_sources(folder / "source")
    cuda = folder / "source" / "csrc" / "cuda" / "build.cmake"
    text = cuda.read_text()
    assert "(CMAKE_CUDA_COMPILER nvcc " in text
    cuda.write_text(text.replace("(CMAKE_CUDA_COMPILER nvcc ", "(CMAKE_CUDA_COMPILER none-such "))
    code = f"{before}\nimport runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext']; " \
           "runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=folder / "source", env={**os.environ, **environment})
    return done.returncode, done.stderr


@pytest.mark.parametrize("environment, said", [
    ({"FFENGINE_CUDA": "1"}, "ffengine: cannot build the kernels that were asked for: "
     "FFENGINE_CUDA=1 but no nvcc was found (PATH, CUDA_HOME, CUDACXX)"),
    ({"FFENGINE_CUDA": "maybe"}, "ffengine: FFENGINE_CUDA expected 0, 1 or auto, got 'maybe'"),
    ({"FFENGINE_EXTENSION": "2"}, "ffengine: FFENGINE_EXTENSION expected 0, 1 or auto, got '2'"),
    ({"FFENGINE_EXTENSION": "1", "CXX": "/nonexistent/c++"},
     "ffengine: cannot build the kernels that were asked for: no working C++ compiler found"),
], ids=["no-nvcc", "cuda-maybe", "extension-2", "no-compiler"])
def test_what_cannot_be_built_is_one_line_and_status_2(
        tmp_path: Path, environment: dict[str, str], said: str) -> None:
    status, err = setup(tmp_path, **environment)
    assert (status, err) == (2, said + "\n")


def test_a_setuptools_that_would_install_nothing_is_refused(tmp_path: Path) -> None:
    status, err = setup(tmp_path, "import setuptools; setuptools.__version__ = '59.6.0'")
    assert status == 2 and err == (
        "ffengine: expected setuptools >= 65, got 59.6.0: pip install --upgrade setuptools\n")


def test_codes_agree() -> None:
    ext = backends.extension()
    assert ext is not None
    codes = ext.codes()
    assert codes["loss"] == LOSS_CODES
    assert codes["goodness"] == GOODNESS_CODES
    assert codes["norm"] == NORM_CODES
    assert codes["phase"] == {"fused": PHASE_FUSED, "stats": PHASE_STATS, "apply": PHASE_APPLY}


def test_instruction_sets() -> None:
    ext = backends.extension()
    assert ext is not None
    best = ext.isa()
    try:
        ext.set_isa("baseline")
        assert ext.isa() == "baseline"
        with pytest.raises(ValueError, match=r"\[isa\] expected auto, .* got 'sse9'"):
            ext.set_isa("sse9")
    finally:
        ext.set_isa("auto")
    assert ext.isa() == best


def told(isa: str) -> subprocess.CompletedProcess[str]:
    """`ffengine env` where the environment names an instruction set."""
    return subprocess.run([sys.executable, "-m", "ffengine", "env", "--json"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "FFENGINE_ISA": isa})


def test_the_environment_names_the_instruction_set() -> None:
    ext = backends.extension()
    assert ext is not None
    for isa in ("baseline", ext.isas()[-1]):
        done = told(isa)
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["extension"]["instruction_set_in_use"] == isa
    absent = [i for i in ("avx2", "avx512", "avx512bf16", "amx") if i not in ext.isas()]
    for isa in ("sse9", *absent):
        done = told(isa)
        assert done.returncode == 2 and "FFENGINE_ISA" in done.stderr and f"'{isa}'" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_module_needs_no_cuda_library() -> None:
    """The CUDA runtime is linked statically: the module imports where there is none."""
    ext = backends.extension()
    assert ext is not None and ext.__file__ is not None
    needed = subprocess.run(["readelf", "-d", ext.__file__], capture_output=True, text=True,
                            check=True).stdout
    libraries = [line for line in needed.splitlines() if "NEEDED" in line]
    assert libraries and not any("cuda" in line or "torch" in line for line in libraries)
