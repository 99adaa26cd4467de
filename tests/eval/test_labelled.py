"""Pictures with labels from every layout, and each mistake's line."""

import json
import pickle

import numpy as np
import pytest
from made_pictures import picture, put_lines, put_pictures, put_tar

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.datasets import read_labelled
from m2encoder.images import open_image
from m2encoder.shards import Pair, write_shards


def labelled(data):
    """Name and label of each picture, after each has been opened."""
    for i in range(len(data.pictures)):
        assert open_image(data.pictures.read(i)).mode == "RGB"
    assert len(data.pictures.content_key()) == 64
    assert pickle.loads(pickle.dumps(data.pictures)).name(0) == data.pictures.name(0)
    names = [data.pictures.name(i) for i in range(len(data.pictures))]
    return list(zip(names, [data.labels[t] for t in data.targets], strict=True))


def refused(path, message, error: type[Exception] = DataError, **options):
    with pytest.raises(error, match=message) as caught:
        read_labelled(path, **options)
    assert "\n" not in str(caught.value)


# ── a folder for each class ─────────────────────────────────────────────────────────────────────


def test_a_folder_for_each_class_sorted_by_name(tmp_path):
    put_pictures(tmp_path, ["狗/2.png", "狗/a/3.png", "n02/1.png", ".cache/x.png"])
    (tmp_path / "empty").mkdir()
    data = read_labelled(tmp_path)
    assert data.labels == ["empty", "n02", "狗"]
    assert labelled(data) == [("n02/1.png", "n02"), ("狗/2.png", "狗"), ("狗/a/3.png", "狗")]
    assert data.notes == ("1 classes have no pictures, such as empty",)


def test_folders_that_are_numbers_are_sorted_by_number(tmp_path):
    """As text, 10 comes before 2, and every class from there on would be another one."""
    put_pictures(tmp_path, [f"{k}/x.png" for k in range(12)])
    data = read_labelled(tmp_path)
    assert data.labels == [str(k) for k in range(12)]
    assert dict(labelled(data))["10/x.png"] == "10"


def test_loose_pictures_are_refused_or_counted(tmp_path):
    put_pictures(tmp_path, ["a/1.png", "b/2.png", "预览.png"])
    refused(tmp_path, r"1 of 3 pictures cannot be used, the first is 预览.png \(no label\)")
    data = read_labelled(tmp_path, on_error="skip")
    assert labelled(data) == [("a/1.png", "a"), ("b/2.png", "b")]
    assert data.tally is not None
    assert data.tally.facts() == {"in": 3, "kept": 2, "dropped": {"no label": 1}}
    assert data.facts()["skipped"] == [{"name": "预览.png", "reason": "no label"}]


def test_folders_that_are_no_classes(tmp_path):
    refused(tmp_path, "0 folders, expected one for each class with its pictures")
    put_pictures(tmp_path, ["train/a/1.png", "val/a/1.png"])
    refused(tmp_path, "holds the splits train, val; name one of the folders")
    refused(tmp_path / "train", "1 folders, expected one for each class")
    refused(tmp_path / "none", "no such file or folder, expected labelled pictures")
    (tmp_path / "x.csv").write_text("")
    refused(tmp_path / "x.csv", "expected a folder, a tar or a .jsonl of pictures and labels")


def test_class_folders_without_any_picture(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    refused(tmp_path, "no labelled pictures; check the path and the label")


def test_the_order_of_classes_can_be_asked_for(tmp_path):
    put_pictures(tmp_path, ["a/1.png", "b/2.png"])
    data = read_labelled(tmp_path, labels=["c", "b", "a"])
    assert (data.labels, data.targets.tolist()) == (["c", "b", "a"], [2, 1])
    refused(tmp_path, "label 'a' is none of the 2 classes asked for", labels=["b", "c"])


# ── shards, tars, lines ─────────────────────────────────────────────────────────────────────────


def test_labels_in_the_meta_of_our_shards(tmp_path):
    pairs = [
        Pair("a", picture(1), {}, {"colour": "红", "number": 10}),
        Pair("b", picture(2), {}, {"colour": "蓝", "number": 9}),
        Pair("c", picture(3), {}, {"number": 9}),
    ]
    write_shards(pairs, tmp_path, pairs_per_shard=2)
    colours = read_labelled(tmp_path, label_key="colour")
    assert labelled(colours) == [("a", "红"), ("b", "蓝")]
    assert colours.tally is not None
    assert colours.tally.by_reason == {"no label": 1}
    numbers = read_labelled(tmp_path, label_key="number")
    assert (numbers.labels, numbers.targets.tolist()) == (["9", "10"], [1, 0, 0])
    refused(tmp_path, "say which key of its meta holds the label", ConfigError)
    refused(tmp_path, "no labelled pictures under 'shape'; check", label_key="shape")


def test_labels_that_are_no_labels(tmp_path):
    write_shards([Pair("a", picture(), {}, {"x": {"deep": 1}})], tmp_path)
    refused(tmp_path, r"a: label \"\{'deep': 1\}\", expected a name or a number", label_key="x")


def test_foreign_tars_with_cls_or_json(tmp_path):
    put_tar(
        tmp_path / "test/0.tar",
        [
            ("s0.jpg", picture(0, "JPEG")),
            ("s0.cls", "10\n"),
            ("s1.png", picture(1)),
            ("s1.cls", "2"),
            ("s1.json", json.dumps({"label": "other", "kind": "猫"})),
        ],
    )
    data = read_labelled(tmp_path)
    assert (data.labels, labelled(data)) == (["2", "10"], [("s0", "10"), ("s1", "2")])
    refused(tmp_path, r"1 of 2 pictures cannot be used, the first is s0", label_key="kind")
    by_json = read_labelled(tmp_path, label_key="kind", on_error="skip")
    assert labelled(by_json) == [("s1", "猫")]


def test_json_lines_of_pictures_and_labels(tmp_path):
    put_pictures(tmp_path, ["1.png", "2.png"])
    records = [{"image": "1.png", "label": "猫"}, {"image": "2.png", "label": "dog"}]
    path = put_lines(tmp_path / "labels.jsonl", records)
    assert labelled(read_labelled(path)) == [("1.png", "猫"), ("2.png", "dog")]
    refused(put_lines(path, [*records, records[0]]), "1.png is listed twice; a picture has one")
    refused(put_lines(path, ["{"]), r"labels.jsonl, line 1: '\{', expected \{\"image\"")
    refused(put_lines(path, [{"image": "1.png", "label": [1]}]), "line 1: label '\\[1\\]', expect")
    gone = [*records, {"image": "3.png", "label": "x"}]
    refused(put_lines(path, gone), r"1 of 3 pictures .* first is 3.png \(missing picture\)")
    data = read_labelled(path, on_error="skip")
    assert data.tally is not None
    assert data.tally.facts() == {"in": 3, "kept": 2, "dropped": {"missing picture": 1}}


# ── CIFAR ───────────────────────────────────────────────────────────────────────────────────────


def cifar(labels, label_bytes):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    records = [bytes([7] * (label_bytes - 1) + [k]) + p.tobytes() for k, p in zip(labels, pixels)]  # noqa: B905
    return b"".join(records), pixels


@pytest.mark.parametrize(
    ("file", "names_file", "label_bytes"),
    [("test_batch.bin", "batches.meta.txt", 1), ("test.bin", "fine_label_names.txt", 2)],
)
def test_cifars_binary_version_gives_back_its_pixels(tmp_path, file, names_file, label_bytes):
    raw, pixels = cifar([2, 0, 2], label_bytes)
    (tmp_path / file).write_bytes(raw)
    assert read_labelled(tmp_path).targets.tolist() == [1, 0, 1]
    put_lines(tmp_path / names_file, ["airplane", "automobile", "bird", ""])
    data = read_labelled(tmp_path)
    stem = file.removesuffix(".bin")
    assert labelled(data) == [
        (f"{stem}-00000", "bird"),
        (f"{stem}-00001", "airplane"),
        (f"{stem}-00002", "bird"),
    ]
    assert data.labels == ["airplane", "automobile", "bird"]
    for row in range(3):
        seen = np.asarray(open_image(data.pictures.read(row)))
        assert np.array_equal(seen.transpose(2, 0, 1), pixels[row])
    with pytest.raises(IndexError):
        data.pictures.read(3)


def test_cifar_that_is_cut_off_or_has_other_names(tmp_path):
    raw, _ = cifar([9], 1)
    (tmp_path / "test_batch.bin").write_bytes(raw[:-1])
    refused(tmp_path, r"3,072 bytes, expected a multiple of 3,073; is it CIFAR's binary version")
    (tmp_path / "test_batch.bin").write_bytes(raw)
    put_lines(tmp_path / "batches.meta.txt", ["only one"])
    refused(tmp_path, "a label 9, but batches.meta.txt has 1 names; are both of the same data set")


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "meta"])
def test_pickles_are_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, f"{name} is a Python pickle, which can run any code when it is opened; take")
    assert not (tmp_path / "exploded").exists()
