"""Library products on a GPU: exact and repeatable, unless one rule for all sides says otherwise."""

from __future__ import annotations

import pytest
import torch

from ffengine.ops import backends
from ffengine.ops.backends import Products


def seen() -> dict[str, bool]:
    """What a library product would be held to now."""
    cudnn = torch.backends.cudnn
    return {"cudnn tf32": cudnn.allow_tf32, "deterministic": cudnn.deterministic,
            "search": cudnn.benchmark, "cublas tf32": torch.backends.cuda.matmul.allow_tf32}


def test_ours_are_exact_whatever_the_user_set() -> None:
    before = seen()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False,
                                    allow_tf32=True):
        with backends.exact("cuda"):
            now = seen()
        assert seen() == {**before, "cudnn tf32": True, "deterministic": False, "search": True}
    assert (now["cudnn tf32"], now["deterministic"], now["search"]) == (False, True, False)
    assert seen() == before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_rule_for_every_side(tf32: bool, deterministic: bool) -> None:
    before = seen()
    wanted = {"cudnn tf32": tf32, "deterministic": deterministic, "search": not deterministic,
              "cublas tf32": tf32}
    with backends.products(Products(tf32=tf32, deterministic=deterministic)):
        assert seen() == wanted, "theirs"
        with backends.exact("cuda"):
            assert seen() == wanted, "ours"
        assert seen() == wanted
    assert seen() == before


def test_an_error_inside_leaves_no_rule_behind() -> None:
    before = seen()
    with pytest.raises(RuntimeError), backends.products(Products(tf32=True, deterministic=False)):
        raise RuntimeError
    with backends.exact("cuda"):
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
    assert seen() == before
