"""Texts against themselves written otherwise: by hand, by loops, with a real model.

Not for the changes themselves (test_text_changes.py) nor the command (test_bilingual_cli.py).
"""

import numpy as np
import pytest

from m2encoder.embed import TextEmbeddings, embed_pairs, embed_texts
from m2encoder.errors import DataError
from m2encoder.eval.robustness import apply_change, measure_robustness, robustness
from m2encoder.eval.text_changes import without_punctuation
from m2encoder.shards import ShardReader

DRAWS = 50
EYE = np.eye(4, dtype=np.float32)
LONG = "一只红色的猫坐在窗台上，看着外面的雨。" * 600


def captions(encoder, texts, owner):
    vectors, truncated = embed_texts(encoder, texts)
    return TextEmbeddings(vectors, np.asarray(owner), texts, truncated)


def test_only_texts_that_change_are_kept_and_emptied_ones_counted():
    found = apply_change(["a, b", "猫", "！！！", "", "cat."], without_punctuation)
    assert found.rows.tolist() == [0, 4]
    assert found.texts == ["a b", "cat"]
    assert found.emptied == 1


def test_worked_by_hand():
    """Four texts that find their pictures; a change turns the second away and keeps the third."""
    changed = {"turned": (np.asarray([1, 2]), EYE[[0, 2]])}
    found = robustness(EYE, EYE, np.arange(4), changed, draws=DRAWS).metrics
    assert found["t2i_r1"].value == 1
    assert found["turned_changed"].value == 0.5
    assert found["turned_cosine"].value == 0.5  # 0 and 1
    assert found["turned_t2i_r1_change"].value == -0.5
    assert found["turned_t2i_r1_change"].n == 2


def test_a_change_that_alters_nothing_is_undefined():
    changed = {"none": (np.zeros(0, np.int64), np.zeros((0, 4), np.float32))}
    found = robustness(EYE, EYE, np.arange(4), changed, draws=DRAWS).metrics
    assert found["none_changed"].value == 0
    for name in ("none_cosine", "none_t2i_r1_change"):
        assert np.isnan(found[name].value)
        assert found[name].n == 0


def test_vectors_that_stay_the_same_change_nothing():
    rng = np.random.default_rng(0)
    text = (EYE[[0, 1, 2, 3] * 5] + 0.7 * rng.standard_normal((20, 4))).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    owner = np.asarray([0, 1, 2, 3] * 5)
    found = robustness(EYE, text, owner, {"same": (np.arange(20), text)}, draws=DRAWS).metrics
    assert found["same_cosine"].value == pytest.approx(1)
    assert found["same_t2i_r1_change"].value == 0
    assert found["same_t2i_r1_change"].ci95 == (0, 0)


def test_a_collapsed_change_falls_to_chance_with_bounds():
    flat = np.full((4, 4), 0.5, np.float32)
    found = robustness(EYE, EYE, np.arange(4), {"flat": (np.arange(4), flat)}, draws=DRAWS).metrics
    change = found["flat_t2i_r1_change"]
    assert (change.value, change.tie_low, change.tie_high) == (1 / 4 - 1, -1, 0)


def test_rows_and_vectors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="odd: 1 rows for 2 vectors"):
        robustness(EYE, EYE, np.arange(4), {"odd": (np.arange(1), EYE[:2])}, draws=DRAWS)


def test_no_captions_are_an_error(tiny_encoder):
    empty = TextEmbeddings(np.zeros((0, 16), np.float32), np.zeros(0, np.int64), [])
    with pytest.raises(DataError, match="no captions in zh"):
        measure_robustness(tiny_encoder, EYE, empty, "zh")


def test_texts_of_every_kind_are_measured(tiny_encoder):
    """Our tokenizer folds widths, so the vectors stay; emoji alone is emptied by no change."""
    texts = [
        "一只红色的猫，坐着。",
        "繁體中文：貓",
        "Ａ　ｃａｔ！",
        "a Cat, sits.",
        "👨‍👩‍👧‍👦",
        LONG,
    ]
    image = tiny_encoder.encode_text([text + "图" for text in texts])
    found = measure_robustness(
        tiny_encoder, image, captions(tiny_encoder, texts, range(6)), "zh", draws=DRAWS
    )
    assert found.metrics["full_width_changed"].value == pytest.approx(1 / 6)
    assert found.metrics["half_width_changed"].value == pytest.approx(4 / 6)
    assert found.metrics["full_width_cosine"].value == pytest.approx(1, abs=1e-6)
    assert found.metrics["full_width_t2i_r1_change"].value == 0
    assert found.metrics["no_punctuation_changed"].value == pytest.approx(5 / 6)
    assert found.metrics["truncated"].value == pytest.approx(1 / 6)
    examples = found.details["examples"]
    assert examples["full_width"] == [["a Cat, sits.", "ａ　Ｃａｔ，　ｓｉｔｓ．"]]
    assert examples["code_mixed"][0] == ["一只红色的猫，坐着。", "一只 red 的猫，坐着。"]


def test_it_equals_encoding_each_change_by_hand(tiny_encoder, tiny_shards):
    pairs = embed_pairs(tiny_encoder, ShardReader(tiny_shards / "test"))
    english = pairs.texts["en"]
    found = measure_robustness(tiny_encoder, pairs.image, english, "en", draws=DRAWS).metrics
    upper = tiny_encoder.encode_text([text.upper() for text in english.texts])
    cosines = np.einsum("nd,nd->n", upper, english.vectors)
    assert found["upper_case_cosine"].value == pytest.approx(cosines.mean(), abs=1e-5)
    hits = [
        ((vectors @ pairs.image.T).argmax(axis=1) == english.owner).mean()
        for vectors in (english.vectors, upper)
    ]
    assert found["t2i_r1"].value == pytest.approx(hits[0], abs=1e-6)
    assert found["upper_case_t2i_r1_change"].value == pytest.approx(hits[1] - hits[0], abs=1e-6)
    assert found["truncated"].value == english.truncated / len(english.texts)


def test_changes_that_cannot_be_made_are_named_with_the_reason(tiny_encoder):
    texts = captions(tiny_encoder, ["一只猫", "狗"], [0, 1])
    found = measure_robustness(tiny_encoder, texts.vectors, texts, "zh", draws=DRAWS)
    made = {name.removesuffix("_changed") for name in found.metrics if name.endswith("_changed")}
    for name in ("traditional", "simplified"):
        assert (name in made) != (name in found.details["left_out"])
