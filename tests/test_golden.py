"""The engine against trajectories of the papers' published code.

Every *.npz of the folder that FFENGINE_GOLDENS names (default: tests/golden) is put to it; network,
hyper-parameters and batches come from each file alone. A family's module says how.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(os.environ.get("FFENGINE_GOLDENS", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
#: First word of a file's name -> module with checks_of(path, folder), and gpu_checks_of(path) where
#: a GPU has checks of its own: name -> check, in order, exact first.
FAMILIES = {"df": "golden_df_checks", "tf": "golden_tf", "cw": "golden_cw", "cafo": "golden_cafo",
            "fflib": "golden_fflib", "loewe": "golden_hinton", "pez": "golden_hinton"}


def test_the_folder_holds_golden_files() -> None:
    assert FILES, f"no *.npz in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden(path: Path, tmp_path: Path) -> None:
    """Everything a file can tell, in fp64 on the reference and forced on the other back-ends."""
    run_all(module_of(path).checks_of(path, tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden_on_a_gpu(path: Path) -> None:
    run_all(getattr(module_of(path), "gpu_checks_of", lambda _: {})(path))


def module_of(path: Path) -> ModuleType:
    family = path.stem.split("_")[0]
    assert family in FAMILIES, f"{path.name}: expected a family of {', '.join(FAMILIES)}"
    return importlib.import_module(FAMILIES[family])


def run_all(checks: dict[str, Callable[[], None]]) -> None:
    """Every check runs; the test fails with all that did."""
    failed = []
    for name, check in checks.items():
        try:
            check()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)

