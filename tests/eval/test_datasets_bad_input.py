"""Captions and pictures that cannot be read: each mistake in one line that names it."""

import base64
import gzip

import pytest
from made_pictures import picture, put_lines, put_pictures, put_tar, put_tsv

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.datasets import read_retrieval
from m2encoder.shards import Pair, write_shards

GOOD = {"image": "1.png", "captions": ["猫"]}


def refused(path, message, error: type[Exception] = DataError, **options):
    with pytest.raises(error, match=message) as caught:
        read_retrieval(path, **{"language": "zh", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "1.png"', r"captions.jsonl, line 2: not JSON \(.*\); correct it"),
        ("[1, 2]", r"line 2: '\[1, 2\]', expected \{\"image\""),
        ({"caption": "猫"}, r"line 2: has 'caption', expected 'image' with a path"),
        ({"image": 7, "caption": "猫"}, r"line 2: has 'image', 'caption', expected 'image' with"),
        ({"image": "2.png"}, r"line 2: captions are 'None', expected a text or a list of texts"),
        ({"image": "2.png", "captions": ["a", 5]}, r"line 2: captions are \"\['a', 5\]\", expect"),
        ({"text_id": 1, "text": "猫"}, r"line 2: expected 'text' and 'image_ids' beside"),
        ({"text_id": 1, "text": "猫", "image_ids": []}, r"line 2: no image_ids, so the right pict"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    put_pictures(tmp_path, ["1.png"])
    refused(put_lines(tmp_path / "captions.jsonl", [GOOD, line]), message)


@pytest.mark.parametrize("content", ["", "\n\n", '{"image": "1.png", "captions": []}\n'])
def test_no_captions_at_all(tmp_path, content):
    (tmp_path / "c.jsonl").write_text(content)
    refused(tmp_path / "c.jsonl", "no captions in zh, retrieval needs some")


def test_files_that_hold_no_captions(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes("caf\xe9".encode("latin-1"))
    refused(tmp_path / "latin.jsonl", r"cannot be read \(not UTF-8\); save it as UTF-8 text")
    (tmp_path / "o.json").write_text('{"a": 1}')
    refused(tmp_path / "o.json", "no list of captions; expected a list of records, or Karpathy's")
    (tmp_path / "k.json").write_text('{"images": [{"split": "test"}]}')
    refused(tmp_path / "k.json", r"neither Karpathy's nor COCO's format \(KeyError: 'filename'\)")
    (tmp_path / "l.json").write_text("[3]")
    refused(tmp_path / "l.json", r"l.json, entry 1: '3', expected \{\"image\"")
    (tmp_path / "c.txt").write_text("a caption alone\n")
    refused(tmp_path / "c.txt", r"c.txt, line 1: 'a caption alone', expected 'picture.jpg#0 capt")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "c.parquet", r"expected captions in .jsonl, .json, .csv, .token, .txt; conv")
    refused(tmp_path / "none.jsonl", "no such file or folder, expected captions; check the path")


def test_folders_that_hold_no_captions(tmp_path):
    refused(tmp_path, "no file of captions; expected a shard folder, webdataset tars, CN-CLIP's")
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).write_text("")
    refused(tmp_path, r"a.jsonl, b.json; expected a shard folder, .*, or one file of captions")


def test_language_is_asked_for_or_must_be_the_protocols(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    path = put_lines(tmp_path / "c.jsonl", [GOOD])
    refused(path, "does not say which language its captions are in", ConfigError, language=None)
    refused(
        path, "coco-cn/1053 is measured in zh, not in en", ConfigError, language="en",
        protocol="coco-cn/1053",
    )  # fmt: skip
    refused(path, "no protocol 'coco-cm'", ConfigError, protocol="coco-cm")


def test_data_of_another_protocol_is_refused_with_its_path(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    path = put_lines(tmp_path / "c.jsonl", [GOOD])
    refused(
        path, r"c.jsonl: coco-cn/1053: found 1 pictures and 1 captions, expected 1,000 pictures",
        protocol="coco-cn-1053",
    )  # fmt: skip
    refused(path, "imagenet/openai80 is a zero-shot protocol", language=None, protocol="imagenet")


def test_missing_picture_folders(tmp_path):
    path = put_lines(tmp_path / "c.jsonl", [GOOD])
    refused(path, "no such folder, expected the pictures", images=tmp_path / "none")
    refused(path, "1 of 1 pictures are missing, the first is 1.png below .*; name the folder of")
    refused(path, "none of its 1 pictures is there", on_error="skip")


def test_only_empty_captions_are_left(tmp_path):
    put_pictures(tmp_path, ["1.png"])
    path = put_lines(tmp_path / "c.jsonl", [GOOD | {"captions": [" "]}])
    refused(path, "1 of 1 captions are empty, the first is of 1.png")
    refused(path, "no caption is left; check the pictures and the captions", on_error="skip")


# ── tars ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", [0, 100, 1024, 1500, 3072, 4608])
def test_tars_cut_off_anywhere_are_refused(tmp_path, kept):
    path = put_tar(tmp_path / "0.tar", [(f"{i}.txt", "x" * 600) for i in range(3)])
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, r"not a complete, uncompressed tar|damaged or cut off after .* bytes; restore it")


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    """Webdataset and tarfile would return the samples before it and say nothing."""
    path = put_tar(tmp_path / "0.tar", [(f"{i}.txt", "x") for i in range(3)])
    raw = bytearray(path.read_bytes())
    raw[1024 + 10] ^= 255
    path.write_bytes(raw)
    refused(path, "damaged or cut off after 1,024 bytes; restore it")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", "猫")], "sample 'a' has txt but no picture; remove it"),
        ([("a.png", picture()), ("a.jpg", picture())], "sample 'a' has 2 pictures, expected one"),
        ([("a.png", picture()), ("a.png", picture())], "member 'a.png' is there twice"),
        ([("a.png", picture()), ("a.json", "{")], r"a.json is not JSON \(.*\); write it again"),
        ([("a.png", picture()), ("a.txt", b"\xff")], "a.txt is not UTF-8; write it again"),
        ([("a.png", picture())], "no captions in zh, retrieval needs some"),
    ],
)
def test_wrong_members_of_a_tar(tmp_path, members, message):
    refused(put_tar(tmp_path / "0.tar", members), message)


def test_tars_that_share_a_key_are_refused(tmp_path):
    for name in ("0.tar", "1.tar"):
        put_tar(tmp_path / name, [("a.png", picture()), ("a.txt", "猫")])
    refused(tmp_path, r"1.tar: sample 'a' is in another tar too; keys must differ")


def test_compressed_tars_are_to_be_unpacked(tmp_path):
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(b"x"))
    refused(path, "compressed, and so not readable in place; unpack it first")
    (tmp_path / "1.tar").write_bytes(gzip.compress(b"x"))
    refused(tmp_path / "1.tar", "not a complete, uncompressed tar")


def test_a_tar_that_shrinks_while_it_is_read(tmp_path):
    path = put_tar(tmp_path / "0.tar", [("a.txt", "猫"), ("a.png", picture())])
    data = read_retrieval(path, language="zh")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="has become shorter while it was read; restore it"):
        data.pictures.read(0)


def test_a_shard_that_is_not_what_its_index_says(tmp_path):
    write_shards([Pair("a", picture(), {"zh": ["猫"]})], tmp_path)
    tar = tmp_path / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'{"captions"', b'["captions"'))
    refused(tmp_path, r"shard-000000.tar, a: damaged, not what the index says; restore the file")


# ── CN-CLIP's files ─────────────────────────────────────────────────────────────────────────────

QUERY = {"text_id": 1, "text": "裙", "image_ids": [7]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("7 abc\n", r"valid_imgs.tsv, line 1: no tab, expected an id, a tab and base64"),
        ("7\tAAAA\n7\tAAAA\n", "picture 7 is there twice; ids must differ"),
        ("", "no pictures, expected lines of id, tab and base64"),
        ("8\tAAAA\n", "1 pictures that valid_texts.jsonl names are missing, the first is 7; are"),
    ],
)
def test_wrong_tables_of_pictures(tmp_path, table, message):
    put_lines(tmp_path / "valid_texts.jsonl", [QUERY])
    (tmp_path / "valid_imgs.tsv").write_text(table)
    refused(tmp_path, message)


def test_tables_that_are_missing_or_of_several_splits(tmp_path):
    put_lines(tmp_path / "valid_texts.jsonl", [QUERY])
    refused(tmp_path, "valid_imgs.tsv: no such file, expected the pictures of .*; name the .tsv")
    put_lines(tmp_path / "test_texts.jsonl", [QUERY | {"image_ids": []}])
    refused(tmp_path, "has splits test, valid; say which one")
    refused(tmp_path, "has no split 'dev', only test, valid", split="dev")
    put_tsv(tmp_path / "test_imgs.tsv", {"7": picture()})
    refused(tmp_path, "take a split whose answers are public", split="test")
    put_tsv(tmp_path / "valid_imgs.tsv", {"7": picture()})
    assert read_retrieval(tmp_path, language="zh", split="valid").texts == ["裙"]


def test_both_base64_alphabets_are_read_and_nothing_else(tmp_path):
    put_lines(tmp_path / "valid_texts.jsonl", [QUERY])
    raw = picture() + bytes([251, 255, 190] * 3)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        (tmp_path / "valid_imgs.tsv").write_bytes(b"7\t" + encode(raw) + b"\r\n")
        data = read_retrieval(tmp_path, language="zh")
        assert data.pictures.read(0) == raw
    (tmp_path / "valid_imgs.tsv").write_text("7\t不是 base64\n")
    with pytest.raises(DataError, match="picture 7 is not base64; write it again"):
        read_retrieval(tmp_path, language="zh").pictures.read(0)
