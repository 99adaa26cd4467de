"""All that one shard folder allows: retrieval, wrong captions and classes, per language.

Each measure is a Result. Not for other data and protocols (tasks.py), nor for showing (suite.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from m2encoder.embed import PairEmbeddings, TextEmbeddings, embed_pairs
from m2encoder.encoder import Encoder
from m2encoder.eval.bilingual import measure_bilingual
from m2encoder.eval.classification import measure_classification
from m2encoder.eval.examples import Asked, retrieval_examples
from m2encoder.eval.hard_negatives import given_hard_negatives, measure_hard_negatives
from m2encoder.eval.metric import TaskOutput
from m2encoder.eval.result_facts import (
    DataFacts,
    caption_facts,
    class_facts,
    labelled_pictures,
    result_of,
)
from m2encoder.eval.results import Result
from m2encoder.eval.retrieval import GroundTruth, RetrievalSettings, measure_retrieval
from m2encoder.eval.tasks import Running, draw_candidates
from m2encoder.pictures import PictureSubset, ShardPictures
from m2encoder.shards import ShardReader
from m2encoder.zero_shot import TASKS_NAME, ZeroShotTask, build_classifier, load_tasks

Task = Literal["retrieval", "hard-negatives", "zero-shot", "bilingual"]
TASKS: tuple[Task, ...] = ("retrieval", "hard-negatives", "zero-shot", "bilingual")
LANGUAGES = ("zh", "en")


def run_shards(
    encoder: Encoder,
    folder: Path,
    *,
    running: Running,
    tasks: Sequence[Task] = TASKS,
    languages: Sequence[str] = LANGUAGES,
    candidates: int | None = None,
    gt: GroundTruth = "index",
) -> list[Result]:
    """Encode a shard folder once and measure what its captions, labels and tasks allow.

    candidates: rank among that many pairs, drawn by the seed, instead of all; with every caption.
    Raises DataError on unusable shards, ConfigError on more candidates than pairs.
    """
    reader = ShardReader(folder)
    classes = load_tasks(folder) if _wants_classes(folder, tasks) else []
    if candidates is not None:
        draw_candidates(len(reader), candidates, running.seed)  # complains before the work
    began = time.perf_counter()
    wanted = languages if set(tasks) - {"zero-shot"} else ()
    pairs = embed_pairs(
        encoder, reader, languages=wanted, on_error=running.on_error, **_options(running)
    )
    seconds = time.perf_counter() - began
    measured = _Measured(encoder, folder, pairs, running, seconds)
    for language in languages:
        if language in pairs.texts and "retrieval" in tasks:
            measured.retrieval(reader, language, candidates, gt)
    for language in languages:
        if language in pairs.texts and "hard-negatives" in tasks:
            measured.hard_negatives(language)
    for task in classes:
        for language in languages:
            if language in task.templates:
                measured.zero_shot(task, language)
    if "bilingual" in tasks and len([each for each in languages if each in pairs.texts]) == 2:
        measured.bilingual(languages[0], languages[1])
    return measured.results


def _options(running: Running) -> dict[str, Any]:
    return {name: value for name, value in running.embedding.items() if name != "precision"}


def _wants_classes(folder: Path, tasks: Sequence[Task]) -> bool:
    if "zero-shot" not in tasks:
        return False
    return tuple(tasks) == ("zero-shot",) or (folder / TASKS_NAME).is_file()


class _Measured:
    """The results so far, and what they share."""

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        pairs: PairEmbeddings,
        running: Running,
        embed_s: float,
    ) -> None:
        self.encoder, self.folder, self.pairs = encoder, folder, pairs
        self.running, self.embed_s = running, embed_s
        self.results: list[Result] = []

    def add(
        self,
        task: str,
        facts: DataFacts,
        measure: Callable[[], TaskOutput],
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        began = time.perf_counter()
        output = measure()
        seconds = {"embed": self.embed_s, "score": time.perf_counter() - began}
        chosen = {**settings, "seed": self.running.seed}
        result = result_of(self.encoder, task, facts, output, settings=chosen, seconds=seconds)
        self.results.append(result)

    def retrieval(
        self, reader: ShardReader, language: str, candidates: int | None, gt: GroundTruth
    ) -> None:
        texts = self.pairs.texts[language]
        pairs, captions = self.pairs, texts
        place = {key: row for row, key in enumerate(reader.keys)}
        pictures = PictureSubset(ShardPictures(reader), [place[key] for key in pairs.keys])
        if candidates is not None:
            chosen = draw_candidates(len(pairs.keys), candidates, self.running.seed)
            pairs, captions = _only(pairs, texts, chosen)
            pictures = PictureSubset(pictures, chosen)
        shown = replace(pairs, texts={language: captions})

        def measure() -> TaskOutput:
            settings = RetrievalSettings(gt=gt, seed=self.running.seed)
            output = measure_retrieval(
                pairs.image,
                captions.vectors,
                captions.owner,
                texts=captions.texts,
                settings=settings,
            )
            asked = Asked(pairs.image, captions.vectors, captions.owner, pictures, captions.texts)
            examples = retrieval_examples(asked, output.ranks, seed=self.running.seed)
            return replace(output, details=output.details | {"examples": examples})

        facts = caption_facts(self.folder, shown, [language])
        self.add("retrieval", facts, measure, {"gt": gt, "candidates": candidates})

    def hard_negatives(self, language: str) -> None:
        wrong = given_hard_negatives(self.pairs, language)
        if wrong.texts:
            facts = caption_facts(self.folder, self.pairs, [language])
            self.add(
                "hard-negatives",
                facts,
                lambda: measure_hard_negatives(
                    self.encoder,
                    self.pairs,
                    language,
                    wrong,
                    batch_size=self.running.batch_size,
                    seed=self.running.seed,
                ),
            )

    def zero_shot(self, task: ZeroShotTask, language: str) -> None:
        rows, targets = labelled_pictures(self.pairs, task)
        names = [" / ".join(answer.names[language]) for answer in task.classes]

        def measure() -> TaskOutput:
            classifier = build_classifier(self.encoder, task, language, **_options(self.running))
            output = measure_classification(
                self.pairs.image[rows], classifier, targets, labels=names, seed=self.running.seed
            )
            return replace(output, details=output.details | {"task": task.name})

        facts = class_facts(self.folder, self.pairs, task, [language])
        self.add("zero-shot", facts, measure, {"task": task.name})

    def bilingual(self, first: str, second: str) -> None:
        facts = caption_facts(self.folder, self.pairs, [first, second])
        self.add(
            "bilingual",
            facts,
            lambda: measure_bilingual(self.pairs, (first, second), seed=self.running.seed),
        )


def _only(
    pairs: PairEmbeddings, texts: TextEmbeddings, chosen: Sequence[int]
) -> tuple[PairEmbeddings, TextEmbeddings]:
    """Return some pairs and their captions, rows numbered anew."""
    place = np.full(len(pairs.keys), -1)
    place[list(chosen)] = np.arange(len(chosen))
    kept = np.flatnonzero(place[texts.owner] >= 0)
    captions = TextEmbeddings(
        texts.vectors[kept], place[texts.owner[kept]], [texts.texts[row] for row in kept]
    )
    rows = list(chosen)
    some = replace(
        pairs,
        image=pairs.image[rows],
        keys=[pairs.keys[row] for row in rows],
        metas=[pairs.metas[row] for row in rows],
    )
    return some, captions
