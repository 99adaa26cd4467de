"""Two runs of the same task on the same data: what sets them apart, and how surely.

Unlike runs are refused. Not for figures side by side (table.py), nor for the tests themselves
(bootstrap.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from m2encoder.errors import DataError
from m2encoder.eval.bootstrap import mcnemar, paired_bootstrap_of_groups
from m2encoder.eval.metric_names import ordered
from m2encoder.eval.query_values import (
    Parts,
    Queries,
    knows_pictures,
    parts_of,
    queries_of,
    values_of,
)
from m2encoder.eval.result_fields import IMMATERIAL, plain
from m2encoder.eval.results import Result

MAX_CHANGES = 10


class Change(NamedTuple):
    """One metric in both runs."""

    metric: str
    first: float
    second: float
    difference: float
    """The second less the first."""
    ci95: tuple[float, float] | None
    """Paired bootstrap interval of the difference; None without per-query values."""
    n: int
    only_first: int | None
    """Queries that the first alone gets right at rank 1, ties counting as wrong."""
    only_second: int | None
    p_value: float | None
    """McNemar's, for hits at rank 1."""


class QueryChange(NamedTuple):
    """One query whose right answer moved."""

    query: int
    text: str | None
    """The query itself, where the results kept it."""
    first: float
    """Rank of the right answer, from 1; a mean where scores tie."""
    second: float


class Group(NamedTuple):
    """Queries of one kind: a direction of retrieval, or pictures to classify."""

    name: str
    better: int
    """Queries whose right answer the second run ranks higher."""
    worse: int
    same: int
    gains: list[QueryChange]
    losses: list[QueryChange]


@dataclass(frozen=True)
class Comparison:
    """What sets the second of two runs apart from the first."""

    task: str
    protocol: str
    language: str
    first: str
    """The first model's name."""
    second: str
    metrics: list[Change]
    groups: list[Group]
    notes: list[str]
    """What else differs and may explain it: preprocessing, precision."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        shown = {"metrics": [each._asdict() for each in self.metrics]}
        groups = [each._asdict() for each in self.groups]
        for group in groups:
            group |= {key: [c._asdict() for c in group[key]] for key in ("gains", "losses")}
        return plain(vars(self) | shown | {"groups": groups})


def first_difference(first: Result, second: Result) -> str | None:
    """Name the first thing that makes two runs unlike; None where they can be compared."""
    for name, one, other in _facts(first, second):
        if one != other:
            return f"{name} is {_shown(one)} in the first and {_shown(other)} in the second"
    return None


def _facts(first: Result, second: Result) -> list[tuple[str, Any, Any]]:
    """Return (name, of the first, of the second) of all that must agree, the weightiest first."""
    pairs: list[tuple[str, Any, Any]] = [
        ("task", first.task, second.task),
        ("language", first.language, second.language),
    ]
    fields = [("protocol", "id"), ("protocol", "checksum"), ("data", "images"), ("data", "texts")]
    for field, key in fields:
        one, other = getattr(first, field).get(key), getattr(second, field).get(key)
        pairs.append((f"{field}.{key}", one, other))
    pairs.append(("what was left out", _skipped(first), _skipped(second)))
    for key in sorted({*first.settings, *second.settings} - IMMATERIAL):
        one, other = first.settings.get(key), second.settings.get(key)
        pairs.append((f"settings.{key}", plain(one), plain(other)))
    if first.settings.get("gt", "index") != "index":  # equal texts are right: how they are written
        key = "text_normalization"
        one, other = first.preprocessing.get(key), second.preprocessing.get(key)
        pairs.append((f"preprocessing.{key}", one, other))
    mine, theirs = queries_of(first), queries_of(second)
    for name in sorted(mine.keys() & theirs.keys()):
        pairs.append((f"number of {name} queries", len(mine[name]), len(theirs[name])))
    return pairs


def _skipped(result: Result) -> list[str]:
    return sorted(str(bad.get("name")) for bad in result.data.get("skipped") or ())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value):,} items ({', '.join(map(str, value[:3]))})" if value else "nothing"
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def compare(first: Result, second: Result, *, seed: int = 0) -> Comparison:
    """Compare two runs metric by metric; a difference is the second less the first.

    seed: of the bootstrap's draws. Raises DataError naming the first thing in which the runs are
    unlike: task, language, protocol, data or settings.
    """
    if difference := first_difference(first, second):
        raise DataError(
            f"unlike runs of {first.task} {first.protocol['id']}: {difference}; compare runs of "
            f"the same task, data and settings"
        )
    mine, theirs = queries_of(first), queries_of(second)
    names = ordered(first.metrics.keys() & second.metrics.keys())
    return Comparison(
        first.task,
        str(first.protocol["id"]),
        first.language,
        first.model["name"],
        second.model["name"],
        [_change(name, first, second, seed) for name in names],
        [_group(name, mine[name], theirs[name]) for name in mine if name in theirs],
        _notes(first, second),
    )


def _change(name: str, first: Result, second: Result, seed: int) -> Change:
    one, other = first.metrics[name], second.metrics[name]
    difference, interval = other.value - one.value, None
    parts = parts_of(name, first) or Parts([])
    mine = [values_of(part, first) for part in parts.names]
    theirs = [values_of(part, second) for part in parts.names]
    known = [each for each in (*mine, *theirs) if each is not None]
    if parts.names and len(known) == 2 * len(parts.names):
        values = [[each.values for each in side if each is not None] for side in (theirs, mine)]
        clusters = [each.clusters for each in mine if each is not None]
        found = paired_bootstrap_of_groups(values[0], values[1], clusters, seed=seed).ci95
        interval = found and (parts.scale * found[0], parts.scale * found[1])
    change = Change(name, one.value, other.value, difference, interval, one.n, None, None, None)
    answers = [each.is_right for each in known]
    if len(parts.names) != 1 or len(answers) != 2 or answers[0] is None or answers[1] is None:
        return change
    return change._replace(**mcnemar(answers[0], answers[1])._asdict())


def _group(name: str, first: Queries, second: Queries) -> Group:
    moved = second.ranks - first.ranks
    order = np.argsort(moved, kind="stable")
    gains = [row for row in order[:MAX_CHANGES] if moved[row] < 0]
    losses = [row for row in order[::-1][:MAX_CHANGES] if moved[row] > 0]

    def change(row: int) -> QueryChange:
        texts = first.texts if first.texts is not None else second.texts
        text = None if texts is None else str(texts[row])
        return QueryChange(int(row), text, float(first.ranks[row]), float(second.ranks[row]))

    better, worse = int(np.count_nonzero(moved < 0)), int(np.count_nonzero(moved > 0))
    changes = [change(row) for row in gains], [change(row) for row in losses]
    return Group(name, better, worse, len(moved) - better - worse, *changes)


def _notes(first: Result, second: Result) -> list[str]:
    notes = []
    if first.model["fingerprint"] == second.model["fingerprint"]:
        notes.append("both runs are of the same model")
    for field in ("preprocessing", "environment"):
        one, other = getattr(first, field), getattr(second, field)
        for key in sorted({*one, *other} - {"truncated_texts", "machine"}):
            if one.get(key) != other.get(key):
                values = f"{_shown(one.get(key))} in the first, {_shown(other.get(key))} in the "
                notes.append(f"{key.replace('_', ' ')}: {values}second")
    if alone := [name for name in queries_of(first) if not knows_pictures(name, first)]:
        notes.append(
            f"{', '.join(alone)}: which picture a query is about was not kept, so intervals take "
            f"each query alone and may be too narrow"
        )
    for name in ordered(first.metrics.keys() ^ second.metrics.keys()):
        notes.append(f"{name} was measured in one of the runs only")
    return notes


class Compared(NamedTuple):
    """All that two sets of results have in common."""

    comparisons: list[Comparison]
    alone: list[str]
    """Results of one side without a counterpart: which side, task, protocol and language."""


def compare_many(first: Sequence[Result], second: Sequence[Result], *, seed: int = 0) -> Compared:
    """Compare the results of two folders that are of the same task, protocol and language.

    Raises DataError as `compare` does where such a pair is unlike in other ways, or where there is
    no such pair at all.
    """
    if len(first) == len(second) == 1:
        return Compared([compare(first[0], second[0], seed=seed)], [])
    rest = list(second)
    comparisons, alone = [], []
    for one in first:
        others = [other for other in rest if _place(other) == _place(one)]
        if not others:
            alone.append(f"first only: {_place(one)}")
            continue
        other = next((each for each in others if first_difference(one, each) is None), others[0])
        comparisons.append(compare(one, other, seed=seed))
        rest = [each for each in rest if each is not other]
    alone += [f"second only: {_place(other)}" for other in rest]
    if not comparisons:
        raise DataError(
            f"nothing to compare: {'; '.join(alone[:4])}; expected results of the same task, "
            f"protocol and language on both sides"
        )
    return Compared(comparisons, alone)


def _place(result: Result) -> str:
    return f"{result.task} {result.protocol['id']} {result.language}"
