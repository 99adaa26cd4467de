"""Ranks of right answers where scores may tie, and what they mean for hits among the first k.

Not for computing scores (eval/exact_ranks.py), nor for means and intervals over queries.
"""

# N pictures   K classes   Q queries

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import DataError

CHUNK = 1 << 22
"""Scores looked at together."""


class Ranks(NamedTuple):
    """Where the best right answer of each query stands; what ties with it is in no order."""

    above: NDArray[np.int64]
    """Wrong candidates that score higher than the best right one."""
    tied: NDArray[np.int64]
    """Wrong candidates that score the same as the best right one."""
    right: NDArray[np.int64]
    """Right candidates that score the same as the best right one, itself included."""


class Hits(NamedTuple):
    """Per query one number, as (Q,) float64: at its worst, expected and best order of ties."""

    low: NDArray[np.float64]
    value: NDArray[np.float64]
    high: NDArray[np.float64]


def hits_at_k(ranks: Ranks, k: int) -> Hits:
    """Return per query whether a right answer is among the first k: 0 or 1, between them a chance.

    value: the probability of it if candidates that tie come in random order, every order alike.
    The first k hold m = k - above places of the `tied + right` candidates that tie; none of these
    m is right with the probability C(tied, m) / C(tied + right, m). low, high: with every tie
    decided against the query, for it. k may be larger than the gallery. Raises ValueError on k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    places = k - ranks.above
    low, high = places > ranks.tied, places > 0
    value = low.astype(np.float64)
    unsure = np.flatnonzero(high & ~low)
    value[unsure] = _chance_of_a_hit(places[unsure], ranks.tied[unsure], ranks.right[unsure])
    return Hits(low.astype(np.float64), value, high.astype(np.float64))


def _chance_of_a_hit(
    places: NDArray[np.int64], tied: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return 1 - C(tied, m) / C(tied + right, m) for m = places, 0 < m <= tied.

    The quotient is symmetric in m and right, so it takes as many factors as the smaller of them;
    summed as logarithms, because 1 minus a product near 1 would lose a small chance's digits.
    """
    few, many = np.minimum(places, right), np.maximum(places, right)
    total = tied + right
    log_miss = np.zeros(len(places))
    for j in range(int(few.max(initial=0))):
        log_miss += np.where(j < few, np.log1p(-many / np.maximum(total - j, many + 1)), 0.0)
    return np.where(few == 1, many / total, -np.expm1(log_miss))  # exact where one is drawn


def expected_ranks(ranks: Ranks) -> Hits:
    """Return per query the rank, from 1, of the first right answer, at each order of ties.

    low: every tie decided for the query (the smallest rank). value: the mean over all orders, which
    is 1 + above + tied / (right + 1). high: every tie decided against it.
    """
    first = (1 + ranks.above).astype(np.float64)
    value = first + np.divide(ranks.tied, ranks.right + 1, dtype=np.float64)
    return Hits(first, value, first + ranks.tied.astype(np.float64))


def ranks_of_scores(scores: Any, targets: Any) -> Ranks:
    """Return where the right class of each picture stands among all classes.

    scores: (N, K). targets: (N,) the right column of each row. Raises DataError on NaN, infinity
    and no pictures, ValueError on targets that are no columns.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    check_scores(scores, targets)
    above = np.empty(len(scores), np.int64)
    same = np.empty(len(scores), np.int64)
    step = max(1, CHUNK // scores.shape[1])
    for start in range(0, len(scores), step):
        part = slice(start, start + step)
        own = np.take_along_axis(scores[part], targets[part, None], axis=1)
        above[part] = np.count_nonzero(scores[part] > own, axis=1)
        same[part] = np.count_nonzero(scores[part] == own, axis=1)  # its own score is one of them
    return Ranks(above, same - 1, np.ones(len(scores), np.int64))


def check_scores(scores: NDArray[Any], targets: NDArray[Any]) -> None:
    """Raise as `ranks_of_scores` does unless scores (N, K) and targets (N,) go together."""
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"scores have shape {scores.shape} and targets {targets.shape}, expected "
            f"(pictures, classes) and (pictures,)"
        )
    if not scores.size:
        raise DataError(
            f"{scores.shape[0]:,} labelled pictures and {scores.shape[1]:,} classes, zero-shot "
            f"accuracy needs at least one of each; check the data"
        )
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"targets are {targets.dtype}, expected the number of a column each")
    if targets.min() < 0 or targets.max() >= scores.shape[1]:
        raise ValueError(
            f"targets reach from {targets.min()} to {targets.max()}, expected 0 to "
            f"{scores.shape[1] - 1}"
        )
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        raise DataError(
            f"scores: {np.count_nonzero(bad):,} of {len(scores):,} rows hold NaN or infinity, the "
            f"first is row {int(bad.argmax())}; check the model's weights"
        )
