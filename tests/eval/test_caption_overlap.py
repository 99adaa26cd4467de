"""Near captions are exactly those that a comparison of all pairs finds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.eval.caption_overlap import CaptionIndex, jaccard, shingles

WORDS = st.sampled_from(
    ["红色的", "蓝色", "猫", "狗", "a red", "cat", "Ｃat", "，", "!", "🐈", " ", "x"]
)
TEXTS = st.lists(WORDS, max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TEXTS, max_size=12), TEXTS, st.sampled_from([0.01, 0.3, 0.5, 2 / 3, 0.75, 0.8, 0.9, 1])
)
def test_near_captions_equal_a_comparison_of_all_pairs(texts, asked, near):
    found = CaptionIndex(texts, near=near).find(asked)
    expected = {
        row
        for row, text in enumerate(texts)
        if asked.strip() and text.strip()
        and jaccard(shingles(text), shingles(asked)) >= near - 1e-9
    }  # fmt: skip
    same = {each.row for each in found if each.kind == "same"}
    near_rows = {each.row for each in found if each.kind == "near"}
    assert same | near_rows == expected
    assert same & near_rows == set()
    for each in found:
        assert each.jaccard == pytest.approx(jaccard(shingles(texts[each.row]), shingles(asked)))


def test_shingles_worked_by_hand():
    assert shingles("红色的猫") == {"红色的", "色的猫"}
    assert shingles("A  cat!") == {"a c", " ca", "cat"}
    assert shingles("猫") == {"猫"}
    assert shingles("，。！") == {",。!"}
    assert shingles(" ") == set()


def test_case_width_punctuation_and_spaces_make_no_difference():
    assert shingles("Ｔｗｏ  red，CATS。") == shingles("two red cats")
    assert shingles("snake_case words") == shingles("snake case words")


def test_traditional_and_simplified_stay_apart():
    assert CaptionIndex(["一隻貓在屋頂上"], near=0.9).find("一只猫在屋顶上") == []


def test_jaccard_worked_by_hand():
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5
    assert jaccard(set(), set()) == 0


def test_equal_captions_come_in_order_of_rows_with_repeats():
    index = CaptionIndex(["猫", "狗", "猫"])
    assert [(each.row, each.kind) for each in index.find("猫")] == [(0, "same"), (2, "same")]


@pytest.mark.parametrize("text", ["", " ", "\u3000\n"])
def test_empty_captions_repeat_nothing(text):
    assert CaptionIndex([text, "猫"], near=0.5).find(text) == []


def test_very_long_captions_are_compared():
    text = "".join(chr(0x4E00 + k % 5000) for k in range(10_000))
    (found,) = CaptionIndex([text], near=0.9).find(text[:9_800])
    assert found.kind == "near"


@pytest.mark.parametrize("near", [0, -1, 1.01, float("nan")])
def test_shares_out_of_range_are_refused(near):
    with pytest.raises(ValueError, match="near is"):
        CaptionIndex([], near=near)
