"""The same text written otherwise: each change on each kind of text.

Not for what it does to a model: test_robustness.py.
"""

from importlib.util import find_spec

import pytest

from m2encoder.errors import MissingExtraError
from m2encoder.eval.text_changes import (
    CHINESE,
    EVERYWHERE,
    changes_for,
    script_change,
    to_ascii_marks,
    to_chinese_marks,
    to_full_width,
    to_half_width,
    with_final_stop,
    with_spaced_characters,
    with_wide_spaces,
    without_punctuation,
)

HAS_OPENCC = find_spec("opencc") is not None
TEXTS = [
    "",
    "一只红色的猫，坐着。",
    "繁體中文：貓",
    "Ａ　ｃａｔ！",
    "a Cat, sits.",
    "👨‍👩‍👧‍👦",
    "猫cat " * 5_000,
]


@pytest.mark.parametrize(
    ("change", "text", "changed"),
    [
        (to_full_width, "a Cat, 3~", "ａ　Ｃａｔ，　３～"),
        (to_half_width, "ａ　Ｃａｔ，　３～", "a Cat, 3~"),
        (to_half_width, "一只猫，", "一只猫,"),
        (without_punctuation, "一只猫，两只狗。", "一只猫 两只狗"),
        (without_punctuation, "it's a cat!", "it s a cat"),
        (without_punctuation, "！？…", ""),
        (without_punctuation, "a $3 cat", "a $3 cat"),  # a symbol is no punctuation
        (to_ascii_marks, "“猫”，狗、鸟。", '"猫",狗,鸟.'),
        (to_chinese_marks, "a cat, (big)!", "a cat， （big）！"),
        (with_final_stop, "一只猫", "一只猫。"),
        (with_final_stop, "a cat", "a cat."),
        (with_final_stop, "一只猫。", "一只猫"),
        (with_final_stop, "", "."),
        (with_wide_spaces, "a cat", " a  cat "),
        (with_spaced_characters, "一只 cat猫", "一 只 cat猫"),
        (with_spaced_characters, "貓與狗", "貓 與 狗"),
    ],
)
def test_worked_by_hand(change, text, changed):
    assert change(text) == changed


def test_full_and_half_width_are_each_other_s_inverse():
    ascii_text = "".join(map(chr, range(0x20, 0x7F)))
    assert to_half_width(to_full_width(ascii_text)) == ascii_text
    assert len(set(to_full_width(ascii_text)) & set(ascii_text)) == 0


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*EVERYWHERE, *CHINESE])
def test_every_change_takes_every_text(name, text):
    change = {**EVERYWHERE, **CHINESE}[name]
    assert isinstance(change(text), str)
    if name not in ("final_stop", "wide_spaces"):  # these two change it every time
        assert change(change(text)) == change(text)


def test_spaces_between_characters_are_for_chinese_alone():
    assert "spaced_characters" in changes_for("zh-Hant")[0]
    assert "spaced_characters" not in changes_for("en")[0]
    assert changes_for("en")[1] == {}


@pytest.mark.skipif(HAS_OPENCC, reason="OpenCC is installed here")
def test_without_opencc_the_extra_is_named():
    changes, missing = changes_for("zh")
    assert "traditional" not in changes
    assert set(missing) == {"traditional", "simplified"}
    with pytest.raises(MissingExtraError, match=r"pip install 'm2encoder\[zh\]'"):
        script_change("traditional")


@pytest.mark.skipif(not HAS_OPENCC, reason="needs OpenCC")
@pytest.mark.parametrize(
    ("simplified", "traditional"),
    [
        ("一只红色的猫", "一隻紅色的貓"),
        ("头发后面", "頭髮後面"),  # by words: 发 is 髮 here
        ("发展", "發展"),
        ("a red cat 😀 Ａ", "a red cat 😀 Ａ"),
        ("", ""),
        ("猫" * 10_000, "貓" * 10_000),
    ],
)
def test_scripts_are_converted_both_ways(simplified, traditional):
    assert script_change("traditional")(simplified) == traditional
    assert script_change("simplified")(traditional) == simplified
