"""Find captions in a known list: the same ones, and ones that differ in a few characters.

The list is indexed, the captions stream past it. Not for pictures (image_hash.py).
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from m2encoder.hashing import text_key

SHINGLE = 3
"""Characters; short enough that Chinese captions have some."""
WORD = re.compile(r"[^\W_]+")


class SameCaption(NamedTuple):
    """A caption of the list that another one equals, or nearly."""

    row: int
    kind: Literal["same", "near"]
    jaccard: float
    """Shingles in common, as a share of those in either; 1 for the same caption."""


def shingles(text: str) -> set[str]:
    """Return the runs of SHINGLE characters of a text's words, without case and punctuation.

    A text without letters and digits, such as one emoji, is its own only shingle.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(WORD.findall(plain)) or " ".join(plain.split())
    last = max(1, len(words) - SHINGLE + 1)
    return {words[start : start + SHINGLE] for start in range(last)} if words else set()


def jaccard(one: set[str], other: set[str]) -> float:
    """Return the size of the intersection over that of the union; 0 for two empty sets."""
    return len(one & other) / max(1, len(one | other))


class CaptionIndex:
    """Finds which captions of a list another caption repeats. Empty captions repeat nothing.

    near: the smallest Jaccard similarity of shingles that counts, 0 < near <= 1; None looks for
    equal captions only (m2encoder.hashing.text_key: without case, width and extra spaces).
    Near ones are found exactly, none is missed: two sets that are alike enough share one of their
    rarest shingles (prefix filter, Bayardo et al., "Scaling up all pairs similarity search", 2007).
    Raises ValueError on another `near`.
    """

    def __init__(self, texts: Sequence[str], *, near: float | None = None) -> None:
        if near is not None and not 0 < near <= 1:
            raise ValueError(f"near is {near}, expected a share above 0, at most 1")
        self.near = near
        self._rows: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            if text.strip():
                self._rows.setdefault(text_key(text), []).append(row)
        self._place: dict[str, int] = {}  # of each shingle, the rarest first
        self._members: list[tuple[int, ...]] = []
        self._rows_with: dict[int, list[int]] = {}
        if near is not None:
            self._index_shingles([shingles(text) for text in texts])

    def _index_shingles(self, sets: Sequence[set[str]]) -> None:
        frequency = Counter(shingle for members in sets for shingle in members)
        in_order = sorted(frequency, key=lambda shingle: (frequency[shingle], shingle))
        self._place = {shingle: place for place, shingle in enumerate(in_order)}
        for row, members in enumerate(sets):
            places = sorted(self._place[shingle] for shingle in members)
            self._members.append(tuple(places))
            for place in places[: self._prefix(len(places))]:
                self._rows_with.setdefault(place, []).append(row)

    def _prefix(self, size: int) -> int:
        """How many of the rarest shingles must hold one that a similar set has, too."""
        assert self.near is not None
        return size - math.ceil(self.near * size - 1e-9) + 1 if size else 0

    def find(self, text: str) -> list[SameCaption]:
        """Return the captions of the list that this one repeats, in order of their rows."""
        if not text.strip():
            return []
        same = self._rows.get(text_key(text), [])
        found = [SameCaption(row, "same", 1.0) for row in same]
        if self.near is not None:
            found += self._near(shingles(text), self.near, set(same))
        return sorted(found)

    def _near(self, members: set[str], near: float, same: set[int]) -> list[SameCaption]:
        places = sorted(self._place[shingle] for shingle in members if shingle in self._place)
        size = len(members)
        unknown = size - len(places)  # the rarest of all: no caption of the list has them
        rows: set[int] = set()
        for place in places[: max(0, self._prefix(size) - unknown)]:
            rows.update(self._rows_with.get(place, ()))
        known = set(places)
        found: list[SameCaption] = []
        for row in rows - same:
            other = self._members[row]
            if not near * size <= len(other) + 1e-9 or not near * len(other) <= size + 1e-9:
                continue
            common = len(known.intersection(other))
            similarity = common / (size + len(other) - common)
            if similarity >= near - 1e-9:
                found.append(SameCaption(row, "near", similarity))
        return found
