"""Words for people, in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def meant(word: object, known: Iterable[str]) -> str:
    """"; did you mean X?" for a word that is nearly a known one, else nothing."""
    found = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def count(number: int, one: str, many: str | None = None) -> str:
    """"1 layer", "2 layers"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def span(first: int, last: int) -> str:
    """"layer 1", or "layers 1 to 3"."""
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def listed(values: Iterable[object]) -> str:
    """"1", "1 and 2", "1, 2 and 3"."""
    words = list(map(str, values))
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def plan(cuts: Sequence[int], tile: Sequence[int], batch: int) -> str:
    """A memory plan: in how many segments, and how a batch of so many rows goes through each."""
    if not tile:
        return "no segments"
    if all(size >= batch for size in tile):
        how = f"undivided batches of {count(batch, 'row')}"
    else:
        sizes = tile[:1] if len(set(tile)) == 1 else tile
        how = f"tiles of {listed(sizes)} {'row' if list(sizes) == [1] else 'rows'}"
    after = f", cut after {'layer' if len(cuts) == 1 else 'layers'} {listed(cuts)}" if cuts else ""
    return f"{count(len(tile), 'segment')}{after}; {how}"
