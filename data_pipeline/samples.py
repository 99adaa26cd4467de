"""From a pair to what the model takes: one caption per language, tokenised, and a changed picture.

Not for which pair comes when (order.py), nor for reading it (shard_files.py).
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from m2encoder.batch import Batch, Captions
from m2encoder.config import Augment
from m2encoder.errors import DataError
from m2encoder.hashing import text_key
from m2encoder.images import open_image
from m2encoder.pair_record import Pair
from m2encoder.tokenizer_fast import TrainingTokenizer
from m2encoder.transforms import augment

_SAMPLE = 1  # what a generator decides; 2 and 3 are the order's (order.py)


class Sample(NamedTuple):
    """One pair as the model takes it."""

    key: str
    position: int
    pixels: np.ndarray[Any, Any]  # (3, S, S) uint8
    texts: dict[str, str]
    ids: dict[str, list[int]]


class WorkClock:
    """Seconds by kind of work: read, decode (and augment), tokenise."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "decode": 0.0, "tokenise": 0.0}

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Count the time spent inside, errors included."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - began


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples and batches; every random choice comes from (seed, position) alone."""

    image_size: int
    augmentation: Augment
    tokenizer: TrainingTokenizer
    languages: tuple[str, ...]
    """In this order, each draws a caption."""
    seed: int

    def sample(
        self, pair: Pair, position: int, clock: WorkClock, languages: Sequence[str] | None = None
    ) -> Sample:
        """Make one sample, for its place in the global stream.

        languages: those whose captions count here; None takes all.
        Raises DataError where there is no caption, or the picture cannot be read.
        """
        rng = np.random.default_rng([self.seed, _SAMPLE, position])
        with clock("tokenise"):
            texts = self._choose(pair, self.languages if languages is None else languages, rng)
            ids = {language: self.tokenizer.encode(text) for language, text in texts.items()}
        with clock("decode"):
            picture = open_image(pair.image, name=f"pair {pair.key!r}")
            pixels = augment(picture, self.image_size, self.augmentation, rng)
        return Sample(pair.key, position, pixels, texts, ids)

    def batch(
        self, samples: Sequence[Sample], dropped: list[tuple[str, str]], clock: WorkClock
    ) -> Batch:
        """Put samples together; dropped are (key, reason) of those that could not be made."""
        with clock("decode"):
            pixels = self._stack(samples)
        with clock("tokenise"):
            captions = {language: _pad(samples, language) for language in self.languages}
        positions = torch.tensor([sample.position for sample in samples], dtype=torch.int64)
        return Batch(
            pixels=pixels,
            captions=captions,
            keys=[sample.key for sample in samples],
            positions=positions,
            dropped=dropped,
            texts={x: [s.texts[x] for s in samples if x in s.texts] for x in self.languages},
            work_s=clock.seconds,
        )

    def _choose(
        self, pair: Pair, languages: Sequence[str], rng: np.random.Generator
    ) -> dict[str, str]:
        """Draw one caption per language; DataError where there is none at all."""
        chosen: dict[str, str] = {}
        for language in self.languages:
            texts = [text for text in pair.captions.get(language, []) if text.strip()]
            choice = rng.random()  # drawn always, so that one language does not move the other's
            if texts and language in languages:
                chosen[language] = texts[int(choice * len(texts))]
        if not chosen:
            raise DataError(f"pair {pair.key!r}: no caption in {' or '.join(languages)}")
        return chosen

    def _stack(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return (B, 3, S, S), in a worker in memory that the training process sees too."""
        shape = (len(samples), 3, self.image_size, self.image_size)
        pixels = torch.empty(0, dtype=torch.uint8)
        if get_worker_info() is None or not samples:
            pixels = pixels.new_empty(shape)
        else:  # torch's own default_collate begins so, too
            shared = torch.UntypedStorage._new_shared(math.prod(shape))
            pixels.set_(shared, 0, shape)  # pyright: ignore[reportCallIssue]
        for row, sample in zip(pixels.numpy(), samples, strict=True):
            row[:] = sample.pixels
        return pixels


class Posted:
    """A batch on its way from a worker: what arrives is the batch itself.

    Only the pixels travel in shared memory. Every tensor that does costs a connection of its own,
    about a millisecond on both sides; the small ones are faster as part of the message.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        rest = vars(self.batch).copy()
        captions = {x: [t.numpy() for t in c] for x, c in rest.pop("captions").items()}
        return _arrived, (rest.pop("pixels"), captions, rest.pop("positions").numpy(), rest)


def _arrived(
    pixels: torch.Tensor,
    captions: dict[str, list[np.ndarray[Any, Any]]],
    positions: np.ndarray[Any, Any],
    rest: dict[str, Any],
) -> Batch:
    found = {x: Captions(*map(torch.from_numpy, arrays)) for x, arrays in captions.items()}
    return Batch(pixels, found, positions=torch.from_numpy(positions), **rest)


def _pad(samples: Sequence[Sample], language: str) -> Captions:
    rows = [row for row, sample in enumerate(samples) if language in sample.ids]
    texts = [samples[row].ids[language] for row in rows]
    ids = torch.zeros(len(texts), max(map(len, texts), default=0), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    keys = [text_key(samples[row].texts[language]) for row in rows]
    where, same = (torch.tensor(numbers, dtype=torch.int64) for numbers in (rows, keys))
    return Captions(ids, mask, where, same)
