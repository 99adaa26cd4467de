"""Keys of texts: equal where two captions say the same in other clothes, and nowhere else."""

from hashlib import blake2b

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2encoder.hashing import text_key
from m2encoder.loss import MISSING

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates too


def digest(data):
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big", signed=True)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("a red cat", "A Red CAT"),
        ("straße", "STRASSE"),
        ("a red cat", "  a\tred \n cat\u00a0"),
        ("a red cat", "ａ　ｒｅｄ　ｃａｔ"),
        ("一只猫,真的!", "一只猫，真的！"),
        ("价格:100%?(新)", "价格：１００％？（新）"),
        ("カード", "ｶｰﾄﾞ"),
        ("café", "cafe\u0301"),
        ("ﬁne №5", "fine No5"),
        ("豈", "\uf900"),  # a compatibility ideograph
        ("", " \n\t　\u2003"),
    ],
)
def test_the_same_words_in_other_clothes_have_the_same_key(text, other):
    assert text != other
    assert text_key(text) == text_key(other)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("一只猫", "一隻貓"),
        ("国", "國"),
        ("一只猫", "一只狗"),
        ("👍", "👎"),
        ("👍", "👍🏽"),
        ("👨‍👩‍👧", "👨‍👩‍👦"),
        ("一只猫", "一只猫。"),
        ("一只猫", "一只 猫"),
        ("a redcat", "a red cat"),
        ("cafe", "café"),
        ("", "."),
        ("猫" * 10_000, "猫" * 10_001),
        ("猫" * 1_000_000, "猫" * 999_999 + "狗"),
        ("a\ud83d", "a\udc4d"),
        ("\ud83d", ""),
    ],
)
def test_other_words_have_another_key(text, other):
    assert text_key(text) != text_key(other)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("", b""),
        ("Ａ  Red Cat！", b"a red cat!"),
        ("一只貓，👍", "一只貓,👍".encode()),
        ("x\ud83d", b"x\xed\xa0\xbd"),  # a surrogate as if it were a character
        ("长 " * 100_000, ("长 " * 100_000).strip().encode()),
    ],
)
def test_a_key_is_the_digest_of_the_normalised_text(text, plain):
    assert text_key(text) == digest(plain)


def test_keys_stay_what_they_were():
    """Written down once: they are compared between machines and versions of Python."""
    assert text_key("a red cat") == -3846713365516199979
    assert text_key("一只红色的猫") == -704881634850777088


@given(ANY_TEXT)
def test_any_text_has_a_signed_64_bit_key_that_is_not_the_missing_one(text):
    key = text_key(text)
    assert torch.tensor(key, dtype=torch.int64).item() == key
    assert key != MISSING


@given(ANY_TEXT)
def test_white_space_around_a_text_never_matters(text):
    assert text_key(f"\u3000{text}\n") == text_key(text)


def test_keys_of_many_texts_are_all_different_and_use_all_bits():
    keys = [text_key(f"图片 {i}") for i in range(20_000)]
    assert len(set(keys)) == len(keys)
    bits = [sum(key >> bit & 1 for key in keys) for bit in range(64)]
    # half of 20,000, by five standard deviations of 71
    assert max(abs(count - 10_000) for count in bits) < 355
