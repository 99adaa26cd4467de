"""Test pictures and captions put into training data are found, and nothing else.

Not for the parts: tests/test_image_hash.py, test_caption_overlap.py.
"""

import io
import json
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
from made_pictures import put_lines, put_tar
from PIL import Image

from m2encoder.cli.contamination import contamination
from m2encoder.data_pipeline.scenes import make_scenes
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.contamination import BATCH, KEPT_MATCHES, Ways, check_contamination
from m2encoder.eval.contamination_data import TestSet, TrainItem, TrainItems, open_test, total
from m2encoder.eval.protocols import MatchedProtocol, get_protocol
from m2encoder.eval.results import load
from m2encoder.pictures import ListedBytes
from m2encoder.shards import Pair, ShardReader, write_shards


def again(image, *, quality=70, scale=0.8):
    """The picture scaled and encoded as JPEG."""
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    size = round(picture.width * scale), round(picture.height * scale)
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Train and test scenes of 64 pixels: more alike than photographs ever are."""
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, seed=0, train_pairs=400, test_pairs=100, size_px=64)
    return folder


@pytest.fixture(scope="module")
def test_pairs(scenes):
    return list(ShardReader(scenes / "test"))


@pytest.fixture(scope="module")
def planted(scenes, test_pairs, tmp_path_factory):
    """The train shards with 5 % of the test pictures among them, encoded again; their rows."""
    rows = sorted(random.Random(0).sample(range(len(test_pairs)), len(test_pairs) // 20))
    extra = [
        Pair(f"planted-{row}", again(test_pairs[row].image), {"zh": ["别的"]}, {}, "jpg")
        for row in rows
    ]
    folder = tmp_path_factory.mktemp("planted")
    pairs = [*ShardReader(scenes / "train"), *extra]
    random.Random(1).shuffle(pairs)
    write_shards(pairs, folder, pairs_per_shard=150)
    return folder, rows


def check(train, test, ways=None, **options):
    return check_contamination(TrainItems(train), open_test(test), ways or Ways(), **options)


def listed(images, captions=()):
    """A test set of pictures in memory; captions: (text, owner) pairs."""
    names = [f"测试-{row}" for row in range(len(images))]
    texts, owner = [text for text, _ in captions], [row for _, row in captions]
    return TestSet(ListedBytes(names, images), texts, np.asarray(owner, np.int64))


# --- the planted fault ---------------------------------------------------------------------------


def test_five_percent_of_the_test_pictures_in_train_are_found_and_no_others(scenes, planted):
    folder, rows = planted
    found = check(folder, scenes / "test")
    assert np.flatnonzero(found.image_mask).tolist() == rows
    assert {found.images.matches[row][0].key for row in rows} == {f"planted-{row}" for row in rows}
    metrics = found.output().metrics
    assert metrics["image_share"].value == 0.05
    assert metrics["image_copy_share"].n == 100
    assert metrics["image_file_share"].value == 0


def test_clean_train_data_has_no_hits(scenes):
    found = check(scenes / "train", scenes / "test")
    assert not found.image_mask.any()
    assert found.facts()["hits"] == 0
    assert found.facts()["checked"]


def test_the_test_set_itself_is_found_whole(scenes):
    found = check(scenes / "test", scenes / "test")
    assert found.images.mask("file").all()
    assert found.caption_mask.all()


def test_val_scenes_of_the_same_captions_are_other_pictures(scenes):
    """val repeats attribute sets of train in new pictures: same words, same layout."""
    found = check(scenes / "train", scenes / "val")
    assert not found.image_mask.any()
    assert found.caption_mask.any()


# --- what is found -------------------------------------------------------------------------------


def test_captions_match_in_other_clothes_and_other_languages(test_pairs):
    captions = [
        ("一只　黑猫。", 0),
        ("Ａ Black CAT", 0),
        ("🐈", 1),
        ("", 1),
        ("另一只", 1),
        ("繁體", 1),
    ]
    test = listed([test_pairs[0].image, test_pairs[1].image], captions)
    train = [
        TrainItem("a", test_pairs[2].image, ["a black cat", "一只 黑猫。"]),
        TrainItem("b", test_pairs[3].image, ["🐈", "", "x" * 10_000, "简体"]),
    ]
    found = check_contamination(train, test)
    assert found.caption_mask.tolist() == [True, True, True, False, False, False]
    assert [match.key for match in found.captions.matches[2]] == ["b"]


def test_near_captions_are_found_only_when_asked_for(test_pairs):
    test = listed([test_pairs[0].image], [("一只黑色的猫坐在窗台上看着外面的雪", 0)])
    train = [TrainItem("a", test_pairs[2].image, ["一只黑色的猫坐在窗台上看外面的雪"])]
    assert not check_contamination(train, test).caption_mask.any()
    found = check_contamination(train, test, Ways(near_captions=0.6))
    assert found.captions.mask("near").tolist() == [True]
    assert not found.caption_mask.any()
    assert found.output().metrics["caption_near_share"].value == 1


def test_alike_vectors_are_found_and_the_threshold_is_judged(tiny_encoder, scenes, planted):
    folder, rows = planted
    found = check(folder, scenes / "test", Ways(tiny_encoder, min_cosine=0.998))
    cosines = found.details["embedding"]
    assert set(np.flatnonzero(found.images.mask("embedding"))) & set(rows)
    assert 0 <= cosines["test_pairs_above"] <= 1
    assert cosines["nearest_cosine"]["p50"] <= cosines["nearest_cosine"]["max"] <= 1 + 1e-6
    everything = check(folder, scenes / "test", Ways(tiny_encoder, min_cosine=-1))
    assert everything.images.mask("embedding").all()
    assert np.flatnonzero(everything.image_mask).tolist() == rows  # alike is not contaminated
    assert everything.details["embedding"]["test_pairs_above"] == 1


def test_alike_vectors_equal_a_loop_over_all_pairs(tiny_encoder, test_pairs):
    images = [pair.image for pair in test_pairs]
    train = [TrainItem(pair.key, pair.image, []) for pair in test_pairs[40:]]
    found = check_contamination(train, listed(images[:40]), Ways(tiny_encoder, min_cosine=0.99))
    vectors = tiny_encoder.encode_image(images).astype(np.float64)
    expected = vectors[:40] @ vectors[40:].T > 0.99
    assert expected.any()
    assert np.array_equal(found.images.counts["embedding"], expected.sum(axis=1))


def test_every_match_is_counted_but_few_are_kept(test_pairs):
    train = [TrainItem(f"t{k}", test_pairs[5].image, ["同样的话"]) for k in range(BATCH + 10)]
    found = check_contamination(train, listed([test_pairs[5].image], [("同样的话", 0)]))
    assert found.images.counts["file"].tolist() == [BATCH + 10]
    assert len(found.images.matches[0]) == KEPT_MATCHES
    assert found.details["images"][0]["count"] == BATCH + 10
    assert found.captions.counts["same"].tolist() == [BATCH + 10]


class Captions(list):
    """A list that can be watched."""


def test_training_data_is_not_kept(test_pairs):
    """Two batches at most: one is compared, the next one is being read."""
    watched: list[weakref.ref[Captions]] = []
    most = 0

    def stream():
        nonlocal most
        for k in range(5 * BATCH):
            captions = Captions([f"第{k}句"])
            watched.append(weakref.ref(captions))
            most = max(most, sum(each() is not None for each in watched[-3 * BATCH :]))
            yield TrainItem(f"t{k}", b"", captions)

    found = check_contamination(stream(), listed([test_pairs[0].image]))
    assert found.details["train"]["pairs"] == 5 * BATCH
    assert most <= 2 * BATCH + 1


# --- bad data ------------------------------------------------------------------------------------


def test_unreadable_pictures_are_counted_by_reason(test_pairs):
    test = listed([test_pairs[0].image, b"", b"no picture", test_pairs[1].image])
    train = [TrainItem(f"t{k}", content, []) for k, content in enumerate([b"", b"x", b"y"])]
    train.append(TrainItem("good", test_pairs[1].image, []))
    found = check_contamination(train, test)
    assert [bad.name for bad in found.unread] == ["测试-1", "测试-2"]
    assert found.details["test"]["unread"] == {
        "empty file, expected an encoded picture": 1,
        "not a picture that Pillow can read": 1,
    }
    assert sum(found.details["train"]["unread"].values()) == 3
    assert found.image_mask.tolist() == [False, False, False, True]
    assert found.output().metrics["image_share"].n == 2


def test_captions_alone_are_looked_for_where_no_picture_is_there(tiny_encoder, test_pairs):
    test = listed([b""], [("一只黑猫", 0), ("别的", 0)])
    train = [TrainItem("a", test_pairs[0].image, ["一只黑猫"])]
    found = check_contamination(train, test, Ways(tiny_encoder))
    assert found.caption_mask.tolist() == [True, False]
    assert found.output().metrics["image_share"].n == 0


def test_plain_test_pictures_are_counted(test_pairs):
    plain = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(plain, "PNG")
    found = check_contamination(
        [TrainItem("a", again(plain.getvalue()), [])], listed([plain.getvalue()])
    )
    assert found.details["test"]["too_plain_for_copies"] == 1
    assert not found.image_mask.any()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([TrainItem("a", b"", [])], [], "no pictures, expected a test set"),
        ([], [b"x"], "none of its 1 pictures can be read, the first is 测试-0: not a picture"),
        ([], None, "no training pairs, expected at least one"),
    ],
)
def test_nothing_to_compare_is_an_error(train, test, message, test_pairs):
    pictures = [test_pairs[0].image] if test is None else test
    with pytest.raises(DataError, match=message):
        check_contamination(train, listed(pictures))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_cosine": 1.5}, "cosine is 1.5, expected -1 to 1"),
        ({"near_captions": 0.0}, "near-captions is 0.0, expected a share above 0, at most 1"),
        ({"near_captions": float("nan")}, "near-captions is nan"),
    ],
)
def test_thresholds_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Ways(**options)


# --- where data comes from -----------------------------------------------------------------------


def test_training_data_comes_from_shards_tars_and_folders(scenes, test_pairs, tmp_path):
    put_tar(
        tmp_path / "tars/00000.tar",
        [
            ("甲.jpg", again(test_pairs[0].image)),
            ("甲.json", json.dumps({"caption": "图一", "url": "x"})),
            ("乙.png", test_pairs[1].image),
            ("乙.txt", "第一行\nsecond line\n"),
            ("丙.txt", "没有图"),
        ],
    )
    items = list(TrainItems(tmp_path / "tars"))
    assert [(item.key, item.captions) for item in items] == [
        ("甲", ["图一"]),
        ("乙", ["第一行", "second line"]),
        ("丙", ["没有图"]),
    ]
    folder = tmp_path / "pictures/子"
    folder.mkdir(parents=True)
    (folder / "一.png").write_bytes(test_pairs[1].image)
    (item,) = TrainItems(tmp_path / "pictures")
    assert item == ("子/一.png", test_pairs[1].image, [])
    assert total([TrainItems(tmp_path / "pictures"), TrainItems(scenes / "train")]) == 401
    assert total([TrainItems(tmp_path / "tars"), TrainItems(scenes / "train")]) is None


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_path_without_data_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{name}: "):
        TrainItems(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: "):
        open_test(tmp_path / name)


def test_a_test_set_comes_from_shards_captions_tars_or_pictures(scenes, test_pairs, tmp_path):
    shards = open_test(scenes / "test")
    texts = sum(len(t) for pair in test_pairs for t in pair.captions.values())
    assert (len(shards.pictures), len(shards.texts)) == (100, texts)
    assert shards.texts[0] in test_pairs[shards.owner[0]].captions["zh"] + [
        *test_pairs[shards.owner[0]].captions["en"]
    ]
    folder = tmp_path / "images"
    folder.mkdir()
    for row in (0, 1):
        (folder / f"{row}.png").write_bytes(test_pairs[row].image)
    pictures = open_test(folder)
    assert (len(pictures.pictures), pictures.texts, pictures.protocol) == (2, [], None)
    records = [{"image": f"{row}.png", "captions": ["一", f"图{row}"]} for row in (0, 1, 2)]
    file = put_lines(tmp_path / "captions.jsonl", records)
    captioned = open_test(file, images=folder)
    assert captioned.missing == {2}
    assert captioned.owner.tolist() == [0, 0, 1, 1, 2, 2]
    found = check_contamination(TrainItems(scenes / "test"), captioned)
    assert found.image_mask.tolist() == [True, True, False]
    assert [bad.reason for bad in found.unread] == ["missing picture"]
    with pytest.raises(ConfigError, match="so --images has no use"):
        open_test(folder, images=folder)


def test_known_overlaps_of_a_recognised_protocol_are_stated(test_pairs):
    known = get_protocol("flickr30k-cn/5k")
    verified = MatchedProtocol(known.id, "verified", known.checksum or "", known.expected, {})
    test = replace(listed([test_pairs[0].image]), protocol=verified)
    found = check_contamination([TrainItem("a", test_pairs[1].image, [])], test)
    (stated,) = found.details["known_overlaps"]
    assert "905 of the 1,000 test pictures" in stated
    assert listed([test_pairs[0].image]).known_overlaps == ()


# --- the command ---------------------------------------------------------------------------------


def test_command_reports_and_writes_masks(scenes, planted, tmp_path, capsys):
    folder, rows = planted
    assert contamination(train=[folder, scenes / "val"], test=scenes / "test", out=tmp_path) == 0
    shown = capsys.readouterr().out
    assert "505 training pairs" not in shown
    assert f"planted-{rows[0]}" in shown
    (path,) = tmp_path.glob("contamination__*.json")
    result = load(path)
    assert np.flatnonzero(result.ranks["image_found"]).tolist() == rows
    assert result.contamination["hits"] == len(rows)
    assert result.settings["train"] == [str(folder), str(scenes / "val")]
    assert [each["name"] for each in result.details["images"]] == [
        f"test-{row:06d}" for row in rows
    ]


def test_command_prints_json_and_returns_4_where_pictures_are_left_out(
    scenes, test_pairs, tmp_path, capsys
):
    pairs = [Pair("好", test_pairs[0].image, {}), Pair("坏", b"no picture", {})]
    write_shards(pairs, tmp_path)
    assert contamination(train=[scenes / "test"], test=tmp_path, json=True) == 4
    shown = capsys.readouterr()
    [result] = json.loads(shown.out)
    assert result["metrics"]["image_share"]["value"] == 1
    assert "坏" in shown.err


def test_command_tells_how_cosines_lie(scenes, tiny_model_folder, capsys):
    options = {"model": str(tiny_model_folder), "cosine": 0.999}
    assert contamination(train=[scenes / "val"], test=scenes / "test", **options) == 0
    shown = capsys.readouterr().out
    assert "cosine above 0.999" in shown
    assert "pairs of different test pictures are as much alike" in shown
