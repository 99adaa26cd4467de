"""Which language wins where both stand in one list, and what mixing them in one text costs.

Not for the same captions in both languages (bilingual.py).
"""

# N pictures   K classes   D width of an embedding

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.encoder import Encoder
from m2encoder.errors import DataError
from m2encoder.eval.bootstrap import DRAWS
from m2encoder.eval.caption_edits import words
from m2encoder.eval.means import change_metric, hits_metric, mean_metric
from m2encoder.eval.metric import Metric, TaskOutput
from m2encoder.eval.scores import score_blocks
from m2encoder.ranks import Hits, Ranks, hits_at_k, ranks_of_scores
from m2encoder.zero_shot import ZeroShotTask, build_classifier

Vectors = NDArray[np.float32]
Languages = tuple[str, str]


def language_bias(
    image: Vectors,
    targets: NDArray[np.int64],
    first: Vectors,
    second: Vectors,
    *,
    languages: Languages = ("zh", "en"),
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Classify pictures with the names of both languages in one list.

    image: (N, D). targets: (N,) the right class. first, second: (K, D) a classifier's rows in
    either language, all unit norm.
    `share_zh`: share of pictures whose best row is in the first language; 0.5 is fair.
    `accuracy_together`: its class is right, in whichever language. `accuracy_zh`, `accuracy_en`:
    right among the rows of one language. `own_class_prefers_zh`: share of pictures that score their
    own class higher in the first language; 0.5 is fair. `score_offset_own_class`,
    `score_offset_all_classes`: mean cosine in the first language less that in the second.
    Equal scores share evenly, so one row for everything gives 0.5 and chance.
    Raises ValueError on shapes, DataError on NaN or no pictures.
    """
    if first.shape != second.shape:
        raise ValueError(f"classifiers have shapes {first.shape} and {second.shape}")
    num_classes, count = len(first), len(image)
    pictures = np.arange(count)
    share, together = Hits(*np.empty((3, count))), Hits(*np.empty((3, count)))
    alone = [Ranks(*np.empty((3, count), np.int64)) for _ in languages]
    own, everything = np.empty((2, count)), np.empty(count)
    for rows, scores in score_blocks(image, np.concatenate([first, second])):
        right = targets[rows]
        is_best = scores == scores.max(axis=1, keepdims=True)
        _fill(share, rows, is_best[:, :num_classes].sum(axis=1), is_best.sum(axis=1))
        own_rows = is_best[pictures[: len(right)], right].astype(np.int64)
        own_rows += is_best[pictures[: len(right)], right + num_classes]
        _fill(together, rows, own_rows, is_best.sum(axis=1))
        halves = scores[:, :num_classes], scores[:, num_classes:]
        for language, half in enumerate(halves):
            for kept, found in zip(alone[language], ranks_of_scores(half, right), strict=True):
                kept[rows] = found
            own[language, rows] = np.take_along_axis(half, right[:, None], axis=1)[:, 0]
        everything[rows] = np.subtract(*halves, dtype=np.float64).mean(axis=1)
    options: dict[str, Any] = {"seed": seed, "draws": draws}
    a = languages[0]
    prefers = Hits((own[0] > own[1]) * 1.0, _preference(own[0], own[1]), (own[0] >= own[1]) * 1.0)
    metrics = {
        f"share_{a}": hits_metric(share, pictures, **options),
        "accuracy_together": hits_metric(together, pictures, **options),
        f"own_class_prefers_{a}": hits_metric(prefers, pictures, **options),
        "score_offset_own_class": mean_metric(own[0] - own[1], pictures, **options),
        "score_offset_all_classes": mean_metric(everything, pictures, **options),
    }
    for language, ranks in zip(languages, alone, strict=True):
        metrics[f"accuracy_{language}"] = hits_metric(hits_at_k(ranks, 1), pictures, **options)
    per_class = _per_class(share.value, targets, num_classes)
    details = {"fair": 0.5, "chance": 1 / num_classes, f"share_{a}_by_class": per_class}
    return TaskOutput(metrics, details, {f"{a}_on_top": share.value, "right": together.value})


def _fill(hits: Hits, rows: slice, chosen: NDArray[Any], tied: NDArray[Any]) -> None:
    """Put in what share of the `tied` best rows is `chosen`, and whether none or all are."""
    hits.low[rows], hits.value[rows], hits.high[rows] = chosen == tied, chosen / tied, chosen > 0


def _preference(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    return ((a > b) + 0.5 * (a == b)).astype(np.float64)


def _per_class(
    values: NDArray[np.float64], targets: NDArray[np.int64], num_classes: int
) -> list[float | None]:
    """Return the mean of each class, by its number; None where it does not occur."""
    sums = np.bincount(targets, weights=values, minlength=num_classes)
    counts = np.bincount(targets, minlength=num_classes)
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def measure_language_bias(
    encoder: Encoder,
    image: Vectors,
    targets: NDArray[np.int64],
    task: ZeroShotTask,
    *,
    languages: Languages = ("zh", "en"),
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Build classifiers in both languages and mixed ones, and measure all of it.

    targets: (N,) number of the right class in `task`. Beside `language_bias`:
    `accuracy_zh_with_en_names`: names of one language in sentences of the other, "一张cat的图片",
    and `accuracy_zh_with_en_names_change`, less the accuracy with its own names, paired.
    Raises DataError if the task lacks a language.
    """
    rows = {language: build_classifier(encoder, task, language) for language in languages}
    options: dict[str, Any] = {"seed": seed, "draws": draws}
    first, second = (rows[language] for language in languages)
    bias = language_bias(image, targets, first, second, languages=languages, **options)
    metrics = dict(bias.metrics)
    for sentence, name in (languages, languages[::-1]):
        mixed = build_classifier(encoder, mixed_task(task, sentence, name), sentence)
        key = f"accuracy_{sentence}_with_{name}_names"
        metrics |= _mixing(image, targets, rows[sentence], mixed, key, options)
    details = bias.details | {"task": task.name, "labels": task.labels}
    return TaskOutput(metrics, details, bias.ranks)


def _mixing(
    image: Vectors,
    targets: NDArray[np.int64],
    pure: Vectors,
    mixed: Vectors,
    key: str,
    options: dict[str, Any],
) -> dict[str, Metric]:
    """Return the accuracy with mixed sentences, and how far it is from that with pure ones."""
    pictures = np.arange(len(image))
    before, after = (hits_at_k(class_ranks(image, rows, targets), 1) for rows in (pure, mixed))
    return {
        key: hits_metric(after, pictures, **options),
        f"{key}_change": change_metric(before, after, pictures, **options),
    }


def class_ranks(image: Vectors, classifier: Vectors, targets: NDArray[np.int64]) -> Ranks:
    """Return where each picture's right class stands among a classifier's (K, D) rows."""
    ranks = Ranks(*np.empty((3, len(image)), np.int64))
    for rows, scores in score_blocks(image, classifier):
        for kept, found in zip(ranks, ranks_of_scores(scores, targets[rows]), strict=True):
            kept[rows] = found
    return ranks


# ── mixed texts ─────────────────────────────────────────────────────────────────────────────────


def mixed_task(task: ZeroShotTask, sentence: str, name: str) -> ZeroShotTask:
    """Return the task with sentences of one language and names of the other, as `sentence`.

    Raises DataError if it lacks either.
    """
    for language in (sentence, name):
        if language not in task.templates:
            raise DataError(f"zero-shot task {task.name!r}: no {language} templates; add some")
    classes = tuple(replace(each, names={sentence: each.names[name]}) for each in task.classes)
    return replace(task, classes=classes, templates={sentence: task.templates[sentence]})


def colour_pairs() -> list[tuple[str, str]]:
    """Return Chinese words for colours and the English for them."""
    return [(row["zh"][0], row["en"][0]) for row in words()["colours"]]


def mix_codes(text: str, language: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Return the text with its first known word in the other language, set off by spaces.

    "一只红色的鸟" becomes "一只 red 的鸟", "a red bird" becomes "a 红色 bird". A text without any
    of the words stays as it is.
    """
    if language == "zh":
        table = {zh: f" {en} " for zh, en in pairs}
        pattern = "|".join(map(re.escape, sorted(table, key=len, reverse=True)))
    else:
        table = {en.lower(): zh for zh, en in pairs}
        known = "|".join(map(re.escape, sorted(table, key=len, reverse=True)))
        pattern = rf"\b(?:{known})\b"
    if not table:
        return text
    found = re.search(pattern, text, re.IGNORECASE)
    if found is None:
        return text
    mixed = text[: found.start()] + table[_key(found[0], table)] + text[found.end() :]
    return re.sub(r"  +", " ", mixed).strip() if language == "zh" else mixed


def _key(word: str, table: Mapping[str, str]) -> str:
    return word if word in table else word.lower()
