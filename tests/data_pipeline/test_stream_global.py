"""Global batches are the same whatever reads them: processes, workers, restarts; several sources.

Not for single batches (test_stream.py), nor for the order (test_order.py).
"""

import json
import multiprocessing
import os
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch

from m2encoder.config import Augment, Data, Source
from m2encoder.data_pipeline.order import Run
from m2encoder.data_pipeline.shard_files import LocalFolder, PackedShard, ShardFiles
from m2encoder.data_pipeline.stream import TrainingStream
from m2encoder.data_pipeline.training_sources import describe_sources
from m2encoder.errors import ConfigError, DataError
from m2encoder.released_tokenizer import load_tokenizer
from m2encoder.shards import ShardReader, write_shards

EVERYTHING = Augment(crop_scale_min=0.5, flip=True, rotate_degrees=10, color_jitter=0.3)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder / "sp.model", max_length=24)


@pytest.fixture(scope="module")
def sources(tiny_shards, tmp_path_factory):
    """Two folders of 101 and 59 pairs in shards of 13 and 7."""
    pairs = list(ShardReader(tiny_shards / "train"))
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    write_shards(pairs[:101], first, pairs_per_shard=13)
    write_shards(pairs[101:], second, pairs_per_shard=7)
    return first, second


@pytest.fixture
def data(sources):
    first, second = sources
    train = (Source(str(first), weight=3), Source(str(second), weight=1, languages=("en",)))
    return Data(train=train, batch_size=16, augment=EVERYTHING)


@pytest.fixture
def open_stream(data, tokenizer):
    def make(rank=0, world_size=1, seed=7, **changes):
        return TrainingStream(
            replace(data, **changes),
            image_size=32,
            tokenizer=tokenizer,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    return make


def rows_of(batch):
    """Each row's place, pair, pixels, captions and ids, as comparable values."""
    captions = [{} for _ in batch.keys]
    for language, found in batch.captions.items():
        for i, row in enumerate(found.rows.tolist()):
            ids = tuple(found.ids[i, found.mask[i].bool()].tolist())
            captions[row][language] = (batch.texts[language][i], ids, int(found.keys[i]))
    pixels = [row.numpy().tobytes() for row in batch.pixels]
    return list(zip(batch.positions.tolist(), batch.keys, pixels, captions, strict=True))


def global_batches(open_stream, world_size, first, last, **changes):
    """The batches of all ranks put together, step by step."""
    streams = [open_stream(rank, world_size, **changes) for rank in range(world_size)]
    shares = [[rows_of(b) for b in stream.batches(first, last)] for stream in streams]
    return [list(chain(*step)) for step in zip(*shares, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(sources, tokenizer):
    """Steps 0 to 20, over several epochs of both sources, read by one process without workers."""
    first, second = sources
    train = (Source(str(first), weight=3), Source(str(second), weight=1, languages=("en",)))
    stream = TrainingStream(
        Data(train=train, batch_size=16, augment=EVERYTHING),
        image_size=32,
        tokenizer=tokenizer,
        seed=7,
    )
    return [rows_of(batch) for batch in stream.batches(0, 20)]


@pytest.mark.parametrize(
    ("world_size", "workers", "first"),
    [(1, 0, 13), (2, 0, 0), (4, 0, 0), (4, 0, 7), (8, 0, 11), (16, 0, 5), (1, 2, 3), (2, 1, 9)],
)
def test_any_world_workers_and_restart_give_the_same_global_batches(
    open_stream, undisturbed, world_size, workers, first
):
    found = global_batches(open_stream, world_size, first, 20, workers=workers)
    assert found == undisturbed[first:]


def test_positions_count_the_rows_of_the_run(undisturbed):
    assert [row[0] for step in undisturbed for row in step] == list(range(20 * 16))


def test_weights_hold_in_every_batch_and_epochs_are_exact(undisturbed, sources):
    keys = [ShardReader(folder).keys for folder in sources]
    steps = [[row[1] for row in step] for step in undisturbed]
    assert [sum(key in keys[0] for key in step) for step in steps] == [12] * 20
    for own, drawn in zip(keys, (240, 80), strict=True):
        taken = [key for step in steps for key in step if key in own]
        assert len(taken) == drawn
        for epoch in range(drawn // len(own)):
            assert sorted(taken[epoch * len(own) : (epoch + 1) * len(own)]) == sorted(own)


def test_a_source_gives_captions_of_its_languages_only(undisturbed, sources):
    second = set(ShardReader(sources[1]).keys)
    for step in undisturbed:
        for _, key, _, captions in step:
            assert set(captions) == ({"en"} if key in second else {"zh", "en"})


def test_texts_are_those_that_were_tokenised(open_stream, tokenizer):
    batch = next(open_stream().batches(4, 5))
    for language, captions in batch.captions.items():
        assert len(batch.texts[language]) == len(captions.rows)
        for text, ids, mask in zip(batch.texts[language], captions.ids, captions.mask, strict=True):
            assert tokenizer.encode(text) == ids[mask.bool()].tolist()


def test_a_batch_says_what_its_seconds_went_to(open_stream):
    work_s = next(open_stream().batches(0, 1)).work_s
    assert set(work_s) == {"read", "decode", "tokenise"}
    assert all(0 < seconds < 5 for seconds in work_s.values())


def test_batches_dropped_in_the_middle_end_their_workers_in_peace(open_stream):
    others = set(multiprocessing.active_children())  # of tests that ran before
    batches = open_stream(workers=2).batches(0, 1000)
    next(batches)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    del batches
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_resampled_shards_come_with_replacement_and_the_same_every_time(open_stream):
    one, two = (global_batches(open_stream, n, 0, 8, order="resampled") for n in (1, 2))
    assert one == two
    counts = Counter(row[1] for step in one for row in step)
    assert len(counts) < 128  # some twice while others have not come yet


def test_pairs_without_a_caption_in_the_languages_do_not_count(tmp_path, tiny_shards, tokenizer):
    pairs = list(ShardReader(tiny_shards / "train"))[:12]
    for pair in pairs[:4]:
        pair.captions = {"en": [" \u3000", ""], "fr": ["un chat"]}
    pairs[4].captions = {"zh": ["繁體字，ＡＢＣ🐱"]}
    write_shards(pairs, tmp_path, pairs_per_shard=5)
    stream = TrainingStream(
        Data(train=str(tmp_path), batch_size=4), image_size=32, tokenizer=tokenizer, seed=0
    )
    assert stream.pairs == 8
    assert stream.steps_per_epoch == 2
    keys = [key for batch in stream.batches(0, 2) for key in batch.keys]
    assert sorted(keys) == sorted(pair.key for pair in pairs[4:])


def change_first_entry(folder, change):
    index = json.loads((folder / "index.json").read_text("utf-8"))
    change(index["shards"][0]["pairs"][0])
    (folder / "index.json").write_text(json.dumps(index), "utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: entry["image"].__setitem__(1, entry["image"][1] + 512), "found no member"),
        (lambda entry: entry["image"].__setitem__(2, 99), "a picture of 99 bytes"),
        (lambda entry: entry.update(key="other"), "the index says that pair 'other' has"),
    ],
)
def test_an_index_of_other_tars_is_refused_before_the_first_step(
    open_stream, sources, tmp_path, change, said
):
    folder = shutil.copytree(sources[0], tmp_path / "data")
    change_first_entry(folder, change)
    with pytest.raises(DataError, match=said) as error:
        open_stream(train=str(folder))
    assert "shard-000000.tar" in str(error.value)


def test_what_cannot_be_trained_on_is_refused_with_numbers(open_stream, sources):
    first, second = map(str, sources)
    with pytest.raises(ConfigError, match="batch_size 16 is no multiple of the 3 processes"):
        open_stream(world_size=3)
    with pytest.raises(DataError, match="101 pairs, a batch takes 128 of it; lower data"):
        open_stream(train=(Source(first), Source(second)), batch_size=256)
    with pytest.raises(ConfigError, match="weight 1e-09 gives it no pair in 1000 batches"):
        open_stream(train=(Source(first), Source(second, weight=1e-9)))
    english = (Source(first, languages=("en",)), Source(second, languages=("en",)))
    with pytest.raises(DataError, match="no captions in zh, an objective needs them"):
        open_stream(train=english)


def test_a_damaged_record_is_named_and_its_pair_left_out(open_stream, sources, tmp_path):
    folder = shutil.copytree(sources[1], tmp_path / "data")
    reader = ShardReader(folder)
    offset, size = reader.index.shards[1].pairs[3]["json"]
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)
    stream = open_stream(train=str(folder), batch_size=59)
    (batch,) = stream.batches(0, 1)
    assert len(batch.keys) == 58
    ((key, reason),) = batch.dropped
    assert key == reader.keys[10]
    assert f"pair {key!r} is damaged" in reason
    assert "shard-000001.tar" in reason


def test_open_files_are_bounded_and_closed(sources):
    shards = [PackedShard.of(shard, shard.pairs) for shard in ShardReader(sources[1]).index.shards]
    before = len(os.listdir("/proc/self/fd"))
    files = ShardFiles(LocalFolder(sources[1]), shards, limit=3)
    keys = ShardReader(sources[1]).keys
    for place in range(7):  # in turns, so that each is opened again and again
        for number in range(8):
            assert files.pair(number, place).key == keys[number * 7 + place]
            files.read_ahead(Run(number, 0, 3))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del files
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_plan_names_sources_shares_and_steps(data, sources):
    assert describe_sources(data) == [
        f"{sources[0]}: 101 pairs (zh en) in 8 shards of 0.00 GB; 75.0% of each batch, 1.19 passes "
        f"per epoch, 1 lanes",
        f"{sources[1]}: 59 pairs (en) in 9 shards of 0.00 GB; 25.0% of each batch, 0.68 passes per "
        f"epoch, 1 lanes",
        "160 pairs, 10 steps of 16 per epoch, every pair once per pass",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_in_pinned_memory_where_a_gpu_is(open_stream):
    for workers in (0, 1):
        batch = next(open_stream(workers=workers).batches(0, 1))
        assert batch.pixels.is_pinned()
        assert batch.captions["zh"].ids.is_pinned()
