"""One generator per purpose, from a name and a few integers."""

from __future__ import annotations

import hashlib

import torch


def generator(purpose: str, *key: int) -> torch.Generator:
    """A CPU generator that is a function of (purpose, key) alone.

    The key is hashed: neighbouring seeds, epochs and batches get unrelated streams, and two
    purposes never share one.
    """
    text = ":".join((purpose, *map(str, key))).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    # 63 bits: manual_seed takes a signed number.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def negatives_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of a training step's negatives: a function of (seed, step) alone."""
    return generator("negatives", seed, step)
