"""Intervals and comparisons by resampling clusters of queries, seeded; McNemar's exact test.

Not for the per-query values themselves, nor for what may be compared with what (compare.py).
"""

# Q queries   C clusters, most often pictures   M measures   R draws

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
"""Enough for the ends of a 95 % interval to be steady to about a tenth of its width."""
BLOCK = 1 << 22
"""Cluster weights made together, 16 MB."""
KEPT_BYTES = 1 << 27
"""More weights than this are drawn again, by the same seeds, whenever they are needed."""

TRIED = 32
"""Values that one look at all draws compares their medians with."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = tuple[float, float]


class Resamples:
    """Draws of clusters with replacement: how often each of C clusters is in each of R draws.

    Captions of one picture succeed and fail together, so a draw takes or leaves them together; an
    interval over single captions would be too narrow. The same arguments give the same draws.
    """

    def __init__(self, num_clusters: int, *, draws: int = DRAWS, seed: int = 0) -> None:
        if num_clusters < 1 or draws < 1:
            raise ValueError(f"{num_clusters} clusters and {draws} draws, expected at least 1")
        self.num_clusters, self.draws, self.seed = num_clusters, draws, seed
        self._rows = max(1, BLOCK // num_clusters)
        self._kept: dict[int, NDArray[np.float32]] = {}

    def weights(self) -> Iterator[NDArray[np.float32]]:
        """Yield (some draws, C) weights, in order; they are not the caller's to change."""
        for start in range(0, self.draws, self._rows):
            yield self._weights(start)

    def sums(self, totals_CM: Floats) -> Floats:
        """Return (R, M): per draw the sum of its clusters' totals, (C, M)."""
        # Whole numbers, as counts are unless scores tie, lose nothing in float32: a draw's sum is
        # at most C times the largest.
        is_small = np.abs(totals_CM).max(initial=0) * self.num_clusters < 2**24
        is_whole = is_small and np.array_equal(totals_CM, np.rint(totals_CM))
        totals = totals_CM.astype(np.float32) if is_whole else totals_CM
        sums = [weights.astype(totals.dtype, copy=False) @ totals for weights in self.weights()]
        return np.concatenate(sums).astype(np.float64)

    def _weights(self, start: int) -> NDArray[np.float32]:
        if start in self._kept:
            return self._kept[start]
        rows = min(self._rows, self.draws - start)
        weights = np.empty((rows, self.num_clusters), np.float32)
        chance = np.random.default_rng([self.seed, start])
        for row in range(rows):
            places = chance.integers(self.num_clusters, size=self.num_clusters)
            weights[row] = np.bincount(places, minlength=self.num_clusters)
        if 4 * self.draws * self.num_clusters <= KEPT_BYTES:
            self._kept[start] = weights
        return weights


def cluster_totals(values: Any, clusters: Any, num_clusters: int) -> Floats:
    """Return (C, M + 1): per cluster the sum of each measure over its queries, then their number.

    values: (Q, M) or (Q,). clusters: (Q,) integers below num_clusters.
    """
    values_QM, clusters = _columns(values), np.asarray(clusters)
    if clusters.shape != (len(values_QM),):
        raise ValueError(
            f"clusters have shape {clusters.shape}, expected one for each of {len(values_QM):,}"
        )
    totals = np.empty((num_clusters, values_QM.shape[1] + 1))
    for measure, values_Q in enumerate(values_QM.T):
        totals[:, measure] = np.bincount(clusters, weights=values_Q, minlength=num_clusters)
    totals[:, -1] = np.bincount(clusters, minlength=num_clusters)
    return totals


def bootstrap_means(values: Any, clusters: Any, resamples: Resamples) -> Floats:
    """Return (R, M): per draw the mean of each measure over the queries of its clusters.

    Arguments as for `cluster_totals`. NaN where a draw has no query. Two calls with the same
    resamples take the same clusters in each draw, so their results may be added or subtracted.
    """
    sums = resamples.sums(cluster_totals(values, clusters, resamples.num_clusters))
    count = sums[:, -1:]
    return np.divide(sums[:, :-1], count, out=np.full_like(sums[:, :-1], np.nan), where=count > 0)


def interval(samples: Any) -> Interval | None:
    """Return the 2.5 and 97.5 percentiles of what draws gave, (R,); None if they gave nothing."""
    samples = np.asarray(samples, np.float64)
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return None
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def mean_interval(
    values: Any, clusters: Any = None, *, draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """Return the interval of the mean of (Q,) values; without clusters each query is its own.

    None with fewer than two clusters, which say nothing about others.
    """
    values = np.asarray(values, np.float64)
    clusters, num_clusters = _numbered(clusters, len(values))
    if num_clusters < 2:
        return None
    resamples = Resamples(num_clusters, draws=draws, seed=seed)
    return interval(bootstrap_means(values, clusters, resamples)[:, 0])


def median_interval(values: Any, clusters: Any, resamples: Resamples) -> Interval:
    """Return the interval of the median of (Q,) values.

    A draw's median is the smallest value that at least half of its queries do not exceed. The
    interval reaches from the smallest value that at least 2.5 % of the draws' medians do not exceed
    to that of 97.5 %. Both are found by narrowing, so that no draw is sorted.
    """
    known, rank = np.unique(np.asarray(values, np.float64), return_inverse=True)
    clusters = np.asarray(clusters)
    # Where the median of draws will be, give or take four standard errors of a share of a half.
    spread = 2 / math.sqrt(resamples.num_clusters)
    around = np.clip(np.linspace(0.5 - spread, 0.5 + spread, TRIED), 0, 1)
    tried = np.unique(np.quantile(rank, around, method="inverted_cdf").astype(np.int64))
    ends = {0.025: (0, len(known) - 1), 0.975: (0, len(known) - 1)}
    while any(low < high for low, high in ends.values()):
        reached = _medians_within(tried, rank, clusters, resamples)
        ends = {share: _narrowed(end, tried, reached >= share) for share, end in ends.items()}
        grids = [np.linspace(low, high, TRIED // 2).astype(np.int64) for low, high in ends.values()]
        tried = np.unique(np.concatenate(grids))
    return float(known[ends[0.025][0]]), float(known[ends[0.975][0]])


def _medians_within(tried: Ints, rank: Ints, clusters: Ints, resamples: Resamples) -> Floats:
    """Return per value tried, given by its place in order, the share of medians not above it."""
    within = cluster_totals(rank[:, None] <= tried, clusters, resamples.num_clusters)
    sums = resamples.sums(within)
    return np.mean(2 * sums[:, :-1] >= sums[:, -1:], axis=0)


def _narrowed(end: tuple[int, int], tried: Ints, reached: NDArray[np.bool_]) -> tuple[int, int]:
    """Return between which places the first one that is reached lies, after those tried."""
    below, above = tried[~reached], tried[reached]
    return max(end[0], int(below.max(initial=-1)) + 1), min(end[1], int(above.min(initial=end[1])))


class Paired(NamedTuple):
    """How two models differ on the same queries: the first's mean less the second's."""

    difference: float
    ci95: Interval | None
    """Percentile interval; None with fewer than two clusters."""
    n: int
    """Queries."""


def paired_bootstrap(
    first: Any, second: Any, clusters: Any = None, *, draws: int = DRAWS, seed: int = 0
) -> Paired:
    """Compare the means of two models' (Q,) values of the same queries.

    clusters: (Q,), such as the picture of each query; without them each query is its own. A draw
    takes the same clusters for both models.
    """
    if clusters is None:
        clusters = np.arange(len(first))
    return paired_bootstrap_of_groups([first], [second], [clusters], draws=draws, seed=seed)


def paired_bootstrap_of_groups(
    first: Sequence[Any],
    second: Sequence[Any],
    clusters: Sequence[Any],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Paired:
    """Compare two models by the mean of several groups' means, such as a mean recall.

    Each group, such as the queries of one direction, has (Q,) values of both models and their
    clusters. A draw takes the same clusters for both models and all groups.
    """
    gaps = [_gap(*pair) for pair in zip(first, second, strict=True)]
    difference, total = float(np.mean([gap.mean() for gap in gaps])), sum(map(len, gaps))
    numbered, num_clusters = _numbered(np.concatenate(list(clusters)), total)
    if num_clusters < 2:
        return Paired(difference, None, total)
    resamples = Resamples(num_clusters, draws=draws, seed=seed)
    ends = np.cumsum([len(gap) for gap in gaps])[:-1]
    samples = [
        bootstrap_means(gap, part, resamples)
        for gap, part in zip(gaps, np.split(numbered, ends), strict=True)
    ]
    return Paired(difference, interval(np.mean(samples, axis=0)[:, 0]), total)


def _gap(first: Any, second: Any) -> Floats:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"values have shapes {first.shape} and {second.shape}, expected the same queries, "
            f"at least one"
        )
    return first - second


class McNemar(NamedTuple):
    """McNemar's test of two models' right and wrong answers to the same queries."""

    only_first: int
    """Queries that only the first model gets right."""
    only_second: int
    p_value: float
    """The chance of so uneven a split, or a more uneven one, if both models were as good."""


def mcnemar(first: Any, second: Any) -> McNemar:
    """Test whether two models are right equally often; first, second: (Q,) bool.

    Exact: among the n queries that one model alone gets right, each model has its half by a fair
    coin; p = min(1, 2 P(X <= the smaller of both)), X binomial (n, 1/2). It takes queries as
    independent; where pictures own several, `paired_bootstrap` is the safer one. A chance of being
    right, as ties give, is neither: decide first what counts. Raises ValueError on other types.
    """
    first, second = np.asarray(first), np.asarray(second)
    if (
        first.shape != second.shape
        or first.ndim != 1
        or {first.dtype, second.dtype} != {np.dtype(bool)}
    ):
        raise ValueError(
            f"answers are {first.dtype} {first.shape} and {second.dtype} {second.shape}, expected "
            f"right or wrong (bool) for the same queries"
        )
    only_first = int(np.count_nonzero(first & ~second))
    only_second = int(np.count_nonzero(second & ~first))
    p_value = min(1.0, 2 * _half_binomial(min(only_first, only_second), only_first + only_second))
    return McNemar(only_first, only_second, p_value)


def _half_binomial(k: int, n: int) -> float:
    """Return P(X <= k), X binomial (n, 1/2): by logarithms, so that large n do not overflow."""
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    largest = max(logs)  # the last, since k <= n / 2
    return math.exp(largest - n * math.log(2)) * math.fsum(math.exp(x - largest) for x in logs)


def _columns(values: Any) -> Floats:
    values = np.asarray(values, np.float64)
    return values[:, None] if values.ndim == 1 else values


def _numbered(clusters: Any, count: int) -> tuple[Ints, int]:
    """Return clusters as 0, 1, ... without gaps, and how many; without any, each query's own."""
    if clusters is None:
        return np.arange(count), count
    known, numbered = np.unique(np.asarray(clusters), return_inverse=True)
    return numbered, len(known)
