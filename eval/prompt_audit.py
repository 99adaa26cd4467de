"""Find class names whose Chinese and English prompts do not mean the same to a model.

Not for accuracy itself (classification.py), nor for lists of names (class_names.py).
"""

# N pictures   K classes   D width of an embedding

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.encoder import Encoder
from m2encoder.eval.bootstrap import DRAWS
from m2encoder.eval.language_bias import class_ranks
from m2encoder.eval.means import change_metric, hits_metric, mean_metric
from m2encoder.eval.metric import TaskOutput
from m2encoder.eval.scores import score_blocks
from m2encoder.ranks import Ranks, hits_at_k, ranks_of_scores
from m2encoder.zero_shot import ZeroShotTask, build_classifier

Vectors = NDArray[np.float32]
Languages = tuple[str, str]


def audit_prompts(
    first: Vectors,
    second: Vectors,
    labels: Sequence[str],
    *,
    languages: Languages = ("zh", "en"),
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Compare a classifier's rows in two languages, class by class.

    first, second: (K, D), unit norm; row k of both is for class k. labels: (K,).
    `cosine`: mean over classes of both rows' cosine. `zh_to_en_r1`, `en_to_zh_r1`: share of classes
    whose nearest row in the other language is their own.
    details["classes"], the most doubtful first: {"label", "cosine", "margin": cosine less that of
    the nearest other class in either direction, "zh_nearest", "en_nearest": {"label", "cosine"} of
    the other class that is nearest to this language's row in the other language}.
    Raises ValueError on shapes or fewer than two classes, DataError on NaN.
    """
    if first.shape != second.shape or len(first) != len(labels) or len(labels) < 2:
        raise ValueError(
            f"classifiers have shapes {first.shape} and {second.shape}, expected one row each for "
            f"{len(labels)} labels, two or more"
        )
    classes = np.arange(len(labels))
    names = f"{languages[0]}_to_{languages[1]}", f"{languages[1]}_to_{languages[0]}"
    own = np.empty((2, len(labels)))
    rival, nearest = np.empty((2, len(labels))), np.empty((2, len(labels)), np.int64)
    metrics = {}
    for way, (query, gallery) in enumerate(((first, second), (second, first))):
        ranks = Ranks(*np.empty((3, len(labels)), np.int64))
        for rows, scores in score_blocks(query, gallery):
            mine = classes[rows]
            for kept, found in zip(ranks, ranks_of_scores(scores, mine), strict=True):
                kept[rows] = found
            places = np.arange(len(mine))
            own[way, rows] = scores[places, mine]
            scores[places, mine] = -np.inf
            nearest[way, rows] = scores.argmax(axis=1)
            rival[way, rows] = scores.max(axis=1)
        metrics[f"{names[way]}_r1"] = hits_metric(
            hits_at_k(ranks, 1), classes, seed=seed, draws=draws
        )
    metrics["cosine"] = mean_metric(own[0], classes, seed=seed, draws=draws)
    found = _most_doubtful_first(own[0], rival, nearest, labels, languages)
    return TaskOutput(metrics, {"classes": found, "languages": list(languages)})


def _most_doubtful_first(
    own: NDArray[np.float64],
    rival: NDArray[np.float64],
    nearest: NDArray[np.int64],
    labels: Sequence[str],
    languages: Languages,
) -> list[dict[str, Any]]:
    """Return one plain row per class; rival, nearest: (2, K), of the language that asks."""
    margin = own - rival.max(axis=0)
    return [
        {"label": labels[k], "cosine": float(own[k]), "margin": float(margin[k])}
        | {
            f"{language}_nearest": {
                "label": labels[nearest[way, k]],
                "cosine": float(rival[way, k]),
            }
            for way, language in enumerate(languages)
        }
        for k in np.argsort(margin, kind="stable").tolist()
    ]


def compare_accuracy(
    image: Vectors,
    targets: NDArray[np.int64],
    first: Vectors,
    second: Vectors,
    labels: Sequence[str],
    *,
    languages: Languages = ("zh", "en"),
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Compare both languages' accuracy on labelled pictures, over all and class by class.

    image: (N, D). targets: (N,) the right class.
    `accuracy_zh`, `accuracy_en`, and `accuracy_gap`, the first less the second, paired.
    details["accuracy_by_class"], the largest difference first: {"label", "n", "accuracy_zh",
    "accuracy_en", "accuracy_gap"}; classes without pictures are not in it.
    """
    pictures = np.arange(len(image))
    hits = [hits_at_k(class_ranks(image, rows, targets), 1) for rows in (first, second)]
    metrics = {
        f"accuracy_{language}": hits_metric(own, pictures, seed=seed, draws=draws)
        for language, own in zip(languages, hits, strict=True)
    }
    metrics["accuracy_gap"] = change_metric(hits[1], hits[0], pictures, seed=seed, draws=draws)
    counts = np.bincount(targets, minlength=len(labels))
    sums = [np.bincount(targets, weights=own.value, minlength=len(labels)) for own in hits]
    shares = np.stack(sums) / np.maximum(counts, 1)
    gap = shares[0] - shares[1]
    found = [
        {
            "label": labels[k],
            "n": int(counts[k]),
            f"accuracy_{languages[0]}": float(shares[0, k]),
            f"accuracy_{languages[1]}": float(shares[1, k]),
            "accuracy_gap": float(gap[k]),
        }
        for k in np.argsort(-np.abs(gap), kind="stable").tolist()
        if counts[k]
    ]
    ranks = {language: own.value for language, own in zip(languages, hits, strict=True)}
    return TaskOutput(metrics, {"accuracy_by_class": found}, ranks)


def measure_prompts(
    encoder: Encoder,
    task: ZeroShotTask,
    image: Vectors | None = None,
    targets: NDArray[np.int64] | None = None,
    *,
    languages: Languages = ("zh", "en"),
    batch_size: int = 64,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Build the classifiers of a task in both languages and compare them; on pictures if given.

    targets: (N,) number of each picture's class in `task`. The details also hold the names of each
    class. Raises DataError if the task lacks a language.
    """
    first, second = (
        build_classifier(encoder, task, language, batch_size=batch_size) for language in languages
    )
    options: dict[str, Any] = {"languages": languages, "seed": seed, "draws": draws}
    audit = audit_prompts(first, second, task.labels, **options)
    names = {each.label: each.names for each in task.classes}
    for row in audit.details["classes"]:
        row["names"] = {language: list(names[row["label"]][language]) for language in languages}
    details = audit.details | {"task": task.name}
    if image is None or targets is None:
        return TaskOutput(audit.metrics, details)
    accuracy = compare_accuracy(image, targets, first, second, task.labels, **options)
    return TaskOutput(audit.metrics | accuracy.metrics, details | accuracy.details, accuracy.ranks)
