"""Zero-shot classification: tasks from a file, classifiers from class names, accuracy.

Not for retrieval (eval/retrieval.py), nor for a few labels of one's own (Encoder.classify).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.encoder import Encoder
from m2encoder.errors import DataError

TASKS_NAME = "zero_shot.json"


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
        if repeated := _repeated(names):
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


def build_classifier(encoder: Encoder, task: ZeroShotTask, language: str) -> NDArray[np.float32]:
    """Return (K, D) float32, unit norm: per class the mean of its prompts' unit vectors.

    Every name is put into every template; all of them weigh the same.
    """
    prompts = task.prompts(language)
    flat = [prompt for of_class in prompts for prompt in of_class]
    vectors = iter(encoder.encode_text(flat, show_progress=False))
    means = np.stack([np.mean([next(vectors) for _ in of_class], axis=0) for of_class in prompts])
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
    return accuracy_of_scores(image_vectors @ classifier.T, targets)


def accuracy_of_scores(scores: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, float]:
    """Return the share of pictures, 0..1, whose right class is first, or among the first five.

    scores: (N, K). targets: (N,) the right column of each row. A tie counts against the picture.
    Keys: `top1`; `top5` with more than five classes; `mean_class_recall`, top1 averaged over the
    classes that occur, so that frequent ones weigh no more; `classes`; `chance`, 1 / K; `n`.
    Raises DataError on NaN or no pictures.
    """
    if not len(scores):
        raise DataError("no labelled pictures, zero-shot accuracy needs at least one")
    if not np.isfinite(scores).all():
        raise DataError("scores hold NaN or infinity; check the model's weights and the embeddings")
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    ranks = np.count_nonzero(scores >= own, axis=1)  # its own score is one of them
    right = ranks == 1
    recalls = [right[targets == target].mean() for target in np.unique(targets)]
    num_classes = scores.shape[1]
    return {
        "top1": float(right.mean()),
        **({"top5": float((ranks <= 5).mean())} if num_classes > 5 else {}),
        "mean_class_recall": float(np.mean(recalls)),
        "classes": num_classes,
        "chance": 1 / num_classes,
        "n": len(scores),
    }
