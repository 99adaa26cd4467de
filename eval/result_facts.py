"""What a result says of the model and of a shard folder that is already embedded.

Not for measuring, nor for reading and writing results (results.py) or other data (datasets.py).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.embed import PairEmbeddings
from m2encoder.encoder import BadItem, Encoder
from m2encoder.errors import DataError
from m2encoder.eval.environment import environment
from m2encoder.eval.matching import SHORT, caption_groups, histogram, match
from m2encoder.eval.metric import TaskOutput
from m2encoder.eval.protocols import CUSTOM
from m2encoder.eval.results import Result
from m2encoder.zero_shot import ZeroShotTask


class DataFacts(NamedTuple):
    """What a result says of its data."""

    protocol: dict[str, Any]
    data: dict[str, Any]
    language: str


def result_of(
    encoder: Encoder,
    task: str,
    facts: DataFacts,
    output: TaskOutput,
    *,
    settings: Mapping[str, Any],
    seconds: Mapping[str, float],
    precision: str = "float32",
) -> Result:
    """Return an output as a result of this model."""
    tokenizer, pictures = encoder.tokenizer, encoder.image_processor
    return Result(
        task=task,
        protocol=facts.protocol,
        language=facts.language,
        data=facts.data,
        model={
            "name": encoder.name,
            "fingerprint": encoder.fingerprint,
            "parameters": sum(each.numel() for each in encoder.model.parameters()),
        },
        metrics=output.metrics,
        preprocessing={
            "image_size_px": pictures.size_px,
            "resize": str(pictures.resize_mode),
            "text_normalization": encoder.text_normalization,
            "max_text_length": None if tokenizer is None else tokenizer.model_max_length,
        },
        settings=settings,
        environment=environment(device=str(encoder.device), precision=precision),
        seconds=seconds,
        details=output.details,
        ranks=output.ranks,
    )


def caption_facts(path: Path, pairs: PairEmbeddings, languages: Sequence[str]) -> DataFacts:
    """Return the facts of the captions in these languages, of one protocol if they are of one."""
    known = [pairs.texts[language] for language in languages if language in pairs.texts]
    texts = [text for captions in known for text in captions.texts]
    owner = [int(row) for captions in known for row in captions.owner]
    count = len(pairs.keys)
    protocol = match(None if len(languages) == 1 else CUSTOM, texts, owner, count)
    data = {
        "path": str(path),
        "images": count,
        "texts": len(texts),
        "captions_per_image": histogram(caption_groups(texts, owner, count)),
        "skipped": skipped_facts(pairs.skipped),
    }
    return DataFacts(protocol.facts(), data, "+".join(languages))


def class_facts(
    path: Path, pairs: PairEmbeddings | None, task: ZeroShotTask, languages: Sequence[str]
) -> DataFacts:
    """Return the facts of classes, and of the pictures that have one, if there are pictures."""
    content = json.dumps(asdict(task), ensure_ascii=False, sort_keys=True)
    data: dict[str, Any] = {"path": str(path)}
    if pairs is not None:
        data["images"] = len(labelled_pictures(pairs, task)[0])
        data["skipped"] = skipped_facts(pairs.skipped)
    protocol = custom_protocol(content.encode("utf-8", "surrogatepass"))
    return DataFacts(protocol, data, "+".join(languages))


def custom_protocol(content: bytes) -> dict[str, Any]:
    """Return the protocol of data that is known by its bytes alone."""
    checksum = hashlib.sha256(content).hexdigest()
    return {"id": f"{CUSTOM}:{checksum[:SHORT]}", "status": "custom", "checksum": checksum}


def note_contamination(results: Sequence[Result], checked: Result) -> list[Result]:
    """Return results that say what was found of their test set in training data.

    checked: what `m2enc eval contamination` wrote; results of other data stay as they are. Raises
    DataError if it is no such result, or of none of these data.
    """
    if checked.task != "contamination":
        raise DataError(
            f"a result of {checked.task}, expected one of contamination; check the path"
        )
    place = Path(checked.data["path"]).resolve()
    same = [Path(result.data["path"]).resolve() == place for result in results]
    if not any(same):
        raise DataError(
            f"the contamination of {checked.data['path']} was checked, but "
            f"{results[0].data['path']} was measured; check the same data"
        )
    return [
        replace(result, contamination=checked.contamination) if is_same else result
        for result, is_same in zip(results, same, strict=True)
    ]


def skipped_facts(skipped: Sequence[BadItem]) -> list[dict[str, str]]:
    """Return what was left out and why."""
    return [{"name": bad.name, "reason": bad.reason} for bad in skipped]


def labelled_pictures(
    pairs: PairEmbeddings, task: ZeroShotTask
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (rows, targets): the pictures that have a label of the task, and its class.

    Raises DataError if none has, or a label is none of the classes.
    """
    known = {label: row for row, label in enumerate(task.labels)}
    labels = [
        (row, str(meta[task.label]))
        for row, meta in enumerate(pairs.metas)
        if meta.get(task.label) is not None
    ]
    if not labels:
        raise DataError(
            f"zero-shot task {task.name!r}: no picture has a label {task.label!r} in its meta; "
            f"correct the task file or the data"
        )
    if wrong := sorted({label for _, label in labels} - set(known)):
        raise DataError(
            f"zero-shot task {task.name!r}: label {wrong[0]!r} in the data is none of its "
            f"{len(known)} classes; correct the task file or the data"
        )
    rows = np.asarray([row for row, _ in labels], np.int64)
    return rows, np.asarray([known[label] for _, label in labels], np.int64)
