"""What each query of a result gave, read from its ranks: hits, expected ranks, clusters.

Not for ranking (m2encoder/ranks.py), nor for comparing (compare.py).
"""

import math
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.eval.results import Result
from m2encoder.ranks import Ranks, expected_ranks, hits_at_k

TOP_GROUP = "class"
"""The group of queries that top-k is about."""


class Queries(NamedTuple):
    """One group of queries, in the order of the data."""

    ranks: NDArray[np.float64]
    """(Q,) rank of the best right answer, from 1; a mean where scores tie."""
    clusters: NDArray[np.generic]
    """(Q,) the picture of each: queries of one picture are drawn together."""
    texts: NDArray[np.generic] | None
    raw: Ranks

    def __len__(self) -> int:
        return len(self.ranks)


class QueryValues(NamedTuple):
    """What a metric is the mean of."""

    values: NDArray[np.float64]
    clusters: NDArray[np.generic]
    is_right: NDArray[np.bool_] | None
    """(Q,) whether the right answer surely comes first; None for other metrics than that."""


def queries_of(result: Result) -> dict[str, Queries]:
    """Return the groups of queries whose ranks a result keeps: `t2i`, `i2t`, `class`, ..."""
    groups = {}
    for key in result.ranks:
        name = key.removesuffix("_above")
        columns = [result.ranks.get(f"{name}_{column}") for column in Ranks._fields]
        if name == key or any(column is None for column in columns):
            continue
        raw = Ranks(*(np.asarray(column, np.int64) for column in columns))
        count = len(raw.above)
        if any(column.shape != (count,) for column in raw):
            continue
        clusters = _clusters(result, name, count)
        texts = result.ranks.get(f"{name}_query")
        texts = None if texts is None or len(texts) != count else texts
        groups[name] = Queries(expected_ranks(raw).value, clusters, texts, raw)
    return groups


def values_of(metric: str, result: Result) -> QueryValues | None:
    """Return what a metric is the mean of; None where the result does not keep it.

    None too where their mean is not the metric's value: then it is defined in another way.
    """
    found = _hits(metric, result) or _kept(metric, result)
    if found is None or not len(found.values):
        return None
    value = result.metrics[metric].value
    agree = math.isclose(float(found.values.mean()), value, rel_tol=1e-6, abs_tol=1e-9)
    return found if agree else None


def _hits(metric: str, result: Result) -> QueryValues | None:
    if metric == "mean_per_class_recall":
        return _per_class(result)
    named = re.fullmatch(r"(?:(?P<group>\w+)_r|top_?)(?P<k>[1-9]\d*)(?P<language>_\w+)?", metric)
    if named is None:
        return None
    name = (named["group"] or TOP_GROUP) + (named["language"] or "")
    group, k = queries_of(result).get(name), int(named["k"])
    if group is None:
        return None
    hits = hits_at_k(group.raw, k)
    return QueryValues(hits.value, group.clusters, hits.low == 1 if k == 1 else None)


def _per_class(result: Result) -> QueryValues | None:
    """Return hits weighted so that every class counts the same."""
    group, target = queries_of(result).get(TOP_GROUP), result.ranks.get(f"{TOP_GROUP}_target")
    if group is None or target is None or target.shape != group.ranks.shape:
        return None
    _, place, counts = np.unique(target, return_inverse=True, return_counts=True)
    weights = len(target) / (len(counts) * counts[place])
    return QueryValues(hits_at_k(group.raw, 1).value * weights, group.clusters, None)


def _kept(metric: str, result: Result) -> QueryValues | None:
    """Read (Q,) shares that are kept under the metric's name, or as what was `right`."""
    for name in (f"{metric}_correct", metric, "right"):
        values = result.ranks.get(name)
        if values is not None and values.ndim == 1 and values.dtype.kind in "biuf":
            values = values.astype(np.float64)
            sure = metric.startswith("accuracy") and np.isin(values, (0, 1)).all()
            clusters = _clusters(result, metric, len(values))
            return QueryValues(values, clusters, values == 1 if sure else None)
    return None


def _clusters(result: Result, name: str, count: int) -> NDArray[np.generic]:
    known = [result.ranks.get(key) for key in _cluster_keys(name)]
    fitting = [each for each in known if each is not None and each.shape == (count,)]
    return fitting[0] if fitting else np.arange(count)


def _cluster_keys(name: str) -> tuple[str, str, str]:
    return f"{name}_cluster", f"{name}_image", "cluster"


def knows_pictures(group: str, result: Result) -> bool:
    """Say whether a result keeps the picture of each query of a group, or each is a picture."""
    return group == TOP_GROUP or any(key in result.ranks for key in _cluster_keys(group))


class Parts(NamedTuple):
    """The metrics that a metric is made of."""

    names: list[str]
    scale: int = 1
    """What their mean is multiplied with: a sum of six recalls is six times their mean."""


def parts_of(metric: str, result: Result) -> Parts | None:
    """Return what a metric is made of: mostly itself; several recalls where it sums them up.

    None where they do not give its value: then it is defined in another way.
    """
    summed = re.fullmatch(r"(?:([ti]2[ti])_)?mean_recall|rsum", metric)
    if summed is None:
        return Parts([metric])
    wanted = re.compile(rf"{summed[1] or '[ti]2[ti]'}_r\d+")
    names = [name for name in result.metrics if wanted.fullmatch(name)]
    if not names:
        return None
    scale = len(names) if metric == "rsum" else 1
    mean = float(np.mean([result.metrics[name].value for name in names]))
    agree = math.isclose(scale * mean, result.metrics[metric].value, rel_tol=1e-6, abs_tol=1e-9)
    return Parts(names, scale) if agree else None
