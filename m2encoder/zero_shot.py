"""Zero-shot classification: tasks from a file, classifiers from class names, accuracy.

Not for retrieval (eval/retrieval.py), nor for a few labels of one's own (Encoder.classify).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.embed_lists import embed_texts
from m2encoder.encoder import Encoder
from m2encoder.errors import DataError
from m2encoder.ranks import hits_at_k, ranks_of_scores

TASKS_NAME = "zero_shot.json"
ROWS = 4096
"""Pictures scored together."""


@dataclass(frozen=True)
class ZeroShotClass:
    """One answer."""

    label: str
    """What the data set calls it."""
    names: dict[str, tuple[str, ...]]
    """Per language (BCP-47 tag) one or several names."""


@dataclass(frozen=True)
class ZeroShotTask:
    """One question about pictures: its classes and the sentences that their names are put into."""

    name: str
    label: str
    """The key of `Pair.meta` that holds the right label; a pair without it is not asked about."""
    classes: tuple[ZeroShotClass, ...]
    templates: dict[str, tuple[str, ...]]
    """Per language, sentences with one `{}`."""
    may_share_names: bool = False
    """Let one name belong to two classes, as published lists do; nothing can tell those apart."""

    def __post_init__(self) -> None:
        labels = [answer.label for answer in self.classes]
        if len(labels) < 2:
            raise self._wrong(f"{len(labels)} classes, expected at least two")
        if repeated := _repeated(labels):
            raise self._wrong(f"label {repeated!r} appears twice, labels must differ")
        if not self.templates:
            raise self._wrong("no templates, expected some for at least one language")
        for language in self.templates:
            self._check_language(language)

    def _check_language(self, language: str) -> None:
        for template in self.templates[language]:
            if template.count("{}") != 1:
                raise self._wrong(f"template {template!r}, expected one {{}} in it")
        if not self.templates[language]:
            raise self._wrong(f"no {language} templates, expected at least one")
        for answer in self.classes:
            if not any(name.strip() for name in answer.names.get(language, ())):
                raise self._wrong(f"class {answer.label!r} has no {language} name")
        names = [name for answer in self.classes for name in set(answer.names[language])]
        if not self.may_share_names and (repeated := _repeated(names)):
            raise self._wrong(f"{language} name {repeated!r} belongs to two classes")

    def _wrong(self, what: str) -> DataError:
        return DataError(f"zero-shot task {self.name!r}: {what}; correct the task file")

    @property
    def labels(self) -> list[str]:
        """The label of each class, in the order of a classifier's rows."""
        return [answer.label for answer in self.classes]

    def prompts(self, language: str) -> list[list[str]]:
        """Return per class every name in every template. Raises DataError without that language."""
        if language not in self.templates:
            known = ", ".join(self.templates)
            raise self._wrong(f"no {language} templates (it has {known})")
        return [
            [
                template.replace("{}", name)
                for name in answer.names[language]
                for template in templates
            ]
            for templates in [self.templates[language]]
            for answer in self.classes
        ]


def load_tasks(path: Path) -> list[ZeroShotTask]:
    """Read a task file, or the `zero_shot.json` of a shard folder.

    {"tasks": [{"name", "label", "classes": [{"label", "zh": [names], "en": [names]}, ...],
    "templates": {"zh": [sentences with one {}], "en": [...]}}, ...]}
    Raises DataError if it is missing, damaged, or has wrong or repeated labels and names.
    """
    path = path / TASKS_NAME if path.is_dir() else path
    try:
        tasks = [_task_from(raw) for raw in json.loads(path.read_text(encoding="utf-8"))["tasks"]]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected zero-shot tasks; check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a task file ({reason}); see m2encoder.zero_shot") from None
    if repeated := _repeated([task.name for task in tasks]):
        raise DataError(f"{path}: task {repeated!r} appears twice; rename one")
    if not tasks:
        raise DataError(f"{path}: holds no task, expected at least one; add one")
    return tasks


def _task_from(raw: dict[str, Any]) -> ZeroShotTask:
    classes = tuple(
        ZeroShotClass(
            str(answer["label"]),
            {key: _strings(names) for key, names in answer.items() if key != "label"},
        )
        for answer in raw["classes"]
    )
    templates = {language: _strings(lines) for language, lines in raw["templates"].items()}
    return ZeroShotTask(str(raw["name"]), str(raw["label"]), classes, templates)


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} is not a list of strings")
    return tuple(values)


def _repeated(values: Sequence[str]) -> str | None:
    return next((value for i, value in enumerate(values) if value in values[:i]), None)


def build_classifier(
    encoder: Encoder, task: ZeroShotTask, language: str, **options: Any
) -> NDArray[np.float32]:
    """Return (K, D) float32, unit norm: per class the mean of its prompts' unit vectors.

    Every name is put into every template; all of them weigh the same. options: as of `embed_texts`.
    """
    prompts = task.prompts(language)
    flat = [prompt for of_class in prompts for prompt in of_class]
    options = {"show_progress": False, **options}
    found = embed_texts(encoder, flat, **options)
    ends = np.cumsum([len(of_class) for of_class in prompts])
    means = np.stack([part.mean(axis=0) for part in np.split(found.vectors, ends[:-1])])
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def zero_shot_accuracy(
    encoder: Encoder,
    image_vectors: NDArray[np.float32],
    labels: Sequence[str],
    task: ZeroShotTask,
    language: str,
) -> dict[str, float]:
    """Return what `accuracy_of_scores` does, for pictures (N, D) and the right label of each.

    Raises DataError if a label is none of the task's, ValueError if there is not one per picture.
    """
    if len(labels) != len(image_vectors):
        raise ValueError(f"{len(labels):,} labels for {len(image_vectors):,} pictures")
    rows = {label: row for row, label in enumerate(task.labels)}
    if wrong := sorted({str(label) for label in labels} - set(rows)):
        raise DataError(
            f"zero-shot task {task.name!r}: label {wrong[0]!r} in the data is none of its "
            f"{len(rows)} classes; correct the task file or the data"
        )
    classifier = build_classifier(encoder, task, language)
    targets = np.asarray([rows[str(label)] for label in labels], np.int64)
    return accuracy_of_scores(class_scores(image_vectors, classifier), targets)


def class_scores(
    image_vectors: NDArray[np.floating], classifier: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Return (N, K) float32 scores of pictures (N, D) for classes (K, D).

    Summed in float64 and then rounded, each distinct class once: classes with one vector, such as
    two of the same name, tie exactly, and so does what differs by float32 arithmetic only.
    """
    return np.concatenate(list(class_score_blocks(image_vectors, classifier)))


def class_score_blocks(
    image_vectors: NDArray[np.floating], classifier: NDArray[np.floating]
) -> Iterator[NDArray[np.float32]]:
    """Yield what `class_scores` returns, in order, some pictures at a time."""
    distinct, place = np.unique(classifier, axis=0, return_inverse=True)
    distinct_KD = distinct.astype(np.float64)
    for start in range(0, max(1, len(image_vectors)), ROWS):
        scores = image_vectors[start : start + ROWS].astype(np.float64) @ distinct_KD.T
        yield scores.astype(np.float32)[:, place.ravel()]


def accuracy_of_scores(scores: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, float]:
    """Return the share of pictures, 0..1, whose right class is first, or among the first five.

    scores: (N, K). targets: (N,) the right column of each row. Ties count as the chance of a hit
    if they come in random order; bounds and intervals: eval/classification.py.
    Keys: `top1`; `top5` with more than five classes; `mean_class_recall`, top1 averaged over the
    classes that occur, so that frequent ones weigh no more; `classes`; `chance`, 1 / K; `n`.
    Raises DataError on NaN or no pictures.
    """
    ranks = ranks_of_scores(scores, targets)
    right = hits_at_k(ranks, 1).value
    seen, pictures = np.bincount(targets, weights=right), np.bincount(targets)
    num_classes = scores.shape[1]
    return {
        "top1": float(right.mean()),
        **({"top5": float(hits_at_k(ranks, 5).value.mean())} if num_classes > 5 else {}),
        "mean_class_recall": float(np.mean(seen[pictures > 0] / pictures[pictures > 0])),
        "classes": num_classes,
        "chance": 1 / num_classes,
        "n": len(scores),
    }
