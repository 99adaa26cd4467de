"""Where right answers stand among all pairs of images and texts: exact, in tiles, both ways.

Not for what is right (retrieval.py), nor for what ranks mean (m2encoder/ranks.py). A score is the
product of two vectors summed in float64, always in the same order, and rounded to float32: equal
vectors have equal scores, and differences that only float32 arithmetic made are ties. Few pairs
need that: a screen (screens.py) gives every product with a bound on its error, so only those
within the bound of the query's best right score are open, and they alone are computed exactly. A
tile with too many of them is screened more finely, at last in float64.
"""

# I images   T texts   D width   P right pairs   p pairs of some   n, m texts, images of a tile

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m2encoder.eval.right_answers import RightPairs
from m2encoder.eval.screens import (
    Bfloat16Screen,
    Edges,
    Float32Screen,
    Screen,
    measured,
)
from m2encoder.ranks import Ranks

TILE = (4096, 1024)
"""Texts and images of a tile."""
OPEN_SHARE = 1 / 256
"""Of a tile's pairs; beyond it a finer screen costs less than computing them one by one."""
TRIES = 4
"""Tiles after which a screen may be found to be of no use."""
PAIRS = 64
"""Pairs computed together, few enough for a fast cache."""
OWN = 4096
"""Right pairs computed by one worker at a time."""
WORKERS = 8
"""The most tiles at once. There is a worker for each of torch's threads; each takes some 50 MB."""

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]
Pairs = tuple[Ints, Ints]
"""Rows and columns."""


class BothRanks(NamedTuple):
    """Ranks in both directions."""

    i2t: Ranks
    """Per image with a right text, in order."""
    t2i: Ranks
    """Per text with a right image, in order."""


class _Counts(NamedTuple):
    """Wrong candidates of some queries by how they compare with the best right one."""

    above: Ints
    tied: Ints


class _Side:
    """The queries of one direction and what is known about them so far."""

    def __init__(
        self, num_queries: int, query_P: Ints, own_P: Scores, counts_P: NDArray[np.bool_]
    ) -> None:
        best = np.full(num_queries, -np.inf, np.float32)
        np.maximum.at(best, query_P[counts_P], own_P[counts_P])
        self.is_asked = np.isfinite(best)
        self.best = np.where(self.is_asked, best, np.float32(np.inf))
        self.right = np.bincount(
            query_P[counts_P & (own_P == best[query_P])], minlength=num_queries
        )
        wrong = ~counts_P
        self.counts = self.compared(query_P[wrong], own_P[wrong], slice(0, num_queries))

    def compared(self, query: Ints, scores: Scores, queries: slice) -> _Counts:
        """Count exact scores of candidates, among a slice of queries that holds theirs."""
        best, num_queries = self.best[query], len(self.best[queries])
        above, tied = query[scores > best], query[scores == best]
        return _Counts(
            np.bincount(above - queries.start, minlength=num_queries),
            np.bincount(tied - queries.start, minlength=num_queries),
        )

    def add(self, queries: slice, found: _Counts) -> None:
        """Add what a tile holds."""
        for total, part in zip(self.counts, found, strict=True):
            total[queries] += part

    def ranks(self) -> Ranks:
        """Return the ranks of the queries that were asked."""
        asked = self.is_asked
        return Ranks(self.counts.above[asked], self.counts.tied[asked], self.right[asked])


def exact_ranks(
    image: NDArray[Any],
    text: NDArray[Any],
    right: RightPairs,
    *,
    tile: tuple[int, int] = TILE,
    coarse: Sequence[type[Screen]] | None = None,
) -> BothRanks:
    """Return where the best right answers stand. image: (I, D), text: (T, D).

    tile (texts, images) and coarse, the screens before that in float32, decide time and memory,
    never the result. Raises DataError on NaN and infinity.
    """
    if coarse is None:
        coarse = [Bfloat16Screen] if Bfloat16Screen.is_fast() else []
    tiles: list[tuple[slice, slice]] = [
        (slice(t, t + tile[0]), slice(i, i + tile[1]))
        for t in range(0, len(text), tile[0])
        for i in range(0, len(image), tile[1])
    ]
    with _workers() as pool:
        work = _Work(image, text, right, coarse, pool)
        counted = pool.map(lambda tile: work.count(*tile), tiles)
        for (texts, images), (for_texts, for_images) in zip(tiles, counted, strict=True):
            work.texts.add(texts, for_texts)
            work.images.add(images, for_images)
    return BothRanks(work.images.ranks(), work.texts.ranks())


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Give threads that each work alone: torch's own would wait for each other at every product.

    Setting the number in a thread is for this thread and those to come, so it is set back here.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            min(before, WORKERS), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _Work:
    """Vectors, right answers and screens, for one tile after the other."""

    def __init__(
        self,
        image: NDArray[Any],
        text: NDArray[Any],
        right: RightPairs,
        coarse: Sequence[type[Screen]],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.image = measured(image, "image embeddings", pool.map)
        self.text = measured(text, "text embeddings", pool.map)
        order = np.argsort(right.text, kind="stable")
        self.right = RightPairs(right.image[order], right.text[order], right.for_image[order])
        parts = [slice(p, p + OWN) for p in range(0, len(order), OWN)]
        own = pool.map(lambda p: self.scores(self.right.image[p], self.right.text[p]), parts)
        own_P = np.concatenate(list(own))
        always = np.ones(len(own_P), bool)
        self.images = _Side(len(image), self.right.image, own_P, self.right.for_image)
        self.texts = _Side(len(text), self.right.text, own_P, always)
        best = (self.images.best.astype(np.float64), self.texts.best.astype(np.float64))
        sides = (self.image, self.text, *best, pool.map)
        self.fine = Float32Screen(*sides)
        self.screens = [*(screen(*sides) for screen in coarse), self.fine]
        self.in_vain: list[list[bool]] = [[] for _ in self.screens]  # for each tile screened

    def scores(self, images: Ints, texts: Ints) -> Scores:
        """Return the exact scores of pairs."""
        image, text = self.image.values, self.text.values
        scores = np.empty(len(images), np.float32)
        products = np.empty((min(PAIRS, len(images)), image.shape[1]))
        text_pD = np.empty(products.shape, text.dtype)
        for start in range(0, len(images), PAIRS):
            part = slice(start, start + PAIRS)
            few = len(images[part])
            # With mode "clip" NumPy writes into `out` directly; the places are all valid anyway.
            text.take(texts[part], axis=0, out=text_pD[:few], mode="clip")
            products[:few] = image[images[part]]
            products[:few] *= text_pD[:few]
            # Along rows of one length NumPy adds in one order, whatever else is in the array. A
            # matrix product or einsum would not promise that.
            scores[part] = np.add.reduce(products[:few], axis=1)
        return scores

    def count(self, texts: slice, images: slice) -> tuple[_Counts, _Counts]:
        """Count the wrong candidates in a tile, for its texts and for its images."""
        right = self._right_inside(texts, images)
        for screen, in_vain in zip(self.screens, self.in_vain, strict=True):
            if len(in_vain) >= TRIES and 2 * sum(in_vain) > len(in_vain):
                continue  # it left too much open in most tiles
            keys = screen.keys(texts, images)
            keys[right] = screen.lowest
            sides = (
                _Screened(keys, screen.text_edges, texts, axis=0),
                _Screened(keys, screen.image_edges, images, axis=1),
            )
            is_vain = sum(side.num_open for side in sides) > OPEN_SHARE * keys.size
            in_vain.append(is_vain)
            if not is_vain:
                pairs = [side.open_pairs() for side in sides]
                return self._with_open([side.counts() for side in sides], pairs, texts, images)
        return self._count_in_float64(texts, images, right)

    def _right_inside(self, texts: slice, images: slice) -> Pairs:
        """Return the right pairs in a tile, by their places in it."""
        first, last = np.searchsorted(self.right.text, (texts.start, texts.stop))
        text, image = self.right.text[first:last], self.right.image[first:last]
        inside = (image >= images.start) & (image < images.stop)
        return text[inside] - texts.start, image[inside] - images.start

    def _with_open(
        self, known: list[_Counts], pairs: list[Pairs], texts: slice, images: slice
    ) -> tuple[_Counts, _Counts]:
        """Return what is known of both sides of a tile and what the pairs left open add to it.

        pairs: for each side (queries, candidates), in the order of the queries.
        """
        total = []
        for axis, (counts, (query, candidate)) in enumerate(zip(known, pairs, strict=True)):
            side, queries = ((self.texts, texts), (self.images, images))[axis]
            above = counts.above
            if len(query) > PAIRS:
                keys, edges = self.fine.pair_keys(texts, images, (query, candidate), axis)
                is_above = keys > edges.high
                above = above + np.bincount(query[is_above], minlength=len(above))
                still = (keys >= edges.low) & ~is_above
                query, candidate = query[still], candidate[still]
            text, image = (query, candidate) if axis == 0 else (candidate, query)
            scores = self.scores(image + images.start, text + texts.start)
            found = side.compared(query + queries.start, scores, queries)
            total.append(_Counts(above + found.above, counts.tied + found.tied))
        return total[0], total[1]

    def _count_in_float64(
        self, texts: slice, images: slice, right: Pairs
    ) -> tuple[_Counts, _Counts]:
        """Count in float64, where the order of a sum matters only beside a rounding to float32."""
        text_nD = self.text.values[texts].astype(np.float64)
        products = text_nD @ self.image.values[images].astype(np.float64).T
        error = self.text.norms[texts] * self.image.norms[images].max()
        error = (text_nD.shape[1] * 2.0**-52 * error)[:, None]
        low, high = (products - error).astype(np.float32), (products + error).astype(np.float32)
        low[right] = high[right] = -np.inf
        known, pairs = [], []
        for side, queries, lows, highs in (
            (self.texts, texts, low, high),
            (self.images, images, low.T, high.T),
        ):
            best = side.best[queries, None]
            above, tied = lows > best, (lows == best) & (highs == best)
            known.append(_Counts(above.sum(axis=1), tied.sum(axis=1)))
            pairs.append(np.nonzero((highs >= best) & ~above & ~tied))
        return self._with_open(known, pairs, texts, images)


class _Screened:
    """What a screen says about one side of a tile; `axis` is that of the queries."""

    def __init__(self, keys: NDArray[Any], edges: Edges, queries: slice, axis: int) -> None:
        low, high = edges.low[queries], edges.high[queries]
        self.num_queries = len(low)
        # Most queries have no candidate in a tile that comes near their best right answer.
        self.queries = np.flatnonzero(keys.max(axis=1 - axis) >= low)
        near = keys.take(self.queries, axis=axis)
        near = near if axis == 0 else np.ascontiguousarray(near.T)  # a row for each query
        is_above = near > high[self.queries, None]
        self.is_open = near >= low[self.queries, None]
        self.is_open ^= is_above
        self.num_open = np.count_nonzero(self.is_open)
        self.surely_above = _count_in_rows(is_above)

    def counts(self) -> _Counts:
        """Return what is sure."""
        above = np.zeros(self.num_queries, np.int64)
        above[self.queries] = self.surely_above
        return _Counts(above, np.zeros(self.num_queries, np.int64))

    def open_pairs(self) -> Pairs:
        """Return queries and candidates of the pairs between the edges, by places in the tile."""
        row, candidate = np.divmod(np.flatnonzero(self.is_open), self.is_open.shape[1])
        return self.queries[row], candidate


def _count_in_rows(answers: NDArray[np.bool_]) -> Ints:
    """Count in each row of answers, ten times faster than np.count_nonzero does.

    Eight answers, bytes of 0 or 1, are added as one word, up to 255 words before a byte is full.
    """
    if answers.shape[1] % 8:
        answers = np.pad(answers, ((0, 0), (0, -answers.shape[1] % 8)))
    words = answers.view(np.uint64)
    counts = np.zeros(len(words), np.int64)
    for start in range(0, words.shape[1], 255):
        sums = np.add.reduce(words[:, start : start + 255], axis=1)
        counts += sums.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return counts
