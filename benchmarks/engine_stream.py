"""How many pairs per second the training stream gives, beside webdataset and the decode limit.

Writes 6,000 photograph-like JPEGs (about 340x256, 40 kB) with captions in both languages to 12 tars
of a temporary folder, then reads them three ways with the same tokeniser, decoder, random crop to
224 and assembly of batches of 128:
  stream       TrainingStream: exact epochs, shuffled, may stop and go on anywhere
  webdataset   webdataset's reader in file order, without shuffling or state: its fastest
  limit        the same work on bytes that lie in memory already, in as many processes
Every round measures all three one after the other; the table has medians over the rounds, of the
rates and of the ratios within each round (targets: at least 1.0 of webdataset, and with 2 workers
at least 0.9 of the limit). Many short rounds, because other work on the machine comes and goes; all
processes live through them. The first round, and what workers made beforehand, are left out.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from m2encoder.batch import Batch
from m2encoder.config import Augment, Data
from m2encoder.data_pipeline.samples import SampleMaker, WorkClock
from m2encoder.data_pipeline.stream import TrainingStream, end_without_finalising
from m2encoder.released_tokenizer import load_tokenizer
from m2encoder.shards import Pair, ShardReader, write_shards
from m2encoder.tokenizer import train_tokenizer

BATCH_SIZE = 128
IMAGE_SIZE = 224
AUGMENT = Augment(crop_scale_min=0.5, flip=True)
WORDS = {
    "zh": "红蓝绿白黑猫狗房子旁边有一只大小树在看",
    "en": "a red blue white cat dog house tree",
}


def write_data(folder: Path, pairs: int) -> Path:
    """Write pairs and a tokenizer; returns the shards' folder."""
    rng = np.random.default_rng(0)

    def make() -> Iterator[Pair]:
        for i in range(pairs):
            smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            pixels = np.asarray(smooth.resize((340, 256), Image.Resampling.BICUBIC), dtype=np.int16)
            grain = rng.normal(0, 9, (256, 340, 1)).astype(np.int16)
            encoded = io.BytesIO()
            picture = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
            picture.save(encoded, "JPEG", quality=88)
            texts = {
                "zh": ["".join(rng.choice([*WORDS["zh"]], 18)) for _ in range(2)],
                "en": [" ".join(rng.choice(WORDS["en"].split(), 12)) for _ in range(2)],
            }
            yield Pair(f"{i:06d}", encoded.getvalue(), texts, image_ext="jpg")

    shards = folder / "shards"
    write_shards(make(), shards, pairs_per_shard=500)
    texts = [text for pair in ShardReader(shards) for text in pair.captions["zh"]][:2000]
    (folder / "sp.model").write_bytes(train_tokenizer([*texts, WORDS["en"]], vocab_size=600))
    return shards


def make_maker(folder: Path) -> SampleMaker:
    """What turns a pair into a sample, the same for all three."""
    tokenizer = load_tokenizer(folder / "sp.model", max_length=52)
    return SampleMaker(IMAGE_SIZE, AUGMENT, tokenizer, ("zh", "en"), seed=0)


def rate(batches: Iterator[Batch], workers: int, measured: int) -> float:
    """Return pairs per second, once what was made beforehand is taken; leaves the workers idle."""
    for _ in range(2 * workers + 1):
        next(batches)
    began = time.perf_counter()
    pairs = sum(len(next(batches).keys) for _ in range(measured))
    found = pairs / (time.perf_counter() - began)
    time.sleep(1.5 * 2 * workers * BATCH_SIZE / found)  # two batches ahead per worker
    return found


def stream_batches(folder: Path, shards: Path, workers: int) -> Iterator[Batch]:
    """Ours."""
    data = Data(train=str(shards), batch_size=BATCH_SIZE, workers=workers, augment=AUGMENT)
    tokenizer = load_tokenizer(folder / "sp.model", max_length=52)
    stream = TrainingStream(data, image_size=IMAGE_SIZE, tokenizer=tokenizer, seed=0)
    return stream.batches(0, 10**6)


def _read_sample(maker: SampleMaker, sample: dict[str, Any]) -> Any:
    record = json.loads(sample["json"])
    pair = Pair(sample["__key__"], sample["jpg"], record["captions"], record["meta"])
    return maker.sample(pair, int(pair.key), WorkClock())


def _assemble(maker: SampleMaker, samples: list[Any]) -> Batch:
    return maker.batch(samples, [], WorkClock())


def webdataset_batches(folder: Path, shards: Path, workers: int) -> Iterator[Batch]:
    """Webdataset's own pipeline around the same work."""
    from webdataset.compat import WebDataset

    maker = make_maker(folder)
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset: Any = WebDataset(urls, shardshuffle=False).repeat()
    dataset = dataset.map(partial(_read_sample, maker))
    dataset = dataset.batched(BATCH_SIZE, collation_fn=partial(_assemble, maker), partial=False)
    context = "spawn" if workers else None
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=end_without_finalising,
    )
    return iter(loader)


def _work_from_memory(folder: Path, shards: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    maker, reader = make_maker(folder), ShardReader(shards)
    pairs = [reader[i] for i in range(2 * BATCH_SIZE)]
    while (count := pipe.recv()) is not None:
        for number in range(count):
            clock = WorkClock()
            some = [pairs[(number * BATCH_SIZE + i) % len(pairs)] for i in range(BATCH_SIZE)]
            maker.batch([maker.sample(p, i, clock) for i, p in enumerate(some)], [], clock)
        pipe.send(None)


class Limit:
    """Processes that do the stream's work on bytes in memory."""

    def __init__(self, folder: Path, shards: Path, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            arguments = (folder, shards, theirs)
            context.Process(target=_work_from_memory, args=arguments, daemon=True).start()
            self.pipes.append(ours)
        self._run(1)

    def _run(self, batches: int) -> None:
        for pipe in self.pipes:
            pipe.send(batches)
        for pipe in self.pipes:
            pipe.recv()

    def rate(self, measured: int) -> float:
        """Pairs per second of all of them together."""
        share = max(1, measured // len(self.pipes))
        began = time.perf_counter()
        self._run(share)
        return share * len(self.pipes) * BATCH_SIZE / (time.perf_counter() - began)


def measure(folder: Path, shards: Path, workers: int, measured: int, rounds: int) -> list[float]:
    """Return median rates of stream, webdataset and limit, and the stream's median ratios."""
    stream = stream_batches(folder, shards, workers)
    webdataset = webdataset_batches(folder, shards, workers)
    limit = Limit(folder, shards, max(1, workers))
    found = []
    for _ in range(rounds + 1):
        ours, theirs = (rate(batches, workers, measured) for batches in (stream, webdataset))
        best = limit.rate(measured)
        found.append((ours, theirs, best, ours / theirs, ours / best))
    for pipe in limit.pipes:
        pipe.send(None)
    return [statistics.median(column) for column in zip(*found[1:], strict=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--batches", type=int, default=8, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)  # as each worker has
    from importlib.metadata import version

    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, Pillow "
        f"{version('pillow')}, webdataset {version('webdataset')}, {os.cpu_count()} cores\n"
    )
    print("| workers | stream/s | webdataset/s | limit/s | of webdataset | of the limit |")
    print("|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = write_data(folder, options.pairs)
        for workers in options.workers:
            found = measure(folder, shards, workers, options.batches, options.rounds)
            cells = [f"{x:,.0f}" for x in found[:3]] + [f"{x:.2f}" for x in found[3:]]
            print(f"| {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
