"""Right captions against wrong ones: scores by hand and by loops, and where wrong ones come from.

Not for making a caption wrong (test_caption_edits.py).
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.embed import PairEmbeddings, TextEmbeddings, embed_pairs
from m2encoder.errors import DataError
from m2encoder.eval.hard_negatives import (
    given_hard_negatives,
    measure_hard_negatives,
    score_hard_negatives,
    template_hard_negatives,
    to_rows,
)
from m2encoder.shards import ShardReader

DRAWS = 50


def captions(texts, owner):
    return TextEmbeddings(np.ones((len(texts), 2), np.float32), np.asarray(owner), texts)


def pairs_of(texts, owner, metas):
    keys = [f"图{i}" for i in range(len(metas))]
    image = np.ones((len(metas), 2), np.float32)
    return PairEmbeddings(image, {"zh": captions(texts, owner)}, keys, metas, [])


# ── scores ──────────────────────────────────────────────────────────────────────────────────────


def test_worked_by_hand():
    """The first wins over two, the second ties with one of two, the third loses, the last is not
    asked."""
    right = np.asarray([0.9, 0.5, 0.1, 0.7])
    wrong = np.asarray([0.1, 0.2, 0.5, 0.4, 0.3])
    row = np.asarray([0, 0, 1, 1, 2])
    output = score_hard_negatives(right, wrong, row, ["a", "b", "a", "b", "a"], draws=DRAWS)
    found = output.metrics
    assert found["accuracy"].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["accuracy"].n == 3
    assert found["accuracy"].tie_low == pytest.approx(1 / 3)
    assert found["accuracy"].tie_high == pytest.approx(2 / 3)
    assert found["accuracy_a"].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["accuracy_b"].value == 1
    assert found["accuracy_b"].tie_low is None
    assert output.details["chance"]["accuracy"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert output.details["kinds"] == {"a": 3, "b": 2}
    assert output.ranks["row"].tolist() == [0, 1, 2]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=4)),
        min_size=1,
        max_size=6,
    ).filter(lambda cases: any(wrong for _, wrong in cases))
)
@settings(max_examples=100, deadline=None)
def test_scores_equal_a_loop(cases):
    wrong = [float(score) for _, scores in cases for score in scores]
    row = [i for i, (_, scores) in enumerate(cases) for _ in scores]
    right = np.asarray([float(score) for score, _ in cases])
    found = score_hard_negatives(
        right, np.asarray(wrong), np.asarray(row), ["x"] * len(row), draws=2
    ).metrics
    expected = [
        0 if max(scores) > own else 1 / (1 + scores.count(own)) for own, scores in cases if scores
    ]
    assert found["accuracy"].value == pytest.approx(np.mean(expected))
    two_way = [(own > s) + 0.5 * (own == s) for own, scores in cases for s in scores]
    assert found["accuracy_x"].value == pytest.approx(np.mean(two_way))


def test_collapsed_towers_score_chance_with_bounds():
    flat = np.full(12, 0.4)
    output = score_hard_negatives(flat[:4], flat, np.repeat(np.arange(4), 3), ["x"] * 12)
    accuracy = output.metrics["accuracy"]
    assert (accuracy.value, accuracy.tie_low, accuracy.tie_high) == (0.25, 0, 1)
    assert output.details["chance"]["accuracy"] == 0.25
    assert output.metrics["accuracy_x"].value == 0.5


def test_arrays_that_do_not_fit_and_no_wrong_captions_are_refused():
    one = np.ones(1)
    with pytest.raises(ValueError, match="expected one each"):
        score_hard_negatives(one, np.ones(2), np.zeros(1, int), ["x"])
    with pytest.raises(DataError, match="no wrong captions"):
        score_hard_negatives(one, np.ones(0), np.zeros(0, int), [])
    with pytest.raises(DataError, match="NaN"):
        score_hard_negatives(one, one * np.nan, np.zeros(1, int), ["x"])


# ── captions that the data carries ──────────────────────────────────────────────────────────────


def test_the_demo_s_wrong_captions_equal_a_loop(tiny_encoder, tiny_shards):
    reader = ShardReader(tiny_shards / "test")
    pairs = embed_pairs(tiny_encoder, reader)
    wrong = given_hard_negatives(pairs, "zh")
    found = measure_hard_negatives(tiny_encoder, pairs, "zh", wrong, draws=DRAWS).metrics
    hits, kinds = [], []
    for pair in reader:
        image = tiny_encoder.encode_image(pair.image)
        texts = [pair.captions["zh"][0], *pair.meta["hard_negatives"]["zh"]]
        own, *others = (image @ tiny_encoder.encode_text(texts).T)[0]
        hits.append(own > max(others))
        kinds += pair.meta["hard_negative_kinds"]
    assert found["accuracy"].value == pytest.approx(np.mean(hits))
    for kind in set(kinds):
        assert found[f"accuracy_{kind}"].n == kinds.count(kind)


def test_kinds_may_differ_by_language_or_be_left_out():
    metas = [
        {"hard_negatives": {"zh": ["一", "二"]}, "hard_negative_kinds": {"zh": ["a", "b"]}},
        {"hard_negatives": {"zh": ["三"], "en": ["x", "y"]}},
        {"hard_negatives": {"en": ["z"]}, "hard_negative_kinds": {"en": ["a"]}},
        {},
    ]
    wrong = given_hard_negatives(pairs_of([*"甲乙丙丁"], [0, 1, 2, 3], metas), "zh")
    assert wrong.texts == ["一", "二", "三"]
    assert wrong.kinds == ["a", "b", "any"]
    assert wrong.row.tolist() == [0, 0, 1]
    assert wrong.right.tolist() == [0, 1, 2, 3]


def test_kinds_that_do_not_fit_are_an_error():
    metas = [{"hard_negatives": {"zh": ["一"]}, "hard_negative_kinds": ["a", "b"]}]
    with pytest.raises(DataError, match="图0: 1 hard negatives in zh, but 2 kinds"):
        given_hard_negatives(pairs_of(["甲"], [0], metas), "zh")


@pytest.mark.parametrize(
    "meta",
    [
        {"hard_negatives": ["一"]},
        {"hard_negatives": {"zh": "一"}},
        {"hard_negatives": {"zh": ["一", "　"]}},
        {"hard_negatives": {"zh": [1]}},
        {"hard_negatives": {"zh": ["一"]}, "hard_negative_kinds": "colour"},
    ],
)
def test_damaged_wrong_captions_name_their_picture(meta):
    with pytest.raises(DataError, match=r"^图0: .*; write the shards again$"):
        given_hard_negatives(pairs_of(["甲"], [0], [meta]), "zh")


def test_data_without_any_gives_none(tiny_encoder):
    pairs = pairs_of(["甲"], [0], [{}])
    for language in ("zh", "en"):
        assert given_hard_negatives(pairs, language).texts == []
    with pytest.raises(DataError, match="no wrong captions in zh"):
        measure_hard_negatives(tiny_encoder, pairs, "zh", given_hard_negatives(pairs, "zh"))


# ── captions that rules make ────────────────────────────────────────────────────────────────────


def test_rules_take_the_first_caption_of_each_picture_and_count_the_rest():
    texts = ["一只红色的猫", "两只狗", "猫在狗的左边", "😀", ""]
    wrong = template_hard_negatives(captions(texts, [0, 0, 1, 2, 3]), "zh")
    assert wrong.right.tolist() == [0, 2, 3, 4]
    assert wrong.kinds == ["colour", "count", "position"]
    assert wrong.row.tolist() == [0, 0, 1]
    assert wrong.texts[2] == "猫在狗的右边"
    assert wrong.left_out["colour"] == {"no colour word": 3}
    assert wrong.left_out["swap"] == {"fewer than two colours or counts": 4}
    for kind, reasons in wrong.left_out.items():
        assert sum(reasons.values()) + wrong.kinds.count(kind) == 4


def test_a_wrong_caption_that_the_picture_has_too_is_left_out():
    texts = ["猫在狗的左边", "猫在狗的右边"]
    wrong = template_hard_negatives(captions(texts, [0, 0]), "zh", kinds=["position"])
    assert wrong.texts == []
    assert wrong.left_out == {"position": {"the picture has this caption too": 1}}


def test_rules_depend_on_the_seed_alone():
    texts = [f"{n}只红色的猫" for n in "一两三四五"]
    first, again, other = (
        template_hard_negatives(captions(texts, range(5)), "zh", seed=seed) for seed in (0, 0, 1)
    )
    assert first.texts == again.texts != other.texts


def test_rows_for_a_file_hold_each_caption_with_its_wrong_ones():
    own = captions(["一只红色的猫", "😀", "猫在狗的左边"], [0, 1, 2])
    rows = to_rows(own, template_hard_negatives(own, "zh"), ["甲", "乙", "丙"])
    assert [row["key"] for row in rows] == ["甲", "丙"]
    assert rows[1] == {
        "key": "丙",
        "caption": "猫在狗的左边",
        "hard_negatives": [{"kind": "position", "text": "猫在狗的右边"}],
    }
    assert [each["kind"] for each in rows[0]["hard_negatives"]] == ["colour", "count"]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("language", ["zh", "en"])
def test_most_captions_of_the_demo_get_a_wrong_one(tiny_encoder, tiny_shards, language):
    pairs = embed_pairs(tiny_encoder, ShardReader(tiny_shards / "val"))
    wrong = template_hard_negatives(pairs.texts[language], language)
    assert len(set(wrong.row.tolist())) > 0.9 * len(pairs.keys)
    output = measure_hard_negatives(tiny_encoder, pairs, language, wrong, draws=DRAWS)
    assert set(output.details["kinds"]) == {"colour", "count", "position", "swap"}
    assert output.details["left_out"] == wrong.left_out
