"""The training stream: shards in, batches out, in an order that depends on (seed, epoch) alone.

Every random choice (caption, crop) is drawn from (seed, global sample position), so a run that
stopped goes on with the batches it would have seen. Not for cleaning or writing data.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from m2encoder.batch import Batch, Captions
from m2encoder.config import Data
from m2encoder.errors import ConfigError, DataError
from m2encoder.hashing import text_key
from m2encoder.images import open_image
from m2encoder.shards import ShardReader
from m2encoder.tokenizer import SentencePieceTokenizer
from m2encoder.transforms import augment

LANGUAGES = ("zh", "en")


class Sample(NamedTuple):
    """One pair as the model takes it, or why it cannot be used."""

    key: str
    pixels: np.ndarray[Any, Any] | None  # (3, S, S) uint8
    ids: dict[str, list[int]]
    text_keys: dict[str, int]
    position: int
    reason: str = ""


class TrainingStream:
    """Batches of augmented pictures and tokenised captions by optimizer step.

    Every process reads its own rows of the same global batches.

    Raises DataError when there are fewer pairs than one batch takes, or a language has no caption
    at all; ConfigError when the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        settings: Data,
        *,
        image_size: int,
        tokenizer: SentencePieceTokenizer,
        languages: Sequence[str] = LANGUAGES,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if settings.batch_size % world_size:
            raise ConfigError(
                f"data.batch_size {settings.batch_size} is no multiple of the {world_size} "
                f"processes; choose another"
            )
        reader = ShardReader(Path(settings.train))
        if len(reader) < settings.batch_size:
            raise DataError(
                f"{settings.train}: {len(reader)} pairs, a batch takes {settings.batch_size}; "
                f"lower data.batch_size or add data"
            )
        if absent := [lang for lang in languages if not reader.index.captions.get(lang)]:
            raise DataError(
                f"{settings.train}: no captions in {' or '.join(absent)}, an objective needs them; "
                f"add some, or name only the other objectives"
            )
        self.settings = settings
        self.languages = tuple(languages)
        share = settings.batch_size // world_size
        self._rows = range(rank * share, (rank + 1) * share)
        self._samples = _Samples(reader, settings, image_size, tokenizer, self.languages, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per pass; each epoch leaves out another random remainder."""
        return len(self._samples.reader) // self.settings.batch_size

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield this process's rows of the batches of steps first_step .. last_step - 1.

        Pairs that cannot be used are left out of their batch and named in `Batch.dropped`.
        """
        loader = DataLoader(
            self._samples,
            batch_sampler=(  # a generator: all places of a long run do not fit in memory
                [(step, row) for row in self._rows] for step in range(first_step, last_step)
            ),
            num_workers=self.settings.workers,
            collate_fn=self._collate,
            multiprocessing_context="spawn" if self.settings.workers else None,
        )
        return iter(loader)

    def _collate(self, samples: list[Sample]) -> Batch:
        good = [sample for sample in samples if sample.pixels is not None]
        dropped = [(sample.key, sample.reason) for sample in samples if sample.pixels is None]
        size = self._samples.image_size
        pixels = np.stack([s.pixels for s in good]) if good else np.zeros((0, 3, size, size), "u1")  # pyright: ignore[reportArgumentType, reportCallIssue]
        captions = {language: _pad(good, language) for language in self.languages}
        positions = torch.tensor([s.position for s in good], dtype=torch.int64)
        keys = [s.key for s in good]
        return Batch(torch.from_numpy(pixels), captions, keys, positions, dropped)


def _pad(samples: list[Sample], language: str) -> Captions:
    rows = [row for row, sample in enumerate(samples) if language in sample.ids]
    texts = [samples[row].ids[language] for row in rows]
    ids = torch.zeros(len(texts), max(map(len, texts), default=0), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    keys = [samples[row].text_keys[language] for row in rows]
    where, same = (torch.tensor(numbers, dtype=torch.int64) for numbers in (rows, keys))
    return Captions(ids, mask, where, same)


class _Samples(Dataset[Sample]):
    """Samples by (step, row), the place in the global stream."""

    def __init__(
        self,
        reader: ShardReader,
        settings: Data,
        image_size: int,
        tokenizer: SentencePieceTokenizer,
        languages: tuple[str, ...],
        seed: int,
    ) -> None:
        self.reader = reader
        self.settings = settings
        self.image_size = image_size
        self.tokenizer = tokenizer
        self.languages = languages
        self.seed = seed
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        step, row = place
        size = self.settings.batch_size
        steps_per_epoch = len(self.reader) // size
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.reader))
        where = int(self._order[step_in_epoch * size + row])
        position = step * size + row
        rng = np.random.default_rng([self.seed, 1, position])
        try:
            return self._sample(where, position, rng)
        except DataError as error:
            return Sample(self.reader.key(where), None, {}, {}, position, str(error))

    def _sample(self, where: int, position: int, rng: np.random.Generator) -> Sample:
        pair = self.reader[where]
        ids: dict[str, list[int]] = {}
        keys: dict[str, int] = {}
        for language in self.languages:
            texts = [text for text in pair.captions.get(language, []) if text.strip()]
            choice = rng.random()  # drawn always, so that one language does not move the other's
            if texts:
                text = texts[int(choice * len(texts))]
                ids[language], keys[language] = self.tokenizer.encode(text), text_key(text)
        if not ids:
            raise DataError(f"pair {pair.key!r}: no caption in {' or '.join(self.languages)}")
        picture = open_image(pair.image, name=f"pair {pair.key!r}")
        pixels = augment(picture, self.image_size, self.settings.augment, rng)
        return Sample(pair.key, pixels, ids, keys, position)
