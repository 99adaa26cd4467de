"""The nearest vectors: exactly, or from a FAISS index and scored again with the vectors themselves.

Not for names and conditions (index.py), nor for how many lists to read (index_choice.py).
"""

from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
BLOCK_ROWS = 65_536
MAX_WIDENING = 16
NOTHING = -1
"""The row of a place that nothing was found for; its score is minus infinity."""


class Nearest(NamedTuple):
    """Per query the best rows, best first; equal scores by row."""

    scores: Vectors
    """(Q, k), cosines."""
    rows: Rows
    """(Q, k)"""


def exact_nearest(vectors: Vectors, queries: Vectors, k: int, rows: Rows | None = None) -> Nearest:
    """Compare with every vector, or with those at `rows` (ascending, without repeats).

    Places beyond the number of vectors hold NOTHING.
    """
    count = len(vectors) if rows is None else len(rows)
    best = _nothing(len(queries), k)
    if rows is None or (count and rows[-1] - rows[0] + 1 == count):
        first = 0 if rows is None or not count else int(rows[0])
        if count and len(queries):
            found = _compare(vectors[first : first + count], queries, min(k, count))
            best = merge_nearest(best, Nearest(found.scores, found.rows + first), k)
        return best
    for start in range(0, count, BLOCK_ROWS):
        some = rows[start : start + BLOCK_ROWS]
        found = _compare(vectors[some], queries, min(k, len(some)))
        best = merge_nearest(best, Nearest(found.scores, some[found.rows]), k)
    return best


def row_bits(rows: Rows, count: int) -> NDArray[np.uint8]:
    """Return one bit per row of `count`, set for those in `rows`."""
    mask = np.zeros(count, np.bool_)
    mask[rows] = True
    return np.packbits(mask, bitorder="little")


class AnnIndex(NamedTuple):
    """An approximate index and how widely it searches."""

    index: Any
    """A faiss IVF index, whose ids are rows, or HNSW index, whose positions are."""
    kind: Literal["ivf", "hnsw"]
    probes: int
    """Lists read, or length of the candidate list."""

    def nearest(
        self,
        vectors: Vectors,
        queries: Vectors,
        k: int,
        *,
        allowed: NDArray[np.uint8] | None = None,
        share: float = 1.0,
    ) -> Nearest:
        """Take a few more than `k` candidates, score them with `vectors`, return the best `k`.

        allowed: `row_bits` of the rows that may be found; None: all. share: how many of the rows
        that are, 0..1; the fewer, the more lists are read. Places that nothing was found for hold
        NOTHING.
        """
        wanted = min(2 * k + 10, len(vectors))
        widening = min(MAX_WIDENING, 1 / max(share, 1e-9))
        parameters = self._parameters(allowed, wanted, widening)
        _, rows = self.index.search(queries, wanted, params=parameters)
        scores = np.full(rows.shape, -np.inf, np.float32)
        for i, query in enumerate(queries):
            there = rows[i] >= 0
            scores[i, there] = vectors[rows[i, there]] @ query
        return merge_nearest(_nothing(len(queries), k), Nearest(scores, rows), k)

    def _parameters(self, allowed: NDArray[np.uint8] | None, wanted: int, widening: float) -> Any:
        library: Any = faiss  # its annotations lack what its Python layer adds
        options: dict[str, Any] = {}
        if allowed is not None:
            options["sel"] = library.IDSelectorBitmap(allowed)
        if self.kind == "hnsw":
            reach = max(wanted, int(self.probes * widening))
            return library.SearchParametersHNSW(efSearch=reach, **options)
        probes = min(self.index.nlist, int(np.ceil(self.probes * widening)))
        return library.SearchParametersIVF(nprobe=probes, **options)


def _compare(vectors: Vectors, queries: Vectors, k: int) -> Nearest:
    scores, rows = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    return Nearest(scores, rows)


def merge_nearest(a: Nearest, b: Nearest, k: int) -> Nearest:
    """Return the best `k` of two results of the same queries over different rows."""
    scores = np.concatenate([a.scores, b.scores], axis=1)
    rows = np.concatenate([a.rows, b.rows], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return Nearest(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


def _nothing(queries: int, k: int) -> Nearest:
    scores = np.full((queries, k), -np.inf, np.float32)
    return Nearest(scores, np.full((queries, k), NOTHING, np.int64))
