"""Captions and their pictures, read from every layout that users have, and each mistake's line."""

import json
import pickle
from pathlib import Path

import pytest
from made_pictures import picture, put_lines, put_pictures, put_tar, put_tsv

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.datasets import read_retrieval
from m2encoder.images import open_image
from m2encoder.shards import Pair, write_shards

OFFICIAL = Path(__file__).resolve().parents[3] / "shared/data/official"
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the released annotation files are not beside this checkout"
)
ODD = ["雪山，日落。", "龍貓", "ＡＢＣ", "🐼🎋", "长" * 10_000, "line\u2028separator"]


def check(data, images, texts):
    """Hold what was read to what must come of it, and every picture to being readable."""
    names = [data.pictures.name(i) for i in range(len(data.pictures))]
    assert names == images
    assert [(names[o], t) for o, t in zip(data.owner, data.texts, strict=True)] == texts
    assert len(data.pictures.content_key()) == 64
    assert pickle.loads(pickle.dumps(data.pictures)).name(0) == images[0]
    for i in range(len(data.pictures)):
        assert open_image(data.pictures.read(i)).size == (4, 4)


# ── the released files ──────────────────────────────────────────────────────────────────────────


@needs_official
@pytest.mark.parametrize(
    ("name", "protocol", "language", "images", "texts"),
    [
        ("coco_caption_karpathy_test.jsonl", "coco/karpathy-25010", "en", 5000, 25010),
        ("coco_caption_karpathy_test.jsonl", "coco/karpathy-25000", "en", 5000, 25000),
        ("coco-cn_test.jsonl", "coco-cn/1053", "zh", 1000, 1053),
        ("f30k-cn_test.jsonl", "flickr30k-cn/5k", "zh", 1000, 5000),
        ("f30k_caption_karpathy_test.jsonl", "flickr30k/m2-1k", "en", 1000, 1000),
    ],
)
def test_released_files_load_under_their_protocols(
    tmp_path, name, protocol, language, images, texts
):
    for line in (OFFICIAL / name).read_text(encoding="utf-8").splitlines():
        path = tmp_path / Path(json.loads(line)["image"]).name  # the folder lacks leading parts
        path.write_bytes(b"-")
    data = read_retrieval(OFFICIAL / name, images=tmp_path, protocol=protocol)
    assert (data.protocol.id, data.protocol.status) == (protocol, "verified")
    assert (len(data.pictures), len(data.texts), data.language) == (images, texts, language)
    assert data.captions_per_image == dict(data.protocol.found["captions_per_image"])
    cut = [note for note in data.protocol.notes if note.startswith("cut to the first 5 captions")]
    assert cut == (["cut to the first 5 captions of each picture, 10 left out"] * (texts == 25000))
    if protocol != "coco/karpathy-25000":
        again = read_retrieval(OFFICIAL / name, images=tmp_path)
        assert (again.protocol.id, again.language) == (protocol, language)


# ── every layout ────────────────────────────────────────────────────────────────────────────────


def test_json_lines_with_lists_and_with_a_line_for_each_caption(tmp_path):
    put_pictures(tmp_path, ["a/1.png", "二.png"])
    path = put_lines(
        tmp_path / "captions.jsonl",
        [
            {"image": "a/1.png", "captions": ODD[:3]},
            {"image": "二.png", "caption": ODD[3]},
            "",
            {"image": "二.png", "caption": ODD[4]},
        ],
    )
    texts = [*(("a/1.png", text) for text in ODD[:3]), ("二.png", ODD[3]), ("二.png", ODD[4])]
    check(read_retrieval(path, language="zh"), ["a/1.png", "二.png"], texts)
    check(read_retrieval(tmp_path, language="zh"), ["a/1.png", "二.png"], texts)


def test_a_line_separator_inside_a_caption_is_no_end_of_line(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    path = put_lines(tmp_path / "c.jsonl", [{"image": "1.png", "caption": ODD[5]}])
    assert read_retrieval(path, language="en").texts == [ODD[5]]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    path = tmp_path / "c.jsonl"
    path.write_text('{"image": "1.png", "caption": "猫"}\r\n', encoding="utf-8-sig")
    assert read_retrieval(path, language="zh").texts == ["猫"]


def test_languages_are_told_apart_by_lang_and_by_key(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    by_lang = put_lines(
        tmp_path / "a.jsonl",
        [
            {"image": "1.png", "captions": ["雪"], "lang": "zh"},
            {"image": "1.png", "captions": ["snow"], "lang": "en"},
        ],
    )
    by_key = put_lines(
        tmp_path / "b.jsonl", [{"image": "1.png", "captions": {"zh": ["雪"], "en": ["snow"]}}]
    )
    for path in (by_lang, by_key):
        assert read_retrieval(path, language="zh").texts == ["雪"]
        assert read_retrieval(path, language="en").texts == ["snow"]
        with pytest.raises(ConfigError, match="say which language"):
            read_retrieval(path)
    with pytest.raises(DataError, match="no captions in ja"):
        read_retrieval(by_lang, language="ja")
    one = put_lines(tmp_path / "c.jsonl", [{"image": "1.png", "captions": ["雪"], "lang": "zh"}])
    assert read_retrieval(one).language == "zh"
    one = put_lines(tmp_path / "d.jsonl", [{"image": "1.png", "captions": {"en": ["snow"]}}])
    assert read_retrieval(one).language == "en"
    with pytest.raises(DataError, match="no captions in zh, it has en"):
        read_retrieval(one, language="zh")


def test_karpathys_and_cocos_json(tmp_path):
    put_pictures(tmp_path, ["val2014/1.png", "val2014/2.png"])
    entry = {"filepath": "val2014", "sentences": [{"raw": "a cat "}, {"raw": "it"}]}
    karpathy = tmp_path / "karpathy.json"
    karpathy.write_text(
        json.dumps({"images": [
            entry | {"filename": "1.png", "split": "test"},
            entry | {"filename": "2.png", "split": "val"},
        ]})
    )  # fmt: skip
    data = read_retrieval(karpathy, language="en")
    check(data, ["val2014/1.png"], [("val2014/1.png", "a cat "), ("val2014/1.png", "it")])
    assert read_retrieval(karpathy, language="en", split="val").pictures.name(0) == "val2014/2.png"
    with pytest.raises(DataError, match="no pictures of split 'dev'; it has test, val"):
        read_retrieval(karpathy, language="en", split="dev")
    coco = tmp_path / "coco.json"
    images = [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}]
    coco.write_text(
        json.dumps({"images": images, "annotations": [{"image_id": 8, "caption": "a dog"}]})
    )
    data = read_retrieval(coco, images=tmp_path / "val2014", language="en")
    check(data, ["1.png", "2.png"], [("2.png", "a dog")])
    assert data.captions_per_image == {"0": 1, "1": 1}


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (["1.png#0\tTwo men", "1.png#1\tA, b"], ["Two men", "A, b"]),
        (["1#zhm#0 两个男人", "1#zhm#1 街上"], ["两个男人", "街上"]),
        (["image,caption", '1.png,"A ""big"" dog"', "1.png,x.jpg, y"], ['A "big" dog', "x.jpg, y"]),
        (["1.png,in 1.png,2.png"], ["in 1.png,2.png"]),
    ],
)
def test_lines_of_flickr_and_of_clip_benchmark(tmp_path, lines, texts):
    names = ["1.jpg"] if "#zhm" in lines[0] else ["1.png"]
    put_pictures(tmp_path, names)
    data = read_retrieval(put_lines(tmp_path / "captions.txt", lines), language="zh")
    check(data, names, [(names[0], text) for text in texts])


def test_xtd_and_crossmodal_3600_as_released(tmp_path):
    put_pictures(tmp_path, ["a.jpg", "b.jpg"])
    put_lines(tmp_path / "test_image_names.txt", ["a.jpg", "b.jpg"])
    xtd = put_lines(tmp_path / "test_1kcaptions_zh.txt", ["一只猫", "一只狗"])
    check(
        read_retrieval(xtd, language="zh"), ["a.jpg", "b.jpg"],
        [("a.jpg", "一只猫"), ("b.jpg", "一只狗")],
    )  # fmt: skip
    record = {"image/key": "a", "zh": {"caption": ["猫", "一猫"]}, "en": {"caption": ["cat"]}}
    xm = put_lines(tmp_path / "captions.jsonl", [record])
    check(read_retrieval(xm, language="zh"), ["a.jpg"], [("a.jpg", "猫"), ("a.jpg", "一猫")])
    put_lines(xtd, ["一只猫"])
    with pytest.raises(DataError, match=r"1 captions for 2 names in test_image_names.txt"):
        read_retrieval(xtd, language="zh")


def test_our_shards_keep_pictures_without_captions_as_candidates(tmp_path):
    pairs = [
        Pair("a", picture(1), {"zh": ["猫", "一只猫"], "en": ["cat"]}),
        Pair("b", picture(2), {"en": ["dog"]}),
    ]
    write_shards(pairs, tmp_path, pairs_per_shard=1)
    zh = read_retrieval(tmp_path, language="zh")
    check(zh, ["a", "b"], [("a", "猫"), ("a", "一只猫")])
    assert zh.captions_per_image == {"0": 1, "2": 1}
    en = read_retrieval(tmp_path, language="en")
    check(en, ["a", "b"], [("a", "cat"), ("b", "dog")])
    assert zh.pictures.content_key() == en.pictures.content_key()
    with pytest.raises(DataError, match=r"no captions in ja; it has captions in en \(2\), zh \(2"):
        read_retrieval(tmp_path, language="ja")
    with pytest.raises(DataError, match="say which language; it has captions in en"):
        read_retrieval(tmp_path)


def test_foreign_tars_with_text_or_json_members(tmp_path):
    put_tar(
        tmp_path / "0.tar",
        [
            ("x/1.jpg", picture(1, "JPEG")),
            ("x/1.txt", "a cat\nwith, hat\n\n"),
            ("2.png", picture(2)),
        ],
    )
    put_tar(
        tmp_path / "1.tar",
        [
            ("3.png", picture(3)),
            ("3.json", json.dumps({"caption": "熊猫", "url": "x"})),
            ("3.txt", "not this one"),
            ("4.webp", picture(4, "WEBP")),
            ("4.json", json.dumps({"width": 4})),
            ("4.txt", "one"),
        ],
    )
    data = read_retrieval(tmp_path, language="en")
    check(
        data, ["x/1", "2", "3", "4"],
        [("x/1", "a cat"), ("x/1", "with, hat"), ("3", "熊猫"), ("4", "one")],
    )  # fmt: skip
    one = read_retrieval(tmp_path / "0.tar", language="en")
    assert one.texts == data.texts[:2]
    assert one.pictures.content_key() != data.pictures.content_key()


def test_muge_with_several_pictures_for_a_text_and_every_picture_a_candidate(tmp_path):
    put_tsv(tmp_path / "valid_imgs.tsv", {"7": picture(1), "8": picture(2), "9": picture(3)})
    put_lines(
        tmp_path / "valid_texts.jsonl",
        [
            {"text_id": 1, "text": "高级感托特包斜挎", "image_ids": [9, 7]},
            {"text_id": 2, "text": "红色连衣裙", "image_ids": [7]},
        ],
    )
    data = read_retrieval(tmp_path, protocol="muge/valid")
    check(data, ["7", "8", "9"], [("9", "高级感托特包斜挎"), ("7", "红色连衣裙")])
    assert data.also.tolist() == [[0, 0]]
    pictures, texts = data.right_pairs
    assert sorted(zip(pictures.tolist(), texts.tolist(), strict=True)) == [(0, 0), (0, 1), (2, 0)]
    assert data.captions_per_image == {"0": 1, "1": 1, "2": 1}
    assert data.protocol.status == "unverified"


# ── what is left out is counted ─────────────────────────────────────────────────────────────────


def test_missing_pictures_and_empty_captions_are_refused_or_counted(tmp_path):
    put_pictures(tmp_path, ["1.png", "2.png"])
    path = put_lines(
        tmp_path / "c.jsonl",
        [
            {"image": "gone.png", "captions": ["丢了", "lost"]},
            {"image": "1.png", "captions": ["猫", " \u3000"]},
            {"image": "2.png", "captions": ["狗"]},
        ],
    )
    with pytest.raises(
        DataError, match=r"1 of 3 pictures are missing, the first is gone.png below"
    ):
        read_retrieval(path, language="zh")
    data = read_retrieval(path, language="zh", on_error="skip")
    check(data, ["1.png", "2.png"], [("1.png", "猫"), ("2.png", "狗")])
    assert data.images_tally and data.texts_tally  # noqa: PT018
    assert data.images_tally.facts() == {"in": 3, "kept": 2, "dropped": {"missing picture": 1}}
    assert data.texts_tally.facts() == {
        "in": 5, "kept": 2, "dropped": {"its picture is missing": 2, "empty caption": 1},
    }  # fmt: skip
    assert data.protocol.notes[-1] == "1 of 3 pictures and 3 of 5 captions were left out"
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert {"name": "gone.png", "reason": "missing picture"} in facts["skipped"]
    (tmp_path / "gone.png").write_bytes(picture())
    with pytest.raises(
        DataError, match=r"1 of 5 captions are empty, the first is of 1.png; correct"
    ):
        read_retrieval(path, language="zh")


@needs_official
def test_a_verified_protocol_with_missing_pictures_is_verified_no_longer(tmp_path):
    source = OFFICIAL / "coco-cn_test.jsonl"
    names = [json.loads(line)["image"] for line in source.read_text("utf-8").splitlines()]
    for name in names[3:]:
        (tmp_path / Path(name).name).write_bytes(b"-")
    data = read_retrieval(source, images=tmp_path, protocol="coco-cn/1053", on_error="skip")
    assert data.protocol.status == "unverified"
    assert data.protocol.notes[-1].startswith("3 of 1,000 pictures and 3 of 1,053 captions were")


def test_a_missing_picture_of_several_leaves_the_text_its_others(tmp_path):
    put_tsv(tmp_path / "valid_imgs.tsv", {"7": picture(1)})
    put_lines(tmp_path / "valid_texts.jsonl", [{"text_id": 1, "text": "裙", "image_ids": [7, 6]}])
    with pytest.raises(
        DataError, match=r"1 pictures that valid_texts.jsonl names are missing, .* 6"
    ):
        read_retrieval(tmp_path, protocol="muge")


def test_pictures_listed_twice_are_put_together_and_noted(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    record = {"image": "1.png", "captions": ["猫"]}
    path = put_lines(tmp_path / "c.jsonl", [record, record | {"captions": ["一只猫"]}])
    data = read_retrieval(path, language="zh")
    check(data, ["1.png"], [("1.png", "猫"), ("1.png", "一只猫")])
    assert "1 pictures are listed more than once, such as 1.png" in data.protocol.notes[-1]


def test_names_are_found_below_the_folder_without_their_leading_parts(tmp_path):
    put_pictures(tmp_path / "pictures", ["val/1.png", "2.png"])
    path = put_lines(
        tmp_path / "c.jsonl",
        [{"image": f"coco/val/{n}.png", "captions": ["x"]} for n in (1, 2)],
    )
    data = read_retrieval(path, images=tmp_path / "pictures", language="en")
    assert len(data.pictures) == 2
    assert open_image(data.pictures.read(0)).size == (4, 4)


def test_two_names_that_would_be_one_file_are_refused(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    path = put_lines(
        tmp_path / "c.jsonl",
        [{"image": f"{split}/1.png", "captions": ["x"]} for split in ("train", "val")],
    )
    with pytest.raises(DataError, match=r"both train/1.png and val/1.png would be this file; keep"):
        read_retrieval(path, language="en")
