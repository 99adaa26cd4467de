"""`m2enc eval prompts`: class names whose Chinese and English prompts disagree.

Not for the measuring (eval/prompt_audit.py).
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2encoder.cli.measured import LANGUAGES, OnError, aligned, embed_shards, finish, metric_table
from m2encoder.errors import ConfigError, DataError

if TYPE_CHECKING:
    from m2encoder.encoder import BadItem, Encoder
    from m2encoder.eval.class_names import ClassList
    from m2encoder.eval.result_facts import DataFacts
    from m2encoder.eval.results import Result
    from m2encoder.zero_shot import ZeroShotTask

SUMMARY = ("zh_to_en_r1", "en_to_zh_r1", "cosine", "accuracy_zh", "accuracy_en", "accuracy_gap")


class Question(NamedTuple):
    """Classes in both languages, and pictures of them if there are any."""

    task: "ZeroShotTask"
    facts: "DataFacts"
    image: Any = None
    targets: Any = None


def prompts(
    model: str,
    data: Path | None = None,
    *,
    zh: str | None = None,
    en: str | None = None,
    label: str | None = None,
    classes: int = 10,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Find class names whose Chinese and English prompts do not mean the same to a model.

    Args:
        model: A model folder or name.
        data: A shard folder with a zero_shot.json, or such a file without pictures; with --zh and
            --en, labelled pictures of any kind, or nothing.
        zh: Chinese names, as a protocol (imagenet-cn/wukong80) or a file has them, in one order
            with the English ones.
        en: English names, as a protocol (imagenet/openai80) or a file has them.
        label: Key of the label in shards of labelled pictures.
        classes: How many of each task to print, the most doubtful first.
        seed: Draws the bootstrap samples.
        out: Folder to write the results into, one JSON file per task, with every class.
        json: Print JSON instead of tables.
        on_error: Stop at an unreadable picture, or leave it out (exit code 4).
        batch_size: Pictures or texts at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    if classes < 0:
        raise ConfigError(f"classes is {classes}, expected 0 or more")
    options = {"device": device, "batch_size": batch_size, "on_error": on_error}
    if zh is not None and en is not None:
        encoder, questions, skipped = _of_lists(model, data, {"zh": zh, "en": en}, label, **options)
    elif zh is not None or en is not None or data is None:
        raise ConfigError(
            "expected data with a zero_shot.json, or names in both languages: --zh "
            "imagenet-cn/wukong80 --en imagenet/openai80"
        )
    else:
        encoder, questions, skipped = _of_tasks(model, data, **options)
    results = _measure(encoder, questions, batch_size=batch_size, seed=seed)
    return finish(results, _tables(results, classes), skipped, out=out, json=json)


def _measure(
    encoder: "Encoder", questions: Sequence[Question], *, batch_size: int, seed: int
) -> "list[Result]":
    from m2encoder.eval.prompt_audit import measure_prompts
    from m2encoder.eval.result_facts import result_of

    results: list[Result] = []
    for task, facts, image, targets in questions:
        began = time.perf_counter()
        output = measure_prompts(
            encoder, task, image, targets, languages=LANGUAGES, batch_size=batch_size, seed=seed
        )
        seconds = {"all": time.perf_counter() - began}
        settings = {"seed": seed}
        results.append(
            result_of(encoder, "prompts", facts, output, settings=settings, seconds=seconds)
        )
    return results


def _of_tasks(
    model: str, data: Path, *, device: str, batch_size: int, on_error: OnError
) -> "tuple[Encoder, list[Question], Sequence[BadItem]]":
    """Open the tasks of a shard folder, with its pictures, or those of a file."""
    from m2encoder.eval.result_facts import class_facts, labelled_pictures
    from m2encoder.load import load_model
    from m2encoder.zero_shot import load_tasks

    tasks = [task for task in load_tasks(data) if set(LANGUAGES) <= set(task.templates)]
    if not tasks:
        raise DataError(f"{data}: no task has templates in both zh and en; add those missing")
    if not data.is_dir():
        questions = [Question(task, class_facts(data, None, task, LANGUAGES)) for task in tasks]
        return load_model(model, device=device), questions, []
    encoder, pairs, _ = embed_shards(
        model, data, languages=(), device=device, batch_size=batch_size, on_error=on_error
    )
    questions = []
    for task in tasks:
        rows, targets = labelled_pictures(pairs, task)
        facts = class_facts(data, pairs, task, LANGUAGES)
        questions.append(Question(task, facts, pairs.image[rows], targets))
    return encoder, questions, pairs.skipped


def _of_lists(
    model: str,
    data: Path | None,
    names: Mapping[str, str],
    label: str | None,
    *,
    device: str,
    batch_size: int,
    on_error: OnError,
) -> "tuple[Encoder, list[Question], Sequence[BadItem]]":
    """Join two lists of names into one task, and encode labelled pictures if there are any."""
    from m2encoder.embed import embed_pictures
    from m2encoder.encoder import language_of
    from m2encoder.eval.datasets import read_labelled
    from m2encoder.eval.label_matching import align_labels, make_task
    from m2encoder.eval.result_facts import class_facts, skipped_facts
    from m2encoder.load import load_model

    lists = {language: _classes(source, language) for language, source in names.items()}
    task = make_task(" and ".join(names.values()), lists)
    if data is None:
        facts = class_facts(Path(names["zh"]), None, task, LANGUAGES)
        return load_model(model, device=device), [Question(task, facts)], []
    found = read_labelled(data, label_key=label, on_error=on_error)
    targets = align_labels(found.targets, found.labels, lists[language_of(found.labels[0])])
    encoder = load_model(model, device=device)
    images = embed_pictures(encoder, found.pictures, batch_size=batch_size, on_error=on_error)
    facts = class_facts(data, None, task, LANGUAGES)
    own = found.facts()
    own["skipped"] = [*own["skipped"], *skipped_facts(images.skipped)]
    facts = facts._replace(data=own | {"images": len(images.vectors)})
    return encoder, [Question(task, facts, images.vectors, targets[images.kept])], images.skipped


def _classes(source: str, language: str) -> "ClassList":
    """Return the names that a protocol or a file holds. Raises ConfigError on another language."""
    from m2encoder.eval.class_names import load_classes, read_classes
    from m2encoder.eval.protocols import get_protocol

    if Path(source).is_file():
        return read_classes(Path(source), language=language)
    found = load_classes(get_protocol(source))
    if found.language != language:
        raise ConfigError(f"{source} names classes in {found.language}, expected {language}")
    return found


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


def _tables(results: Sequence["Result"], shown: int) -> list[str]:
    lines = [f"{results[0].model['name']} on {results[0].data['path']}"]
    for result in results:
        lines += ["", *metric_table(f"task {result.details['task']}", result.metrics, SUMMARY)]
        if shown:
            lines += ["", *_doubtful(result, shown), *_differences(result, shown)]
    return lines


def _doubtful(result: "Result", shown: int) -> list[str]:
    rows = [["most doubtful class", "zh", "en", "cosine", "margin", "zh nearest", "en nearest"]]
    names = {row["label"]: row["names"] for row in result.details["classes"]}
    for row in result.details["classes"][:shown]:
        own = (_short(row["names"][language]) for language in LANGUAGES)
        numbers = (f"{row['cosine']:.3f}", f"{row['margin']:+.3f}")
        # the Chinese row's nearest is an English one, and the other way round
        nearest = (
            _short(names[row[f"{language}_nearest"]["label"]][other])
            for language, other in (LANGUAGES, LANGUAGES[::-1])
        )
        rows.append([row["label"], *own, *numbers, *nearest])
    return aligned(rows, left=3)


def _differences(result: "Result", shown: int) -> list[str]:
    found = [row for row in result.details.get("accuracy_by_class", []) if row["accuracy_gap"]]
    if not found:
        return []
    names = {row["label"]: row["names"] for row in result.details["classes"]}
    rows = [["largest difference, %", "zh", "en", "acc. zh", "acc. en", "zh less en", "pictures"]]
    for row in found[:shown]:
        own = (_short(names[row["label"]][language]) for language in LANGUAGES)
        shares = (f"{100 * row[f'accuracy_{language}']:.1f}" for language in LANGUAGES)
        gap = f"{100 * row['accuracy_gap']:+.1f}"
        rows.append([row["label"], *own, *shares, gap, f"{row['n']:,}"])
    return ["", *aligned(rows, left=3)]


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:2])
