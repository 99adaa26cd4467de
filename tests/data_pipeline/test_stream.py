"""The training stream: order, captions, bad pairs, and what is refused before the first step.

Not what the model does with a batch: test_objectives.py and test_train.py.
"""

import io
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from m2encoder.config import Augment, Data
from m2encoder.data_pipeline.stream import TrainingStream
from m2encoder.errors import DataError
from m2encoder.images import open_image
from m2encoder.released_tokenizer import load_tokenizer
from m2encoder.shards import Pair, ShardReader, write_shards

NO_CHANGES = Augment(crop_scale_min=1, crop_ratio_max=1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder / "sp.model", max_length=24)


@pytest.fixture
def make_stream(tiny_shards, tokenizer):
    """Open a stream on the tiny scenes; keyword arguments change its settings."""

    def make(*, folder=tiny_shards / "train", seed=0, languages=("zh", "en"), **settings):
        data = replace(Data(train=str(folder), batch_size=16), **settings)
        return TrainingStream(
            data, image_size=32, tokenizer=tokenizer, languages=languages, seed=seed
        )

    return make


def picture(colour=(200, 10, 10)):
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(encoded, "PNG")
    return encoded.getvalue()


def texts_of(captions):
    """The unpadded ids of each caption."""
    return [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(captions.ids, captions.mask, strict=True)
    ]


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert [b.keys for b in ours] == [b.keys for b in theirs]
    assert [b.dropped for b in ours] == [b.dropped for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.captions.keys() == b.captions.keys()
        for language in a.captions:
            for x, y in zip(a.captions[language], b.captions[language], strict=True):
                assert torch.equal(x, y)


def test_the_same_seed_gives_the_same_batches(make_stream):
    assert_same(make_stream(seed=3).batches(0, 12), make_stream(seed=3).batches(0, 12))


def test_another_seed_gives_another_order_and_other_crops(make_stream):
    ours, theirs = (next(make_stream(seed=seed).batches(0, 1)) for seed in (3, 4))
    assert ours.keys != theirs.keys
    assert not torch.equal(ours.pixels, theirs.pixels)


@pytest.mark.parametrize("first", [1, 9, 10, 11, 20])
def test_batches_from_the_middle_equal_the_rest_of_a_full_pass(make_stream, first):
    whole = list(make_stream().batches(0, 22))
    assert_same(make_stream().batches(first, 22), whole[first:])


def test_a_worker_process_gives_the_batches_of_none(make_stream):
    # across an epoch border, from the middle
    assert_same(make_stream(workers=1).batches(8, 12), make_stream().batches(8, 12))


def test_each_epoch_takes_every_pair_once_in_another_order(make_stream, tiny_shards):
    stream = make_stream()
    assert stream.steps_per_epoch == 10
    epochs = [
        [key for batch in stream.batches(first, first + 10) for key in batch.keys]
        for first in (0, 10, 20)
    ]
    everything = sorted(ShardReader(tiny_shards / "train").keys)
    assert [sorted(keys) for keys in epochs] == [everything] * 3
    assert len({tuple(keys) for keys in [*epochs, everything]}) == 4


def test_no_remainder_is_left_out_where_the_batch_does_not_divide_the_pairs(
    make_stream, tiny_shards
):
    stream = make_stream(batch_size=60)  # 160 pairs: epochs begin within batches
    assert stream.steps_per_epoch == 2
    taken = [key for batch in stream.batches(0, 8) for key in batch.keys]
    everything = sorted(ShardReader(tiny_shards / "train").keys)
    assert [sorted(taken[i : i + 160]) for i in (0, 160, 320)] == [everything] * 3


def test_a_run_of_a_billion_steps_begins_at_once(make_stream):
    assert len(next(make_stream().batches(0, 10**9)).keys) == 16


def test_no_steps_give_no_batches(make_stream):
    assert list(make_stream().batches(5, 5)) == []


def test_a_batch_holds_uint8_pixels_and_right_padded_ids(make_stream):
    batch = next(make_stream().batches(0, 1))
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (16, 3, 32, 32)
    for captions in batch.captions.values():
        assert captions.ids.dtype == captions.mask.dtype == captions.rows.dtype == torch.int64
        assert captions.rows.tolist() == list(range(16))
        assert captions.ids.shape[1] == int(captions.mask.sum(dim=1).max())
        assert (captions.mask.diff(dim=1) <= 0).all()  # ones, then zeros
        assert (captions.ids[captions.mask == 0] == 0).all()


def test_captions_of_both_languages_belong_to_the_picture(make_stream, tiny_shards, tokenizer):
    reader = ShardReader(tiny_shards / "train")
    pairs = dict(zip(reader.keys, reader, strict=True))
    for batch in make_stream().batches(0, 10):
        for language, captions in batch.captions.items():
            for row, found in zip(captions.rows.tolist(), texts_of(captions), strict=True):
                own = pairs[batch.keys[row]].captions[language]
                assert found in {tuple(tokenizer.encode(text)) for text in own}


def test_without_augmentation_the_pixels_are_the_pictures(make_stream, tiny_shards):
    reader = ShardReader(tiny_shards / "train")
    pairs = dict(zip(reader.keys, reader, strict=True))
    batch = next(make_stream(augment=NO_CHANGES).batches(3, 4))
    for key, pixels in zip(batch.keys, batch.pixels, strict=True):
        expected = np.asarray(open_image(pairs[key].image)).transpose(2, 0, 1)
        assert np.array_equal(pixels.numpy(), expected)


def test_crops_and_captions_change_from_epoch_to_epoch(make_stream):
    stream = make_stream()
    seen: dict[str, list] = {}
    for batch in stream.batches(0, 20):
        for row, key in enumerate(batch.keys):
            text = texts_of(batch.captions["zh"])[row]
            seen.setdefault(key, []).append((batch.pixels[row], text))
    assert not any(torch.equal(first[0], second[0]) for first, second in seen.values())
    other_text = sum(first[1] != second[1] for first, second in seen.values())
    assert 40 < other_text < 120  # two captions each, so about half of 160


def test_every_caption_of_a_picture_is_drawn_about_equally_often(make_stream, tmp_path, tokenizer):
    texts = ["一只猫", "猫坐在垫子上", "一隻貓", "ＡＢＣ貓🐱"]
    pairs = [Pair(f"p{i}", picture(), {"zh": texts}) for i in range(50)]
    write_shards(pairs, tmp_path)
    stream = make_stream(folder=tmp_path, batch_size=50, languages=("zh",))
    drawn = [t for b in stream.batches(0, 8) for t in texts_of(b.captions["zh"])]
    counts = [drawn.count(tuple(tokenizer.encode(text))) for text in texts]
    assert sum(counts) == 400
    # binomial(400, 1/4): standard deviation 8.7, so this is four of them
    assert all(65 <= count <= 135 for count in counts)


def test_a_picture_may_lack_a_language(make_stream, tmp_path, tokenizer):
    captions = {
        "both": {"zh": ["红色的房子"], "en": ["a red house"]},
        "zh": {"zh": ["一只猫"]},
        "en": {"en": ["a cat"], "zh": []},
        "blank": {"zh": ["", " \u3000\n", "\t"], "en": ["a dog"]},
        "some": {"zh": ["", "狗", " "], "en": ["a dog 🐶"]},
    }
    write_shards([Pair(key, picture(), texts) for key, texts in captions.items()], tmp_path)
    batch = next(make_stream(folder=tmp_path, batch_size=5).batches(0, 1))
    expected = {"zh": {"both", "zh", "some"}, "en": {"both", "en", "blank", "some"}}
    for language, keys in expected.items():
        found = batch.captions[language]
        assert {batch.keys[row] for row in found.rows.tolist()} == keys
        for row, ids in zip(found.rows.tolist(), texts_of(found), strict=True):
            text = next(t for t in captions[batch.keys[row]][language] if t.strip())
            assert ids == tuple(tokenizer.encode(text))
    assert batch.dropped == []


def test_a_pair_without_any_text_is_dropped_with_its_key_and_reason(make_stream, tmp_path):
    empty = [{}, {"zh": []}, {"zh": ["", "\u3000"], "en": [" "]}, {"fr": ["un chat"]}]
    pairs = [Pair(f"p{i}", picture(), captions) for i, captions in enumerate(empty)]
    pairs.append(Pair("good", picture(), {"zh": ["猫"], "en": ["cat"]}))
    index = write_shards(pairs, tmp_path)
    for entry in index.shards[0].pairs:
        del entry["languages"]  # as indexes were before; now such pairs do not count at all
    index.save(tmp_path)
    batch = next(make_stream(folder=tmp_path, batch_size=5).batches(0, 1))
    assert batch.keys == ["good"]
    assert sorted(batch.dropped) == [
        (f"p{i}", f"pair 'p{i}': no caption in zh or en") for i in range(4)
    ]


def test_very_long_captions_are_cut_to_the_models_length(make_stream, tmp_path):
    pairs = [Pair(f"p{i}", picture(), {"zh": ["很长的文字。" * 20_000]}) for i in range(2)]
    write_shards(pairs, tmp_path)
    batch = next(make_stream(folder=tmp_path, batch_size=2, languages=("zh",)).batches(0, 1))
    assert batch.captions["zh"].ids.shape == (2, 24)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not a picture"),
        (picture()[:48], "damaged picture"),
    ],
    ids=["empty", "a web page", "cut"],
)
def test_an_unreadable_picture_is_dropped_with_its_key_and_reason(
    make_stream, tmp_path, image, reason
):
    pairs = [Pair(f"p{i}", picture(), {"zh": ["猫"], "en": ["cat"]}) for i in range(3)]
    write_shards([*pairs, Pair("坏的", image, {"zh": ["狗"], "en": ["dog"]})], tmp_path)
    batch = next(make_stream(folder=tmp_path, batch_size=4).batches(0, 1))
    assert sorted(batch.keys) == ["p0", "p1", "p2"]
    assert batch.pixels.shape == (3, 3, 32, 32)
    assert batch.captions["zh"].rows.tolist() == [0, 1, 2]
    ((key, found),) = batch.dropped
    assert key == "坏的"
    assert found.startswith("pair '坏的': ")
    assert reason in found


def test_a_batch_of_bad_pairs_alone_is_empty(make_stream, tmp_path):
    write_shards([Pair(f"p{i}", b"bad", {"zh": ["猫"], "en": ["cat"]}) for i in range(4)], tmp_path)
    batch = next(make_stream(folder=tmp_path, batch_size=4).batches(0, 1))
    assert batch.pixels.shape == (0, 3, 32, 32)
    assert batch.pixels.dtype == torch.uint8
    assert batch.keys == []
    assert len(batch.dropped) == 4
    assert all(len(captions.rows) == 0 for captions in batch.captions.values())


def test_leaving_out_one_language_does_not_change_the_captions_of_the_first(make_stream):
    both = next(make_stream().batches(0, 1)).captions["zh"]
    alone = next(make_stream(languages=("zh",)).batches(0, 1)).captions["zh"]
    assert texts_of(both) == texts_of(alone)


def test_fewer_pairs_than_a_batch_are_refused_with_both_numbers(make_stream):
    with pytest.raises(DataError, match=r"160 pairs, a batch takes 161; lower data\.batch_size"):
        make_stream(batch_size=161)


def test_a_language_that_no_pair_has_is_refused_before_the_first_step(make_stream, tmp_path):
    write_shards([Pair(f"p{i}", picture(), {"zh": ["猫"], "en": []}) for i in range(4)], tmp_path)
    with pytest.raises(DataError, match="no captions in en, an objective needs them"):
        make_stream(folder=tmp_path, batch_size=2)
    assert make_stream(folder=tmp_path, batch_size=2, languages=("zh",)).steps_per_epoch == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", "truncated or changed shard"),
        ("gone", "missing shard"),
        ("no index", r"missing index; write it with: m2enc data index"),
    ],
)
def test_damaged_shards_are_found_before_the_first_step(
    make_stream, tiny_shards, tmp_path, damage, said
):
    folder = shutil.copytree(tiny_shards / "train", tmp_path / "train")
    shard = folder / "shard-000000.tar"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1024])
    else:
        (shard if damage == "gone" else folder / "index.json").unlink()
    with pytest.raises(DataError, match=said) as error:
        make_stream(folder=folder)
    assert str(folder) in str(error.value)


def test_a_shard_that_disappears_while_training_drops_its_pairs(make_stream, tiny_shards, tmp_path):
    folder = shutil.copytree(tiny_shards / "train", tmp_path / "train")
    stream = make_stream(folder=folder)
    (folder / "shard-000000.tar").unlink()
    (batch,) = islice(stream.batches(0, 1), 1)
    assert batch.keys == []
    assert len(batch.dropped) == 16
    assert "missing shard" in batch.dropped[0][1]


def test_settings_of_the_stream_are_the_configurations(tiny_config, tiny_shards, tokenizer):
    settings = replace(tiny_config.data, batch_size=32)
    stream = TrainingStream(settings, image_size=32, tokenizer=tokenizer, seed=0)
    assert stream.steps_per_epoch == 5
    assert stream.languages == ("zh", "en")
