"""Vectors of a list while they are being made, row by row, and the spans that they are made in.

Not for making them (embed.py), nor for keeping them on disk (vector_store.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MISSING, WHOLE, TRUNCATED, BAD = range(4)
"""What a row can be; a truncated text has a vector, a bad item has none."""


class Span(NamedTuple):
    """Rows `first` to `last`, the latter not included: one batch of pictures or window of texts."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def rows(self) -> slice:
        """The rows, to index arrays with."""
        return slice(self.first, self.last)


class VectorTable:
    """One row per item of a list: its vector, and whether it is there, truncated or bad."""

    def __init__(self, count: int, dim: int) -> None:
        self.vectors: NDArray[np.float32] = np.zeros((count, dim), np.float32)
        """(N, D); rows that are missing or bad mean nothing."""
        self.states: NDArray[np.uint8] = np.full(count, MISSING, np.uint8)
        """(N,)"""
        self.reasons: dict[int, str] = {}
        """Of each bad row."""

    def __len__(self) -> int:
        return len(self.states)

    def set_bad(self, row: int, reason: str) -> None:
        """Note that an item has no vector."""
        self.vectors[row] = 0
        self.states[row] = BAD
        self.reasons[row] = reason

    def has(self, span: Span) -> bool:
        """Say whether every row of the span is known, be it as bad."""
        return bool((self.states[span.rows] != MISSING).all())

    def forget(self, span: Span) -> None:
        """Take rows as missing again."""
        self.states[span.rows] = MISSING
        for row in self.reasons_in(span):
            del self.reasons[row]

    def reasons_in(self, span: Span) -> dict[int, str]:
        """Return why rows of the span are bad, in order."""
        return {row: self.reasons[row] for row in sorted(self.reasons) if row in range(*span)}

    @property
    def kept(self) -> NDArray[np.int64]:
        """(K,) the rows that have a vector, in order."""
        return np.flatnonzero((self.states == WHOLE) | (self.states == TRUNCATED))

    @property
    def truncated(self) -> int:
        """How many texts were longer than the model takes."""
        return int((self.states == TRUNCATED).sum())


def cut(count: int, size: int, *, fine_tail: bool) -> list[Span]:
    """Cut a list into spans of at most `size` rows.

    fine_tail: let the last ones get smaller, down to an eighth, so that threads that take one after
    the other end together. The cut depends on nothing else, so that one process and several
    compute the same batches, and with them the same vectors to the last bit. Raises ValueError if
    `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    spans: list[Span] = []
    first = 0
    while first < count:
        step = size
        if fine_tail:
            step = min(size, max(-(-(count - first) // 4), -(-size // 8)))
        spans.append(Span(first, min(first + step, count)))
        first = spans[-1].last
    return spans


def runs(spans: list[Span]) -> Iterator[Span]:
    """Join spans that follow each other without a gap."""
    joined: Span | None = None
    for span in spans:
        if joined is not None and joined.last == span.first:
            joined = Span(joined.first, span.last)
            continue
        if joined is not None:
            yield joined
        joined = span
    if joined is not None:
        yield joined
