"""Captions made wrong: what each rule makes, where it keeps its hands off, and why.

Not for scoring: test_hard_negatives.py.
"""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.eval.caption_edits import KINDS, edit_caption, find_colours, find_counts, words

TEXTS = [
    "一只红色的猫坐在左边",
    "紅色的星星在左，藍色的圓在右",
    "two red cats and three blue dogs on the left",
    "Ｔｗｏ　ｒｅｄ　ｃａｔｓ",
    "👨‍👩‍👧‍👦 一家人",
    "",
    "一只红色的猫，" * 1_500,
]


@pytest.mark.parametrize(
    ("language", "kind", "caption", "wrong"),
    [
        # colour: the choice is drawn, so a pattern says which
        ("zh", "colour", "一只红色的猫", "一只[^红]{1,2}色的猫"),
        ("zh", "colour", "一条黑狗", "一条[^黑]狗"),
        ("zh", "colour", "一隻紅色的貓", "一隻(綠|藍|黃|紫|橙|黑|白|粉|灰|棕)色的貓"),
        ("zh", "colour", "粉红色的花", "[^粉]色的花"),
        ("en", "colour", "a red cat", "(a|an) (?!red)[a-z]+ cat"),
        ("en", "colour", "An orange cat", "A (?!orange)[a-z]+ cat"),
        ("en", "colour", "A YELLOW FISH", "(A|An) (?!YELLOW)[A-Z]+ FISH"),
        ("en", "colour", "Red, all of it", "(?!Red)[A-Z][a-z]+, all of it"),
        # count
        ("zh", "count", "一只猫", "[两三四五]只猫"),
        ("zh", "count", "兩隻貓", "[一三四五]隻貓"),
        ("zh", "count", "图中有三个人", "图中有[一两四五]个人"),
        ("en", "count", "two cats", "(three|four|five) cats"),
        ("en", "count", "Three big red houses", "(Two|Four|Five) big red houses"),
        ("en", "count", "2 dogs run", "[345] dogs run"),
        ("en", "count", "one dog is running", "(two|three|four|five) dogs are running"),
        ("en", "count", "One small fish", "(Two|Three|Four|Five) small fish"),
        ("en", "count", "one man with a hat", "(two|three|four|five) men with a hat"),
        ("en", "count", "one pony, grey", "(two|three|four|five) ponies, grey"),
        ("en", "count", "one bench in a park", "(two|three|four|five) benches in a park"),
        # position
        ("zh", "position", "猫在狗的左边", "猫在狗的右边"),
        ("zh", "position", "红色在左，蓝色在右。", "红色在右，蓝色在左。"),
        ("zh", "position", "後面有一棵樹", "前面有一棵樹"),
        ("zh", "position", "在左上角", "在右上角"),
        ("zh", "position", "桌子上面的书", "桌子下面的书"),
        ("en", "position", "a cat on the left of a dog", "a cat on the right of a dog"),
        ("en", "position", "Above it a bird", "Below it a bird"),
        ("en", "position", "he stands in front of a car", "he stands behind a car"),
        ("en", "position", "left of it, on the right", "right of it, on the left"),
        # swap
        ("zh", "swap", "红色的球和蓝色的盒子", "蓝色的球和红色的盒子"),
        ("zh", "swap", "紅色的球在藍色的盒子裡", "藍色的球在紅色的盒子裡"),
        ("zh", "swap", "两只猫和三条狗", "三只猫和两条狗"),
        ("en", "swap", "red cube and blue ball", "blue cube and red ball"),
        ("en", "swap", "an orange cat and a black dog", "a black cat and an orange dog"),
        ("en", "swap", "Two cats and three dogs", "Three cats and two dogs"),
    ],
)
def test_a_caption_is_made_wrong_in_one_way(language, kind, caption, wrong):
    for seed in range(5):
        attempt = edit_caption(caption, kind, language, seed=seed)
        assert attempt.reason == ""
        assert re.fullmatch(wrong, attempt.text or ""), attempt.text


@pytest.mark.parametrize(
    ("language", "kind", "caption", "reason"),
    [
        ("zh", "colour", "明白的人在白天走路", "no colour word"),
        ("zh", "colour", "雪白的羊", "no colour word"),
        ("zh", "colour", "天蓝色的墙", "no colour word"),  # a name of its own
        ("en", "colour", "an orange on a table", "no colour word"),
        ("en", "colour", "a hundred redwoods", "no colour word"),
        ("zh", "count", "第一个人", "no count word"),
        ("zh", "count", "十二个人", "no count word"),
        ("zh", "count", "每一个人都一起走", "no count word"),
        ("zh", "count", "猫一样的狗", "no count word"),
        ("en", "count", "iPhone 7 is here", "no count word"),
        ("en", "count", "one of the dogs", "no count word"),
        ("en", "count", "no one is here", "no count word"),
        ("en", "count", "a two-storey house", "no count word"),
        ("en", "count", "at 3:30 trains leave", "no count word"),
        ("en", "count", "one elegantly dressed man", "no count word"),
        ("zh", "position", "今天晚上大约十个人左右", "no position word"),
        ("zh", "position", "在上海", "no position word"),
        ("en", "position", "She left the house right now", "no position word"),
        ("zh", "swap", "红色和蓝色的球", "both colours describe one thing"),
        ("en", "swap", "a red and a blue ball", "both colours describe one thing"),
        ("en", "swap", "black, white photo", "both colours describe one thing"),
        ("zh", "swap", "红色的球和蓝色的球", "both things have the same name"),
        ("en", "swap", "a red cube and two blue cubes", "both things have the same name"),
        ("zh", "swap", "两只猫和两条狗", "both counts are the same"),
        ("en", "swap", "a red cat and a red dog", "both colours are the same"),
        ("zh", "swap", "一只红色的猫", "fewer than two colours or counts"),
        *(("zh", kind, text, None) for kind in KINDS for text in ("", "😀", "ＲＥＤ　ＣＡＴ")),
        *(("en", kind, text, None) for kind in KINDS for text in ("", "😀", "一只猫")),
    ],
)
def test_what_no_rule_is_sure_of_is_left_out_with_a_reason(language, kind, caption, reason):
    attempt = edit_caption(caption, kind, language)
    assert attempt.text is None
    assert attempt.reason == reason or (reason is None and attempt.reason)


@pytest.mark.parametrize("caption", TEXTS)
@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_taken_and_a_wrong_caption_differs(kind, language, caption):
    attempt = edit_caption(caption, kind, language)
    assert (attempt.text is None) == bool(attempt.reason)
    assert attempt.text != caption
    assert attempt == edit_caption(caption, kind, language)


@given(
    st.lists(
        st.sampled_from(
            ["红色", "白", "的", "两", "只", "猫", "在", "左", "边", "red", " ", "，", "one"]
        ),
        max_size=12,
    ).map("".join),
    st.sampled_from(KINDS),
    st.sampled_from(["zh", "en"]),
)
@settings(max_examples=200, deadline=None)
def test_no_odd_text_breaks_a_rule(caption, kind, language):
    attempt = edit_caption(caption, kind, language)
    assert attempt.text is None or attempt.text != caption


def test_another_seed_may_choose_another_word():
    found = {edit_caption("一只红色的猫", "colour", "zh", seed=seed).text for seed in range(20)}
    assert len(found) > 3


def test_a_colour_that_is_there_already_is_never_put_in():
    caption = "红色、绿色、蓝色、黄色、紫色、橙色、黑色、白色、粉色的花"
    for seed in range(20):
        text = edit_caption(caption, "colour", "zh", seed=seed).text or ""
        assert len({mention.row for mention in find_colours(text, "zh")}) == 9
    everything = "、".join(row["zh"][0] for row in words()["colours"])
    assert edit_caption(everything, "colour", "zh").reason == "every colour is in it already"


def test_counts_say_what_they_count():
    assert [m.word for m in find_counts("两只黑狗和三只白猫，第一个人", "zh")] == ["两", "三"]
    assert [m.word for m in find_counts("two dogs, 3 big cats and one bird", "en")] == ["two", "3"]


def test_other_kinds_and_languages_are_refused():
    with pytest.raises(ValueError, match="kind 'size' in 'zh'"):
        edit_caption("猫", "size", "zh")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="in 'ja'"):
        edit_caption("猫", "colour", "ja")  # pyright: ignore[reportArgumentType]


def test_the_tables_have_an_entry_in_each_script():
    for table in ("colours", "counts"):
        for row in words()[table]:
            assert row["en"]
            assert len(row["zh"]) == len(row["zh-Hant"])
    scripts = (words()["positions"][name] for name in ("zh", "zh-Hant"))
    assert len({len(pairs) for pairs in scripts}) == 1
