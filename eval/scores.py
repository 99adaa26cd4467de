"""Cosines of queries with a whole gallery, some rows at a time, and of pairs.

Not for the ranks of right answers alone, which need fewer of them (exact_ranks.py).
"""

# Q queries   N items of the gallery   D width of an embedding

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import DataError

Vectors = NDArray[np.float32]
Scores = NDArray[np.float32]

SCORES_AT_ONCE = 4_000_000
"""Scores in memory at once, 16 MB; a few arrays of that size live beside them."""
ROWS, COLUMNS = 1024, 4096


def score_blocks(query: Any, gallery: Any) -> Iterator[tuple[slice, Scores]]:
    """Yield (rows, scores): the cosines of some queries with the whole gallery.

    query: (Q, D), gallery: (N, D), unit norm. scores: (rows, N), the caller's to change.
    Summed in float64 and rounded to float32, so that equal pairs of vectors have equal scores
    wherever they stand. Raises ValueError on shapes that do not fit, DataError on NaN or no rows.
    """
    query_QD, gallery_ND = check_vectors(query, "queries"), check_vectors(gallery, "gallery")
    if query_QD.shape[1] != gallery_ND.shape[1]:
        raise ValueError(
            f"queries have shape {query_QD.shape} and the gallery {gallery_ND.shape}, expected "
            f"vectors of one width"
        )
    rows = min(ROWS, max(1, SCORES_AT_ONCE // len(gallery_ND)))
    for start in range(0, len(query_QD), rows):
        block_QD = query_QD[start : start + rows].astype(np.float64)
        scores = np.empty((len(block_QD), len(gallery_ND)), np.float32)
        for first in range(0, len(gallery_ND), COLUMNS):
            columns = slice(first, first + COLUMNS)
            scores[:, columns] = block_QD @ gallery_ND[columns].astype(np.float64).T
        yield slice(start, start + len(block_QD)), scores


def paired_scores(first: Any, second: Any) -> Scores:
    """Return (N,) float32 cosines of row i with row i; rounded as `score_blocks` does."""
    first_ND, second_ND = check_vectors(first, "vectors"), check_vectors(second, "vectors")
    if first_ND.shape != second_ND.shape:
        raise ValueError(f"shapes {first_ND.shape} and {second_ND.shape}, expected the same")
    scores = np.empty(len(first_ND), np.float32)
    for start in range(0, len(first_ND), COLUMNS):
        rows = slice(start, start + COLUMNS)
        scores[rows] = np.einsum(
            "nd,nd->n", first_ND[rows].astype(np.float64), second_ND[rows].astype(np.float64)
        )
    return scores


def check_vectors(vectors: Any, what: str) -> NDArray[Any]:
    """Return an array (N, D) of numbers. Raises ValueError on its shape, DataError on NaN."""
    array = np.asarray(vectors)
    if array.ndim != 2:
        raise ValueError(f"{what} have shape {array.shape}, expected (N, D)")
    if not len(array):
        raise DataError(f"no {what}, expected at least one; check the data")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise DataError(
            f"{what}: {np.count_nonzero(bad):,} of {len(array):,} vectors hold NaN or infinity, "
            f"the first is row {int(bad.argmax())}; check the model's weights"
        )
    return array
