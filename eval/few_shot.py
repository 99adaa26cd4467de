"""Accuracy from a few examples of each class: nearest class mean and logistic regression.

Not for what all examples together give (probe.py).
"""

# N train pictures   Q test pictures   D width of an embedding   K classes   S draws

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.logistic import fit_logistic, has_sklearn
from m2encoder.eval.metric import Metric, TaskOutput
from m2encoder.eval.probe import Split, with_unseen
from m2encoder.ranks import Hits, hits_at_k, ranks_of_scores

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5
STRENGTH = 1.0
"""C of scikit-learn, for scaled vectors: with so few examples none can be held out to choose it."""
# Student's t at 97.5 %, by degrees of freedom from 1.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_975 = 1.959964

Scorer = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]], Any]


def measure_few_shot(
    split: Split, *, shots: Sequence[int] = SHOTS, draws: int = DRAWS, seed: int = 0
) -> TaskOutput:
    """Measure top-1 with n examples of each class, over several draws of them.

    `nearest_mean_top1_at_N`: the class whose mean of unit vectors has the largest cosine.
    `logistic_top1_at_N`: logistic regression (logistic.py) where scikit-learn is installed.
    Each is the mean over draws; the interval is Student's t over draws, so it says how much the
    choice of examples matters, not that of test pictures. The examples for n are among those for
    any larger n of the same draw. A class with fewer than n gives all it has and is counted; an n
    that no class reaches is left out. Raises ConfigError on shots or draws below 1, DataError if no
    class has as many as the smallest n.
    """
    if not shots or min(shots) < 1 or draws < 1:
        raise ConfigError(
            f"shots {list(shots)} and {draws} draws, expected at least 1 of each; change them"
        )
    sizes = np.bincount(split.train.targets, minlength=len(split.labels))
    reached = [n for n in sorted(set(shots)) if n <= sizes.max()]
    if not reached:
        raise DataError(
            f"no class has more than {sizes.max():,} train pictures, {min(shots):,} shots are "
            f"asked for; ask for fewer"
        )
    orders = [_class_orders(split.train.targets, [seed, draw]) for draw in range(draws)]
    methods: dict[str, Scorer] = {"nearest_mean": nearest_mean_scores}
    if has_sklearn():
        methods["logistic"] = _logistic_scores
    metrics: dict[str, Metric] = {}
    ranks: dict[str, NDArray[np.generic]] = {}
    by_draw: dict[str, list[float]] = {}
    for method, scorer in methods.items():
        for n in reached:
            hits = [_hits(split, order, n, scorer) for order in orders]
            name = f"{method}_top1_at_{n}"
            by_draw[name] = [float(each.value.mean()) for each in hits]
            metrics[name] = _over_draws(hits)
            ranks[name] = np.mean([each.value for each in hits], axis=0)
    details = {
        "draws": draws,
        "by_draw": by_draw,
        "interval": "Student's t over draws of the examples",
        "shots_left_out": sorted(set(shots) - set(reached)),
        "classes_with_fewer": {
            str(n): [split.labels[k] for k in np.flatnonzero((sizes > 0) & (sizes < n))]
            for n in reached
        },
        "logistic": f"C {STRENGTH:g}" if has_sklearn() else "left out: needs scikit-learn",
    }
    return TaskOutput(metrics, details | split.facts(), ranks)


def _class_orders(targets: NDArray[np.int64], seed: list[int]) -> list[NDArray[np.int64]]:
    """Return the rows of each class in an order of their own."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(targets == k)) for k in np.unique(targets)]


def _hits(split: Split, order: Sequence[NDArray[np.int64]], n: int, scorer: Scorer) -> Hits:
    rows = np.concatenate([of_class[:n] for of_class in order])
    targets = split.train.targets[rows]
    found = scorer(split.train.vectors[rows], targets, split.test.vectors)
    scores = with_unseen(found, np.unique(targets), len(split.labels))
    return hits_at_k(ranks_of_scores(scores, split.test.targets), 1)


def nearest_mean_scores(
    x_ND: NDArray[np.float32], targets: NDArray[np.int64], test_QD: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return (Q, C): cosines with the mean of each class that occurs, rounded from float64."""
    means = np.stack(
        [x_ND[targets == k].mean(axis=0, dtype=np.float64) for k in np.unique(targets)]
    )
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return (test_QD.astype(np.float64) @ means.T).astype(np.float32)


def _logistic_scores(
    x_ND: NDArray[np.float32], targets: NDArray[np.int64], test_QD: NDArray[np.float32]
) -> NDArray[np.float64]:
    return fit_logistic(x_ND, targets, STRENGTH).scores(test_QD)


def _over_draws(hits: Sequence[Hits]) -> Metric:
    low, value, high = (
        np.asarray([part.mean() for part in side]) for side in zip(*hits, strict=True)
    )
    mean, half = float(value.mean()), student_half_width(value)
    tied = bool((low != high).any())
    return Metric(
        mean,
        len(hits[0].value),
        None if math.isnan(half) else (mean - half, mean + half),
        float(low.mean()) if tied else None,
        float(high.mean()) if tied else None,
    )


def student_half_width(values: NDArray[np.floating]) -> float:
    """Return half the width of the 95 % interval of a mean, NaN of fewer than two values.

    Beyond the table: the first terms of the expansion of Student's t about the normal quantile z,
    z + (z^3 + z) / (4 f), good to 0.001.
    """
    freedom = len(values) - 1
    if freedom < 1:
        return math.nan
    z = NORMAL_975
    t = T_975[freedom - 1] if freedom <= len(T_975) else z + (z**3 + z) / (4 * freedom)
    return t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
