"""Samples of a bad step are kept as they were, and bad steps are counted in a row.

Not what the loop does then: test_train.py.
"""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_batches import make_batch

from m2encoder.bad_steps import MAX_PICTURES, BadSteps, write_bad_samples

TEXTS = {
    "zh": ["一只猫，坐着", None, "繁體貓𠮷🐱", "", "长" * 10_000],
    "en": [None, "a ｆｕｌｌ-width dog", "a \ud800 lone surrogate", "x", "y"],
}


@pytest.fixture
def batch():
    batch = make_batch(TEXTS, first=160)
    batch.texts = {
        language: [text for text in texts if text is not None] for language, texts in TEXTS.items()
    }
    return batch


def written(folder, rank=0):
    return json.loads((folder / f"rank-{rank:05d}.json").read_text("utf-8"))


def test_samples_are_written_with_their_texts_keys_and_places(batch, tmp_path):
    folder = write_bad_samples(tmp_path, 12, 3, batch, [2, 1], "loss nan")
    assert folder == tmp_path / "bad-steps/step-00000012"
    record = written(folder, rank=3)
    assert (record["step"], record["rank"], record["reason"]) == (12, 3, "loss nan")
    assert record["samples"] == [
        {
            "row": 2, "key": "k2", "position": 162,
            "texts": {"zh": "繁體貓𠮷🐱", "en": "a \ud800 lone surrogate"},
            "picture": "rank-00003-row-00002.png",
        },
        {
            "row": 1, "key": "k1", "position": 161,
            "texts": {"en": "a ｆｕｌｌ-width dog"}, "picture": "rank-00003-row-00001.png",
        },
    ]  # fmt: skip


def test_chinese_stays_readable_in_the_file(batch, tmp_path):
    folder = write_bad_samples(tmp_path, 1, 0, batch, [0], "")
    assert "一只猫，坐着" in (folder / "rank-00000.json").read_text("utf-8")


def test_pictures_are_what_the_model_saw(batch, tmp_path):
    folder = write_bad_samples(tmp_path, 1, 0, batch, [4], "")
    with Image.open(folder / "rank-00000-row-00004.png") as picture:
        assert np.array_equal(np.asarray(picture), batch.pixels[4].permute(1, 2, 0).numpy())


def test_all_samples_are_written_when_nobody_knows_which(batch, tmp_path):
    folder = write_bad_samples(tmp_path, 1, 0, batch, None, "")
    assert [sample["key"] for sample in written(folder)["samples"]] == batch.keys
    assert len(list(folder.glob("*.png"))) == 5


def test_of_many_samples_all_are_named_and_some_shown(tmp_path):
    count = MAX_PICTURES + 3
    batch = make_batch({"zh": ["猫"] * count})
    batch.texts = {"zh": ["猫"] * count}
    folder = write_bad_samples(tmp_path, 1, 0, batch, None, "")
    samples = written(folder)["samples"]
    assert len(samples) == count
    assert [sample["picture"] for sample in samples[MAX_PICTURES:]] == [None] * 3
    assert len(list(folder.glob("*.png"))) == MAX_PICTURES


def test_ranks_write_side_by_side(batch, tmp_path):
    for rank in (0, 1):
        folder = write_bad_samples(tmp_path, 1, rank, batch, [rank], f"rank {rank}")
    assert [written(folder, rank)["reason"] for rank in (0, 1)] == ["rank 0", "rank 1"]
    assert len(list(folder.glob("*.png"))) == 2


def test_a_batch_of_nothing_is_written_too(tmp_path):
    batch = make_batch({"zh": [None]})
    batch.keys, batch.texts = [], {"zh": []}
    folder = write_bad_samples(tmp_path, 1, 0, batch, None, "gradient inf")
    assert written(folder)["samples"] == []


def test_a_folder_that_cannot_be_written_is_a_warning(batch, tmp_path, caplog):
    (tmp_path / "bad-steps").write_text("in the way")
    write_bad_samples(tmp_path, 1, 0, batch, None, "")
    assert "step-00000001: cannot be written (Not a directory)" in caplog.text


@pytest.mark.parametrize(
    ("limit", "steps", "rewinds"),
    [
        (3, "bbb", "--r"),
        (3, "bbgbbb", "-----r"),
        (3, "bbbbbb", "--r--r"),
        (1, "gbgb", "-r-r"),
        (2, "bgbgbg", "------"),
    ],
)
def test_a_rewind_is_due_after_so_many_bad_steps_in_a_row(limit, steps, rewinds):
    counter = BadSteps(limit)
    found = ""
    for step in steps:
        is_due = counter.bad() if step == "b" else counter.good()
        found += "r" if is_due else "-"
    assert found == rewinds
