"""Library products on a GPU: exact and repeatable, unless one rule for all sides says otherwise,
whichever of torch's switches a caller has set."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ffengine.ops.product_rule import EXACT, Products, exact, products

OWNERS: dict[str, Any] = {"all": torch.backends, "cudnn": torch.backends.cudnn,
                          "conv": torch.backends.cudnn.conv, "matmul": torch.backends.cuda.matmul}


def switches() -> dict[str, Any]:
    """As they read now; the older ones raise where newer ones contradict them."""
    found: dict[str, Any] = {n: owner.fp32_precision for n, owner in OWNERS.items()}
    found |= {n: getattr(torch.backends.cudnn, n)
              for n in ("enabled", "benchmark", "deterministic")}
    for name in ("cudnn", "matmul"):
        try:
            found[f"{name}.allow_tf32"] = OWNERS[name].allow_tf32
        except RuntimeError as error:
            found[f"{name}.allow_tf32"] = str(error)[:40]
    return found


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    yield
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = before
    for name, owner in OWNERS.items():  # torch's own defaults
        owner.fp32_precision = "tf32" if name == "conv" else "none"
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


def new(**values: str) -> Callable[[], None]:
    def put() -> None:
        for name, value in values.items():
            OWNERS[name].fp32_precision = value

    return put


def old(cudnn: bool, matmul: bool) -> Callable[[], None]:
    def put() -> None:
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.backends.cuda.matmul.allow_tf32 = matmul

    return put


def benchmark() -> None:
    torch.backends.cudnn.benchmark = True


CALLERS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None, "benchmark": benchmark,
    "old tf32": old(True, True), "old exact": old(False, False),
    "tf32": new(all="tf32"), "cudnn tf32": new(cudnn="tf32"), "conv tf32": new(conv="tf32"),
    "ieee": new(all="ieee"), "mixed": new(all="tf32", conv="ieee", matmul="tf32"),
}


@pytest.mark.parametrize("caller", list(CALLERS))
def test_ours_are_exact_whatever_the_user_set(caller: str) -> None:
    CALLERS[caller]()
    before = switches()
    for _ in range(2):
        with exact("cuda"):
            inside = switches()
            with exact("cuda"):
                assert switches() == inside
            assert switches() == inside
        assert switches() == before
    held(inside, EXACT)


@pytest.mark.parametrize("caller", list(CALLERS))
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_rule_for_every_side(tf32: bool, deterministic: bool, caller: str) -> None:
    CALLERS[caller]()
    before, rule = switches(), Products(tf32, deterministic)
    with products(rule):
        held(switches(), rule)  # theirs
        with exact("cuda"):
            held(switches(), rule)  # ours
        with products(EXACT), exact("cuda"):
            held(switches(), EXACT)
        held(switches(), rule)
    with exact("cuda"):
        held(switches(), EXACT)
    assert switches() == before


def held(found: dict[str, Any], rule: Products) -> None:
    assert found["conv"] == found["matmul"] == ("tf32" if rule.tf32 else "ieee")
    assert (found["enabled"], found["benchmark"], found["deterministic"]) == (
        True, not rule.deterministic, rule.deterministic)


def test_an_error_inside_leaves_no_rule_behind() -> None:
    before = switches()
    with pytest.raises(RuntimeError), products(Products(tf32=True, deterministic=False)):
        raise RuntimeError
    assert switches() == before
    with exact("cuda"):
        held(switches(), EXACT)


#: In a process where nobody has set a part yet.
FOLLOWS = """
import torch
from ffengine.ops.product_rule import exact
cudnn = torch.backends.cudnn
for value in ("tf32", "ieee"):
    with exact("cuda"):
        pass
    torch.backends.fp32_precision = value
    owners = (torch.backends, cudnn, cudnn.conv, torch.backends.cuda.matmul)
    assert {owner.fp32_precision for owner in owners} == {value}
"""


def test_parts_follow_the_whole_again() -> None:
    subprocess.run([sys.executable, "-c", FOLLOWS], check=True)


def test_a_cpu_is_left_alone() -> None:
    before = switches()
    with exact("cpu"):
        assert switches() == before


def test_threads_of_one_rule_share_it_and_another_is_refused() -> None:
    before, other = switches(), Products(tf32=True)
    inside, over, said = threading.Event(), threading.Event(), []

    def hold() -> None:
        with exact("cuda"):
            inside.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    with exact("cuda"):
        held(switches(), EXACT)
    held(switches(), EXACT)  # the other thread's still
    try:
        with products(other):
            said.append("computes")
    except RuntimeError as error:
        said.append(str(error))
    over.set()
    thread.join()
    assert switches() == before
    assert said == [f"[products] expected {EXACT}, by which another thread computes (torch has one "
                    f"setting for the process), got {other}"]
    with products(other):  # nobody's any more
        held(switches(), other)


def test_the_last_thread_of_a_rule_puts_back_what_was_set() -> None:
    before, first = switches(), exact("cuda")
    first.__enter__()
    thread, over = threading.Thread(target=lambda: hold()), threading.Event()
    inside = threading.Event()

    def hold() -> None:
        with exact("cuda"):
            inside.set()
            over.wait(60)

    thread.start()
    assert inside.wait(60)
    first.__exit__(None, None, None)
    held(switches(), EXACT)
    over.set()
    thread.join()
    assert switches() == before
