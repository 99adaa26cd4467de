"""How far two lists of scores for the same items agree: shared top k and rank correlation.

Not for right and wrong answers (retrieval.py, scores.py).
"""

# Q queries   N items

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Overlap(NamedTuple):
    """Share of the top k that two lists have in common, per query, 0..1."""

    low: Floats
    """(Q,) the least that ties allow."""
    value: Floats
    """(Q,) expected, where both lists order their ties at random, each for itself."""
    high: Floats


def overlap_at_k(a: NDArray[np.floating], b: NDArray[np.floating], k: int) -> Overlap:
    """Return what the k best items of each row of `a` and of `b` have in common.

    a, b: (Q, N) scores of the same items. Two lists that tie everything share k / N, as chance
    does. Raises ValueError on other shapes, or on a k below 1 or above N.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"scores have shapes {a.shape} and {b.shape}, expected the same (Q, N)")
    if not 1 <= k <= a.shape[1]:
        raise ValueError(f"k is {k}, expected 1 to {a.shape[1]}, the number of items")
    in_a, at_a, free_a = _top(a, k)
    in_b, at_b, free_b = _top(b, k)
    share_a = in_a + at_a * (free_a / at_a.sum(axis=1))[:, None]
    share_b = in_b + at_b * (free_b / at_b.sum(axis=1))[:, None]
    both = np.count_nonzero(in_a & in_b, axis=1)
    only_a = np.count_nonzero(at_a & in_b, axis=1)  # may be in a's top, is in b's
    only_b = np.count_nonzero(in_a & at_b, axis=1)
    either = np.count_nonzero(at_a & at_b, axis=1)
    # The most: each list first takes what the other surely has, then both take the same items.
    rest_a, rest_b = free_a - np.minimum(free_a, only_a), free_b - np.minimum(free_b, only_b)
    high = both + np.minimum(free_a, only_a) + np.minimum(free_b, only_b)
    high = high + np.minimum(np.minimum(rest_a, rest_b), either)
    # The least: first what the other cannot have, then open items apart from each other.
    rest_a = np.maximum(0, free_a - (at_a.sum(axis=1) - only_a - either))
    rest_b = np.maximum(0, free_b - (at_b.sum(axis=1) - only_b - either))
    open_a, open_b = np.minimum(rest_a, either), np.minimum(rest_b, either)
    low = both + (rest_a - open_a) + (rest_b - open_b) + np.maximum(0, open_a + open_b - either)
    return Overlap(low / k, (share_a * share_b).sum(axis=1) / k, high / k)


def _top(
    scores: NDArray[np.floating], k: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """Return what is surely among the k best, what ties for the last places, and these places."""
    last = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k, None]
    surely = scores > last
    return surely, scores == last, k - np.count_nonzero(surely, axis=1)


def spearman(a: NDArray[np.floating], b: NDArray[np.floating]) -> Floats:
    """Return (Q,) the correlation of both rows' ranks; equal scores share their mean rank.

    a, b: (Q, N). NaN where a row has one score for all its items, since it orders nothing.
    """
    ranks = []
    for scores in (a, b):
        rank = _mean_ranks(scores)
        ranks.append(rank - rank.mean(axis=1, keepdims=True))
    product = np.einsum("qn,qn->q", *ranks)
    return _ratio(product, np.prod([np.einsum("qn,qn->q", r, r) for r in ranks], axis=0))


def kendall(a: NDArray[np.floating], b: NDArray[np.floating]) -> Floats:
    """Return (Q,) Kendall's tau-b: agreeing less disagreeing pairs of items, corrected for ties.

    a, b: (Q, N). NaN where a row has one score for all its items. In O(N log N), after Knight
    (1966): with items in the order of `a`, disagreements are the inversions of `b`.
    """
    order = np.lexsort((b, a), axis=1)
    sorted_a, sorted_b = (np.take_along_axis(scores, order, axis=1) for scores in (a, b))
    num_pairs = a.shape[1] * (a.shape[1] - 1) // 2
    ties_a = _tied_pairs(sorted_a[:, 1:] == sorted_a[:, :-1])
    in_order = np.sort(b, axis=1)
    ties_b = _tied_pairs(in_order[:, 1:] == in_order[:, :-1])
    ties_both = _tied_pairs(
        (sorted_a[:, 1:] == sorted_a[:, :-1]) & (sorted_b[:, 1:] == sorted_b[:, :-1])
    )
    against = _inversions(_first_ranks(sorted_b))
    product = num_pairs - ties_a - ties_b + ties_both - 2 * against
    return _ratio(
        product.astype(np.float64), (num_pairs - ties_a) * (num_pairs - ties_b).astype(np.float64)
    )


def _ratio(product: Floats, squares: Floats) -> Floats:
    """Return product / root of squares; NaN where that is 0."""
    root = np.sqrt(squares)
    return np.divide(product, root, out=np.full(len(product), np.nan), where=root > 0)


def _mean_ranks(scores: NDArray[np.floating]) -> Floats:
    """Return (Q, N) ranks from 0, the mean of a tied group's places."""
    order = np.argsort(scores, axis=1, kind="stable")
    in_order = np.take_along_axis(scores, order, axis=1)
    first = _group_starts(in_order)
    last = in_order.shape[1] - 1 - _group_starts(in_order[:, ::-1])[:, ::-1]
    ranks = np.empty(scores.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    return ranks


def _first_ranks(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return (Q, N) ranks from 0, the first of a tied group's places."""
    order = np.argsort(scores, axis=1, kind="stable")
    ranks = np.empty(scores.shape, np.int64)
    starts = _group_starts(np.take_along_axis(scores, order, axis=1))
    np.put_along_axis(ranks, order, starts, axis=1)
    return ranks


def _group_starts(in_order: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return per place of sorted rows the first place that holds the same score."""
    places = np.broadcast_to(np.arange(in_order.shape[1]), in_order.shape).copy()
    places[:, 1:][in_order[:, 1:] == in_order[:, :-1]] = 0
    return np.maximum.accumulate(places, axis=1)


def _tied_pairs(same_as_before: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return (Q,) pairs of equal items; same_as_before: (Q, N - 1), of sorted rows.

    Every item is in a pair with each of its equals in front of it.
    """
    places = np.arange(1, same_as_before.shape[1] + 1)
    starts = np.maximum.accumulate(np.where(same_as_before, 0, places), axis=1)
    return (places - starts).sum(axis=1)


def _inversions(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (Q,) pairs of places i < j with values[i] > values[j]; values: (Q, N) in 0..N-1.

    A merge sort from the bottom up, all blocks of a width in one step.
    """
    num_rows, count = values.shape
    size = 1 << max(0, count - 1).bit_length()
    blocks = np.full((num_rows, size), count)
    blocks[:, :count] = values
    total = np.zeros(num_rows, np.int64)
    width = 1
    while width < size:
        blocks = blocks.reshape(-1, 2 * width)
        order = np.argsort(blocks, axis=1, kind="stable")  # merges two sorted halves
        is_right = order >= width
        before = np.where(is_right, 0, np.cumsum(is_right, axis=1))  # whom a left one lies behind
        total += before.reshape(num_rows, -1).sum(axis=1)
        blocks = np.take_along_axis(blocks, order, axis=1)
        width *= 2
    return total
