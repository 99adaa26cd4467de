"""Zero-shot classification: accuracies with intervals and tie bounds, classes and confusions.

Not for making classifiers (m2encoder/zero_shot.py), nor for reading class names.
"""

# N pictures   K classes   D width of an embedding   E pairs of classes that occur

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import DataError
from m2encoder.eval.bootstrap import DRAWS, Resamples, bootstrap_means, interval
from m2encoder.eval.metric import Metric, TaskOutput
from m2encoder.eval.scores import check_vectors
from m2encoder.ranks import Hits, Ranks, hits_at_k, ranks_of_scores
from m2encoder.zero_shot import class_score_blocks

CONFUSIONS = 100
"""The most pairs of classes that a result lists."""
WHOLE = 20
"""Up to so many classes a result holds the whole confusion."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def measure_classification(
    image: Any,
    classifier: Any,
    targets: Any,
    *,
    labels: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
) -> TaskOutput:
    """Return what `measure_scores` does, for pictures (N, D) and the vectors of classes (K, D).

    The scores are those of `class_scores`, some pictures at a time. Raises as `measure_scores`.
    """
    image, classifier = check_vectors(image, "pictures"), check_vectors(classifier, "classes")
    if image.shape[1] != classifier.shape[1]:
        raise ValueError(
            f"pictures have shape {image.shape} and classes {classifier.shape}, expected vectors "
            f"of one width"
        )
    targets = _checked_targets(targets, len(image), labels, len(classifier))
    outcome = _outcome(class_score_blocks(image, classifier), targets)
    return _measured(outcome, targets, labels, Resamples(len(image), draws=draws, seed=seed))


def measure_scores(
    scores: Any, targets: Any, *, labels: Sequence[str], draws: int = DRAWS, seed: int = 0
) -> TaskOutput:
    """Return accuracies of scores (N, K), and what is taken for what.

    targets: (N,) the right column of each row. labels: (K,) what the columns are called, as pages
    show it. Metrics: `top1`; `top5` with more than five classes; `mean_per_class_recall`, the mean
    over the classes that occur of each one's top1. Ties are at their expected value under random
    order, with bounds; intervals resample pictures.
    Details: `classes`: [{"name", "n", "top1", "confused_with", "confused_n"}], top1 None where no
    picture is; `confusions`: [{"true", "predicted", "n"}], most frequent first; `confusion`, a row
    for each class, where they are few; `labels_never_seen`; `repeated_labels`; `chance`;
    `tied_pictures`. A picture whose best classes tie counts for each of them in equal parts.
    Raises DataError on NaN, no pictures, or labels that are not one for each column.
    """
    scores = np.asarray(scores)
    targets = _checked_targets(targets, len(scores), labels, scores.shape[-1])
    outcome = _outcome([scores], targets)
    return _measured(outcome, targets, labels, Resamples(len(scores), draws=draws, seed=seed))


def _checked_targets(
    targets: Any, num_pictures: int, labels: Sequence[str], num_classes: int
) -> NDArray[Any]:
    targets = np.asarray(targets)
    if targets.shape != (num_pictures,):
        raise ValueError(
            f"targets have shape {targets.shape}, expected one for each of {num_pictures:,} "
            f"pictures"
        )
    if len(labels) != num_classes:
        raise DataError(
            f"{len(labels):,} labels for {num_classes:,} classes, expected one each; check the list"
        )
    return targets


class _Outcome(NamedTuple):
    """Where the right class of each picture stands, and what pictures are taken for."""

    ranks: Ranks
    true: Ints
    """(E,) classes, and what pictures of them are taken for."""
    predicted: Ints
    pictures: Floats
    """(E,) how many; a picture whose best classes tie is parted among them."""


def _outcome(blocks: Iterable[NDArray[Any]], targets: NDArray[Any]) -> _Outcome:
    ranks: list[Ranks] = []
    pairs, pictures = np.zeros(0, np.int64), np.zeros(0)
    start, num_classes = 0, 1
    for scores in blocks:
        few = targets[start : start + len(scores)]
        ranks.append(ranks_of_scores(scores, few))
        start, num_classes = start + len(scores), scores.shape[1]
        is_best = scores == scores.max(axis=1, keepdims=True)
        row, column = np.nonzero(is_best)
        pairs = np.concatenate([pairs, few[row] * num_classes + column])
        pictures = np.concatenate([pictures, (1 / np.count_nonzero(is_best, axis=1))[row]])
        pairs, place = np.unique(pairs, return_inverse=True)
        pictures = np.bincount(place, weights=pictures).astype(np.float64)
    joined = Ranks(*(np.concatenate(parts) for parts in zip(*ranks, strict=True)))
    return _Outcome(joined, *np.divmod(pairs, num_classes), pictures)


def _measured(
    outcome: _Outcome, targets: NDArray[Any], labels: Sequence[str], resamples: Resamples
) -> TaskOutput:
    ks = (1, 5) if len(labels) > 5 else (1,)
    hits = {f"top{k}": hits_at_k(outcome.ranks, k) for k in ks}
    values = np.stack([found.value for found in hits.values()], axis=1)
    drawn = bootstrap_means(values, np.arange(len(targets)), resamples)
    metrics = {
        name: _metric(Hits(*(part.mean() for part in found)), len(targets), samples)
        for (name, found), samples in zip(hits.items(), drawn.T, strict=True)
    }
    metrics["mean_per_class_recall"] = _mean_recall(hits["top1"], targets, resamples)
    seen = np.bincount(targets, minlength=len(labels))
    details = {
        "classes": _classes(outcome, hits["top1"].value, targets, labels),
        "confusions": _confusions(outcome, labels),
        "labels_never_seen": [labels[k] for k in np.flatnonzero(seen == 0).tolist()],
        "repeated_labels": [name for name, times in Counter(labels).items() if times > 1],
        "chance": 1 / len(labels),
        "tied_pictures": int(np.count_nonzero(outcome.ranks.tied)),
    }
    if len(labels) <= WHOLE:
        whole = np.zeros((len(labels), len(labels)))
        whole[outcome.true, outcome.predicted] = outcome.pictures
        details["confusion"] = [[_plain(count) for count in row] for row in whole]
    ranks = {f"class_{name}": values for name, values in outcome.ranks._asdict().items()}
    return TaskOutput(metrics, details, ranks | {"class_target": targets})


def _metric(means: Any, n: int, samples: Floats) -> Metric:
    """means: lowest, expected and highest mean. samples: (R,) the mean of each draw."""
    low, value, high = map(float, means)
    ties = (low, high) if low < high else (None, None)
    return Metric(value, n, interval(samples) if n > 1 else None, *ties)


def _mean_recall(hits: Hits, targets: NDArray[Any], resamples: Resamples) -> Metric:
    """Return the mean over classes of their own recall; a class that a draw lacks is left out."""
    order = np.argsort(targets, kind="stable")
    starts = np.flatnonzero(np.diff(targets[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    means = [np.mean(np.add.reduceat(part[order], starts) / sizes) for part in hits]
    samples = []
    for weights in resamples.weights():
        in_order = weights[:, order]
        pictures = np.add.reduceat(in_order, starts, axis=1)
        in_order *= hits.value[order]
        right = np.add.reduceat(in_order, starts, axis=1)
        recalls = np.divide(right, pictures, out=np.zeros_like(right), where=pictures > 0)
        samples.append(recalls.sum(axis=1) / np.count_nonzero(pictures, axis=1))
    return _metric(means, len(order), np.concatenate(samples).astype(np.float64))


def _classes(
    outcome: _Outcome, right: Floats, targets: NDArray[Any], labels: Sequence[str]
) -> list[dict[str, Any]]:
    pictures = np.bincount(targets, minlength=len(labels))
    shares = np.bincount(targets, weights=right, minlength=len(labels)) / np.maximum(pictures, 1)
    worst: dict[int, tuple[int, float]] = {}  # the confusion of each class that is most frequent
    for true, predicted, count in _wrong(outcome):
        worst.setdefault(true, (predicted, count))
    rows = []
    for k, name in enumerate(labels):
        row = {"name": name, "n": int(pictures[k])}
        row |= {"top1": float(shares[k]) if pictures[k] else None}
        if k in worst:
            row |= {"confused_with": labels[worst[k][0]], "confused_n": _plain(worst[k][1])}
        rows.append(row)
    return rows


def _confusions(outcome: _Outcome, labels: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"true": labels[true], "predicted": labels[predicted], "n": _plain(count)}
        for true, predicted, count in _wrong(outcome)[:CONFUSIONS]
    ]


def _wrong(outcome: _Outcome) -> list[tuple[int, int, float]]:
    """Return classes, another one that their pictures are taken for, and how many: most first."""
    is_wrong = outcome.true != outcome.predicted
    true, predicted, pictures = (part[is_wrong] for part in outcome[1:])
    order = np.argsort(-pictures, kind="stable")
    return list(
        zip(true[order].tolist(), predicted[order].tolist(), pictures[order].tolist(), strict=True)
    )


def _plain(count: float) -> int | float:
    """Return a number of pictures: whole, unless pictures are parted."""
    return round(count) if abs(count - round(count)) < 1e-6 else round(float(count), 3)
