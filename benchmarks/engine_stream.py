"""How many pairs per second the training stream gives, beside webdataset and the decode limit.

Writes 6,000 photograph-like JPEGs (about 340x256, 40 kB) with captions in both languages to 12 tars
of a temporary folder, then reads them three ways with the same tokeniser, decoder, random crop to
224 and assembly of batches of 128:
  stream       TrainingStream: exact epochs, shuffled, may stop and go on anywhere
  webdataset   webdataset's reader in file order, without shuffling or state: its fastest
  limit        the same work on bytes that lie in memory already, in as many processes
Every round measures all three one after the other; the table has medians over the rounds, of the
rates and of the ratios within each round (targets: at least 1.0 of webdataset, and with 2 workers
at least 0.9 of the limit). The first batches, with the start of the processes, are left out.
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
from m2encoder.data_pipeline.stream import TrainingStream
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


def rate(batches: Iterator[Batch], warmup: int, measured: int) -> float:
    """Return pairs per second after some batches."""
    for _ in range(warmup):
        next(batches)
    began = time.perf_counter()
    pairs = sum(len(next(batches).keys) for _ in range(measured))
    return pairs / (time.perf_counter() - began)


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
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    return iter(loader)


def _work_from_memory(folder: Path, shards: Path, batches: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    maker, reader = make_maker(folder), ShardReader(shards)
    pairs = [reader[i] for i in range(2 * BATCH_SIZE)]
    for count in (1, batches):  # first to warm up
        pipe.send(None)
        pipe.recv()
        began = time.perf_counter()
        for number in range(count):
            clock = WorkClock()
            some = [pairs[(number * BATCH_SIZE + i) % len(pairs)] for i in range(BATCH_SIZE)]
            maker.batch([maker.sample(p, i, clock) for i, p in enumerate(some)], [], clock)
        pipe.send(time.perf_counter() - began)


def limit(folder: Path, shards: Path, workers: int, measured: int) -> float:
    """Pairs per second that as many processes make of bytes in memory."""
    context = multiprocessing.get_context("spawn")
    count = max(1, workers)
    share = max(1, measured // count)
    pipes, processes = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        arguments = (folder, shards, share, theirs)
        processes.append(context.Process(target=_work_from_memory, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    seconds = 0.0
    for _ in range(2):
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send(None)
        seconds = max(pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    return share * count * BATCH_SIZE / seconds


def measure(folder: Path, shards: Path, workers: int, measured: int) -> dict[str, float]:
    """One round: pairs per second of each."""
    warmup = 1 + 3 * workers
    return {
        "stream": rate(stream_batches(folder, shards, workers), warmup, measured),
        "webdataset": rate(webdataset_batches(folder, shards, workers), warmup, measured),
        "limit": limit(folder, shards, workers, measured),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--batches", type=int, default=32, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=5)
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
            rounds = [
                measure(folder, shards, workers, options.batches) for _ in range(options.rounds)
            ]
            medians = [statistics.median(r[n] for r in rounds) for n in rounds[0]]
            ratios = [statistics.median(r["stream"] / r[n] for r in rounds) for n in rounds[0]][1:]
            cells = [f"{x:,.0f}" for x in medians] + [f"{x:.2f}" for x in ratios]
            print(f"| {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
