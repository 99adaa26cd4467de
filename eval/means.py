"""Means of per-query values as metrics: with the interval clustered by picture, and tie bounds.

Not for the drawing itself (bootstrap.py), nor for the values.
"""

from typing import Any

import numpy as np

from m2encoder.eval.bootstrap import DRAWS, mean_interval, paired_bootstrap
from m2encoder.eval.metric import Metric, undefined
from m2encoder.ranks import Hits


def mean_metric(
    values: Any,
    clusters: Any,
    *,
    low: Any = None,
    high: Any = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Metric:
    """Return the mean of (Q,) values; queries whose value is NaN are left out and not in `n`.

    clusters: (Q,) the picture of each. low, high: (Q,) the values at the worst and best order of
    ties. Undefined without any query.
    """
    values, clusters = np.asarray(values, np.float64), np.asarray(clusters)
    kept = np.isfinite(values)
    if not kept.any():
        return undefined()
    ci95 = mean_interval(values[kept], clusters[kept], seed=seed, draws=draws)
    low, high = (
        float(np.mean(np.asarray(v)[kept])) if v is not None else None for v in (low, high)
    )
    tied = low is not None and low != high
    return Metric(
        float(values[kept].mean()),
        int(kept.sum()),
        ci95,
        low if tied else None,
        high if tied else None,
    )


def hits_metric(hits: Hits, clusters: Any, *, seed: int = 0, draws: int = DRAWS) -> Metric:
    """Return the mean of hits, with their tie bounds."""
    return mean_metric(hits.value, clusters, low=hits.low, high=hits.high, seed=seed, draws=draws)


def change_metric(
    before: Hits, after: Hits, clusters: Any, *, seed: int = 0, draws: int = DRAWS
) -> Metric:
    """Return how much the mean of hits rises from `before` to `after`, paired by query.

    (Q,) each, for the same queries; the bounds are those that ties on both sides allow together.
    """
    if not len(after.value):
        return undefined()
    paired = paired_bootstrap(after.value, before.value, clusters, seed=seed, draws=draws)
    low = float(np.mean(after.low - before.high))
    high = float(np.mean(after.high - before.low))
    tied = low != high
    return Metric(
        paired.difference, paired.n, paired.ci95, low if tied else None, high if tied else None
    )
