"""A pytest plugin: several processes that take tests one by one from the same list.

    python -m pytest -p bench.gpu.pool --pool FOLDER --pool-log FILE FILES

Every process collects the same tests in the same order and takes the next number from a locked
file, so none waits while another has tests left. A failure is in the log when its test ends; a
process whose CUDA context is gone says so and leaves, for every further test would fail in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

import pytest
import torch

from bench.gpu.jobs import LOST

#: Kernels before what is built on them; goldens, which take longest, last.
ORDER = ("tests/kernels/", "tests/cuda/", "tests/ops/", "")
LAST = "test_golden.py"
#: Golden files that take longest in fp64 on a processor, 64 to 13 s on a busy one: begun first.
LONGEST = ("df_vgg_full", "df_resnet101", "df_resnet_p20", "df_tinycnn_full", "df_resnet_small")
#: Lines of a failure that the log keeps.
TAIL_LINES = 40
#: Of a process that collected other tests than the first one.
OTHER_TESTS = 76


class Pool:
    """What the processes share, in a folder: the next number, results, who has what in hand."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.hand = folder / f"hand-{os.getpid()}"

    def agree(self, ids: list[str]) -> bool | None:
        """Whether this is the first process; None where it has other tests than the first."""
        digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
        with self._locked("tests") as file:
            known = file.read()
            if not known:
                file.write(json.dumps([digest, len(ids)]))
        return not known if not known or json.loads(known)[0] == digest else None

    def take(self) -> int:
        """The next test's number."""
        with self._locked("next") as file:
            number = int(file.read() or 0)
            file.seek(0)
            file.write(str(number + 1))
        return number

    def begin(self, name: str) -> None:
        self.hand.write_text(json.dumps([name, time.monotonic()]))

    def end(self, name: str, outcome: str, seconds: float, text: str = "") -> None:
        """A test's outcome; with the text of a failure for the log."""
        self.hand.unlink(missing_ok=True)
        self._append(self.folder / "results", json.dumps([name, outcome, seconds]))
        if text:
            tail = text.rstrip().splitlines()[-TAIL_LINES:]
            self._append(self.log, "\n".join([f"FAILED {name} ({seconds:.1f} s)", *tail, ""]))

    @staticmethod
    def _append(path: Path, text: str) -> None:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(text + "\n")

    @contextmanager
    def _locked(self, name: str) -> Iterator[IO[str]]:
        with os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pool", type=Path)
    parser.addoption("--pool-log", type=Path)
    parser.addoption("--pool-also", action="append", default=[], metavar="FILE",
                     help="of which every test is taken, not only those of a GPU")


def rank(item: pytest.Item) -> tuple[int, int]:
    """Of a test in the order: its folder's place; the golden files that take longest first."""
    if item.path.name == LAST:
        named = [i for i, stem in enumerate(LONGEST) if f"[{stem}]" in item.nodeid]
        return len(ORDER), named[0] if named else len(LONGEST)
    return next(i for i, start in enumerate(ORDER) if item.nodeid.startswith(start)), 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    also = {Path(p).resolve() for p in config.getoption("pool_also")}
    items[:] = sorted((i for i in items if i.get_closest_marker("gpu") or i.path in also), key=rank)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        Failures.uncollected.append((report.nodeid, report.longreprtext))


class Failures:
    """What the reports of the test in hand say."""

    uncollected: ClassVar[list[tuple[str, str]]] = []
    outcome, text = "passed", ""

    @classmethod
    def begin(cls) -> None:
        cls.outcome, cls.text = "passed", ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        Failures.outcome = "failed"
        Failures.text += f"{report.when}: {report.longreprtext}\n"
    elif report.skipped and Failures.outcome == "passed":
        Failures.outcome = "skipped"


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    config, items = session.config, session.items
    pool = Pool(config.getoption("pool"), config.getoption("pool_log"))
    first = pool.agree([item.nodeid for item in items])
    if first is None:
        os._exit(OTHER_TESTS)
    for name, text in Failures.uncollected if first else ():
        pool.end(name, "failed", 0.0, text)
    setup: Any = session._setupstate
    while (number := pool.take()) < len(items):
        item, begun = items[number], time.monotonic()
        setup.teardown_exact(item)
        pool.begin(item.nodeid)
        Failures.begin()
        # the next test is not known yet: what this one's file set up stays until it is
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=item.parent)
        pool.end(item.nodeid, Failures.outcome, time.monotonic() - begun, Failures.text)
        if Failures.outcome == "failed" and not context_lives():
            os._exit(LOST)
    setup.teardown_exact(None)
    return True


def context_lives() -> bool:
    """Whether this process can still use its GPU, if it ever did."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1.0)
    except RuntimeError:
        return False
