"""The training stream: shards in, batches out, in an order that depends on seed and step alone.

Every random choice (caption, crop) is drawn from (seed, global sample position), so a run that
stopped goes on with the batches it would have seen. Not for the order itself (order.py), nor for
what becomes of a pair (samples.py).
"""

import os
from collections.abc import Iterator, Sequence
from multiprocessing.util import Finalize
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from m2encoder.batch import Batch
from m2encoder.config import Data
from m2encoder.data_pipeline.order import SHUFFLE_WINDOW, Mixture, SourceOrder
from m2encoder.data_pipeline.samples import Posted, Sample, SampleMaker, WorkClock
from m2encoder.data_pipeline.shard_files import ShardFiles
from m2encoder.data_pipeline.training_sources import (
    LANGUAGES,
    TrainingSource,
    open_sources,
    plan_lines,
)
from m2encoder.errors import ConfigError, DataError
from m2encoder.tokenizer_fast import TrainingTokenizer


class TrainingStream:
    """Batches of augmented pictures and tokenised captions by optimizer step.

    Every process reads its own rows of the same global batches: their pairs, captions and crops are
    the same whatever the number of processes and workers, and wherever the run was stopped.

    Raises DataError when an index is missing or disagrees with its tars, a batch takes more pairs
    of a source than it has, or a language has no caption at all; ConfigError when the processes
    cannot share a batch evenly.
    """

    def __init__(
        self,
        settings: Data,
        *,
        image_size: int,
        tokenizer: TrainingTokenizer,
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
        self.settings = settings
        self.languages = tuple(languages)
        self.sources = open_sources(settings, self.languages, rank=rank, world_size=world_size)
        share = settings.batch_size // world_size
        rows = range(rank * share, (rank + 1) * share)
        places = _Places(self.sources, settings, rows, seed)
        maker = SampleMaker(image_size, settings.augment, tokenizer, self.languages, seed)
        self._batches = _Batches(places, maker)

    @property
    def pairs(self) -> int:
        """Pairs of all sources that have a caption in a language asked for."""
        return sum(source.pairs for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches that the pairs of all sources make; passes over them go on in between."""
        return max(1, self.pairs // self.settings.batch_size)

    def describe(self) -> list[str]:
        """Return the shard plan as lines (training_sources.describe_sources)."""
        return plan_lines(self.sources, self.settings)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield this process's rows of the batches of steps first_step .. last_step - 1.

        Pairs that cannot be used are left out of their batch and named in `Batch.dropped`.
        """
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(first_step, last_step),
            num_workers=self.settings.workers,
            collate_fn=_posted,  # pyright: ignore[reportArgumentType]
            multiprocessing_context="spawn" if self.settings.workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=end_without_finalising,
        )
        return iter(loader)


def _posted(batch: Batch) -> Batch | Posted:
    return batch if get_worker_info() is None else Posted(batch)


def end_without_finalising(worker: int) -> None:
    """Let a worker end as soon as its queues are closed.

    Where batches are dropped in the middle, the thread that sends them still holds tensors. Python
    before 3.14 kills such a thread when it finalises, inside torch's destructors, and the process
    aborts, which the training process would take for a failure.
    """
    Finalize(None, os._exit, args=(0,), exitpriority=-1000)


class _Place(NamedTuple):
    """Where one row's pair lies."""

    position: int
    source: int
    shard: int
    pair: int


class _Places:
    """Which pairs this process reads for a step."""

    def __init__(
        self, sources: list[TrainingSource], settings: Data, rows: range, seed: int
    ) -> None:
        self._rows, self._batch_size = rows, settings.batch_size
        self._mixture = Mixture([source.weight for source in sources], settings.batch_size)
        self._orders = [
            SourceOrder(
                [shard.pairs for shard in source.shards],
                self._mixture,
                number,
                seed=seed,
                resampled=settings.order == "resampled",
            )
            for number, source in enumerate(sources)
        ]
        self.files = [
            ShardFiles(source.folder, source.shards, limit=self._files_at_once(source, order))
            for source, order in zip(sources, self._orders, strict=True)
        ]
        self.languages = [source.languages for source in sources]

    def _files_at_once(self, source: TrainingSource, order: SourceOrder) -> int:
        """Files that this process reads from at a time: of each lane two windows."""
        lanes = -(-order.lanes * len(self._rows) // self._batch_size) + 1
        return 2 * lanes * (2 + SHUFFLE_WINDOW * len(source.shards) // source.pairs)

    def of(self, step: int) -> list[_Place]:
        """Return the pairs of this process's rows, in order, and begin to read ahead."""
        sources, draws = self._mixture.rows(step)
        mine = slice(self._rows.start, self._rows.stop)
        sources, draws = sources[mine], draws[mine]
        shards, pairs = np.zeros_like(draws), np.zeros_like(draws)
        for number, order in enumerate(self._orders):
            here = sources == number
            shards[here], pairs[here] = order.places(step, draws[here])
            for run in order.take_ahead():
                self.files[number].read_ahead(run)
        first = step * self._batch_size + self._rows.start
        found = zip(sources.tolist(), shards.tolist(), pairs.tolist(), strict=True)
        return [_Place(first + row, *place) for row, place in enumerate(found)]


class _Batches(Dataset[Batch]):
    """This process's share of the batch of a step."""

    def __init__(self, places: _Places, maker: SampleMaker) -> None:
        self.places, self.maker = places, maker

    def __getitem__(self, step: int) -> Batch:
        clock = WorkClock()
        samples: list[Sample] = []
        dropped: list[tuple[str, str]] = []
        with clock("read"):
            places = self.places.of(step)
        for place in places:
            files = self.places.files[place.source]
            try:
                with clock("read"):
                    pair = files.pair(place.shard, place.pair)
                languages = self.places.languages[place.source]
                samples.append(self.maker.sample(pair, place.position, clock, languages))
            except DataError as error:
                dropped.append((files.key(place.shard, place.pair), str(error)))
        return self.maker.batch(samples, dropped, clock)
