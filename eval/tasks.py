"""Whole tasks on one model: encode, measure, and say on what; a Result each.

Not for reading data (datasets.py), nor for the measuring (retrieval.py, classification.py).
"""

import random
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.distributed import World
from m2encoder.embed import ItemEmbeddings, embed_pictures, embed_texts
from m2encoder.embed_work import Precision
from m2encoder.encoder import BadItem, Encoder, OnError
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.class_names import ClassList
from m2encoder.eval.classification import measure_classification
from m2encoder.eval.datasets import LabelledData, RetrievalData
from m2encoder.eval.examples import Asked, retrieval_examples
from m2encoder.eval.label_matching import align_labels, make_task
from m2encoder.eval.matching import match
from m2encoder.eval.protocols import CUSTOM, MatchedProtocol, get_protocol
from m2encoder.eval.result_facts import DataFacts, result_of, skipped_facts
from m2encoder.eval.results import Result
from m2encoder.eval.retrieval import Direction, GroundTruth, RetrievalSettings, measure_retrieval
from m2encoder.pictures import Pictures, PictureSubset
from m2encoder.vector_store import VectorStore
from m2encoder.zero_shot import build_classifier


@dataclass(frozen=True)
class Running:
    """How tasks are run: what changes time and memory, and the seed of what is drawn."""

    batch_size: int = 64
    on_error: OnError = "raise"
    store: VectorStore | None = None
    """Keeps vectors between runs; a run that was killed goes on from there."""
    world: World | None = None
    """Processes that share the work; all of them return the same."""
    precision: Precision = "float32"
    seed: int = 0
    device: str = "auto"
    show_progress: bool | None = None
    latest: dict[tuple[str, str], ItemEmbeddings] = field(
        default_factory=dict, repr=False, compare=False
    )
    """The pictures encoded last: in a suite, several tasks in a row ask about the same ones."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.world is None or self.world.is_first

    @property
    def embedding(self) -> dict[str, Any]:
        """The options of embed_texts; embed_pictures also takes `on_error`."""
        names = ("batch_size", "store", "world", "precision", "show_progress")
        return {name: getattr(self, name) for name in names}


def run_retrieval(
    encoder: Encoder,
    data: RetrievalData,
    *,
    gt: GroundTruth = "index",
    candidates: int | None = None,
    running: Running,
) -> Result:
    """Measure how well pictures and captions find each other.

    The directions are the protocol's, both if it has none. Pictures that cannot be read are left
    out with their captions where `running` says so, and the protocol then no longer counts as
    verified. candidates: what `drawn_candidates` drew, for the result to say. Raises DataError.
    """
    began = time.perf_counter()
    images = _encode_pictures(encoder, data.pictures, running)
    rows, owner = _still_there(data.owner, images, len(data.pictures))
    if not len(rows):
        raise DataError(f"{data.path}: no captioned picture can be read; check the pictures")
    texts = [data.texts[row] for row in rows]
    vectors, truncated = embed_texts(encoder, texts, **running.embedding)
    embedded = time.perf_counter()
    settings = RetrievalSettings(gt=gt, directions=_directions(data), seed=running.seed)
    also = _also_there(data.also, rows, images, len(data.pictures))
    output = measure_retrieval(
        images.vectors, vectors, owner, texts=texts, also=also, settings=settings
    )
    asked = Asked(images.vectors, vectors, owner, _seen(data.pictures, images), texts)
    examples = retrieval_examples(asked, output.ranks, seed=running.seed)
    output = replace(output, details=output.details | {"examples": examples})
    protocol = _after_skipping(data.protocol, images.skipped)
    facts: dict[str, Any] = data.facts()
    facts |= {"images": len(images.vectors), "texts": len(texts)}
    facts["captions_per_image"] = output.details["captions_per_image"]
    facts["skipped"] = [*facts["skipped"], *skipped_facts(images.skipped)]
    result = result_of(
        encoder,
        "retrieval",
        DataFacts(protocol.facts(), facts, data.language),
        output,
        settings={"gt": gt, "candidates": candidates, "seed": running.seed},
        seconds=_seconds(began, embedded),
        precision=running.precision,
    )
    return replace(result, preprocessing={**result.preprocessing, "truncated_texts": truncated})


def run_zero_shot(
    encoder: Encoder,
    data: LabelledData,
    classes: ClassList,
    protocol: MatchedProtocol,
    *,
    running: Running,
) -> Result:
    """Measure how often the right class, described by names in templates, fits a picture best.

    Raises DataError where the data's labels and the classes do not go together.
    """
    began = time.perf_counter()
    targets = align_labels(data.targets, data.labels, classes)
    task = make_task(protocol.id, {classes.language: classes})
    images = _encode_pictures(encoder, data.pictures, running)
    classifier = build_classifier(encoder, task, classes.language, **running.embedding)
    embedded = time.perf_counter()
    output = measure_classification(
        images.vectors,
        classifier,
        targets[images.kept],
        labels=[" / ".join(names) for names in classes.names],
        seed=running.seed,
    )
    facts: dict[str, Any] = data.facts()
    facts |= {"images": len(images.vectors)}
    facts["skipped"] = [*facts["skipped"], *skipped_facts(images.skipped)]
    matched = _after_skipping(protocol, images.skipped)
    settings = {
        "classes": len(classes),
        "templates": len(classes.templates),
        "class_names": classes.source,
        "seed": running.seed,
    }
    return result_of(
        encoder,
        "zero-shot",
        DataFacts(matched.facts(), facts, classes.language),
        output,
        settings=settings,
        seconds=_seconds(began, embedded),
        precision=running.precision,
    )


def _encode_pictures(encoder: Encoder, pictures: Pictures, running: Running) -> ItemEmbeddings:
    key = encoder.fingerprint, pictures.content_key()
    if key not in running.latest:
        found = embed_pictures(encoder, pictures, on_error=running.on_error, **running.embedding)
        running.latest.clear()
        running.latest[key] = found
    return running.latest[key]


def _directions(data: RetrievalData) -> tuple[Direction, ...]:
    if data.protocol.status == "custom":
        return ("i2t", "t2i")
    known = get_protocol(data.protocol.id).directions
    return tuple(each for each in ("i2t", "t2i") if each in known)


def _still_there(
    owner: NDArray[np.int64], images: ItemEmbeddings, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of texts whose picture could be read, and the new owner of each."""
    place = np.full(count, -1)
    place[images.kept] = np.arange(len(images.kept))
    rows = np.flatnonzero(place[owner] >= 0)
    return rows, place[owner[rows]]


def _also_there(
    also: NDArray[np.int64], rows: NDArray[np.int64], images: ItemEmbeddings, count: int
) -> NDArray[np.int64]:
    """Return the further right (text, picture) pairs, numbered anew, without what is gone."""
    image_place = np.full(count, -1)
    image_place[images.kept] = np.arange(len(images.kept))
    text_place = np.full(max([0, *(rows + 1), *(also[:, 0] + 1)]), -1)
    text_place[rows] = np.arange(len(rows))
    pairs = np.stack([text_place[also[:, 0]], image_place[also[:, 1]]], axis=1)
    return pairs[(pairs >= 0).all(axis=1)]


def _seen(pictures: Any, images: ItemEmbeddings) -> Any:
    if len(images.kept) == len(pictures):
        return pictures
    return PictureSubset(pictures, images.kept.tolist())


def _after_skipping(protocol: MatchedProtocol, skipped: list[BadItem]) -> MatchedProtocol:
    if not skipped:
        return protocol
    return protocol.demoted(f"{len(skipped):,} pictures could not be read and were left out")


def _seconds(began: float, embedded: float) -> dict[str, float]:
    now = time.perf_counter()
    return {"embed": embedded - began, "score": now - embedded, "all": now - began}


def drawn_candidates(data: RetrievalData, candidates: int, *, seed: int) -> RetrievalData:
    """Return the data of that many pictures, drawn by the seed, with all their captions.

    It follows no protocol any more. Raises ConfigError where there are fewer pictures.
    """
    chosen = draw_candidates(len(data.pictures), candidates, seed)
    place = np.full(len(data.pictures), -1)
    place[chosen] = np.arange(candidates)
    rows = np.flatnonzero(place[data.owner] >= 0)
    protocol = match(
        CUSTOM, [data.texts[row] for row in rows], place[data.owner[rows]].tolist(), candidates
    )
    note = f"{candidates:,} of {len(data.pictures):,} pictures, drawn by seed {seed}"
    return replace(
        data,
        pictures=PictureSubset(data.pictures, chosen),
        texts=[data.texts[row] for row in rows],
        owner=place[data.owner[rows]],
        also=np.zeros((0, 2), np.int64),
        protocol=protocol.noted(note),
        images_tally=None,
        texts_tally=None,
    )


def draw_candidates(count: int, candidates: int, seed: int) -> list[int]:
    """Draw that many of `count` pairs, in order; the same seed gives the same ones everywhere."""
    if not 2 <= candidates <= count:
        raise ConfigError(
            f"candidates is {candidates:,}, expected 2 to {count:,}, the number of pairs"
        )
    return sorted(random.Random(f"candidates/{seed}").sample(range(count), candidates))
