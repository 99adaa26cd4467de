"""The fast tokenizer of a released model: the same ids as SentencePiece, wherever it is opened.

Held on a small model trained here, and on the released one where it lies beside us.
"""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from released_model import (
    OFFICIAL,
    SPECIAL,
    TEXTS,
    WORDS,
    both,
    fast_of,
    needs_official,
    piece,
    released,
    small_model,
)
from transformers import AutoTokenizer

from m2encoder.errors import CheckpointError
from m2encoder.released_tokenizer import ReleasedTokenizer, longest_first
from m2encoder.tokenizer import write_tokenizer_class


def wrong(name: str, texts: list[str]) -> list[str]:
    """Return the texts whose ids differ between SentencePiece and the fast tokenizer."""
    ours = released(name, max_length=10_000)
    found = fast_of(name)(texts, truncation=True, max_length=10_000)["input_ids"]
    return [text for text, ids in zip(texts, found, strict=True) if ours.encode(text) != ids]


# ── the fast tokenizer is SentencePiece ─────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [2, 3, 16, 52])
def test_both_give_the_same_ids_and_masks(name: str, side: str, max_length: int) -> None:
    fast = fast_of(name, side)
    inputs = fast(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="np")
    batch = released(name, max_length, side)(TEXTS)
    np.testing.assert_array_equal(batch.ids, inputs["input_ids"])
    np.testing.assert_array_equal(batch.mask, inputs["attention_mask"])
    assert batch.ids.dtype == batch.mask.dtype == np.int64
    assert batch.ids.shape[1] <= max_length


@needs_official
def test_every_caption_has_the_same_ids_in_both() -> None:
    captions = []
    for path in sorted(OFFICIAL.parent.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            captions += json.loads(line)["caption"]
    assert len(captions) == 32_063
    assert wrong("released", captions) == []


@both
def test_every_character_of_the_basic_plane_has_the_same_ids_in_both(name: str) -> None:
    assert wrong(name, [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000]) == []


TRICKY = st.lists(
    st.sampled_from(
        [*SPECIAL, *WORDS, *"aehtwindnbe rdo的红猫一2024\n\r\t　▁_", "  ", "</", "<unk>", "👨"]
    ),
    max_size=30,
).map("".join)
NFKC = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(
    lambda text: unicodedata.normalize("NFKC", text)
)


@both
@settings(max_examples=200, deadline=None)
@given(text=TRICKY | NFKC)
def test_any_text_in_nfkc_has_the_same_ids_in_both(name: str, text: str) -> None:
    assert wrong(name, [text]) == []


SCRIPTS = {
    "ascii": [(0x20, 0x7F)],
    "latin": [(0x20, 0x7F), (0xA0, 0x250), (0x1E00, 0x1F00)],
    "han": [(0x4E00, 0x9FFF), (0x3000, 0x3040)],
    "kana": [(0x3041, 0x3097), (0x30A0, 0x3100)],
    "full width": [(0xFF01, 0xFF61), (0x3000, 0x3001)],
    "hangul": [(0xAC00, 0xD7A4)],
    "cyrillic and greek": [(0x370, 0x483), (0x48A, 0x530), (0x1F00, 0x2000)],
    "thai": [(0xE00, 0xE80)],
    "punctuation and symbols": [(0x2000, 0x2070), (0x2100, 0x2C00)],
    "emoji": [(0x1F300, 0x1F700), (0x1F1E6, 0x1F200), (0x200D, 0x200E), (0xFE0F, 0xFE10)],
    "control": [(0, 0xA0)],
}
COMBINING = {
    "half width": [(0xFF61, 0xFFF0)],
    "jamo": [(0x1100, 0x1200), (0x3130, 0x3190)],
    "arabic": [(0x600, 0x700)],
    "devanagari": [(0x900, 0x980)],
    "tamil": [(0xB80, 0xC00)],
    "accents": [(0x61, 0x7B), (0x300, 0x370)],
}


def random_texts(ranges: list[tuple[int, int]], count: int = 500) -> list[str]:
    letters = [chr(c) for first, end in ranges for c in range(first, end)]
    chance = random.Random(0)
    return ["".join(chance.choices(letters, k=chance.randint(2, 20))) for _ in range(count)]


@both
@pytest.mark.parametrize("script", [*SCRIPTS, *COMBINING])
def test_random_strings_have_the_same_ids_in_both(name: str, script: str) -> None:
    """Raw where no two characters stand for one, in NFKC everywhere."""
    texts = random_texts((SCRIPTS | COMBINING)[script])
    if script in SCRIPTS:
        assert wrong(name, texts) == []
    assert wrong(name, [unicodedata.normalize("NFKC", text) for text in texts]) == []


@both
@pytest.mark.parametrize("text", ["cafe\u0301", "ａ\u0301", "ｶﾞ", "\u3134\u3154"])
def test_decomposed_text_may_differ_and_agrees_in_nfkc(name: str, text: str) -> None:
    """The limit that `to_fast` states: an accent behind a piece, kana in two halves, split jamo."""
    assert wrong(name, [text]) == [text]
    assert wrong(name, [unicodedata.normalize("NFKC", text)]) == []


def test_the_longest_piece_at_a_place_is_found_first() -> None:
    chance = random.Random(1)
    letters = "ab.*[]-^\\猫👨▁"
    for _ in range(20):
        pieces = {"".join(chance.choices(letters, k=chance.randint(1, 4))) for _ in range(30)}
        split = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(longest_first(sorted(pieces))), "isolated"
        )
        text = "".join(chance.choices(letters, k=200))
        expected, at, rest = [], 0, ""
        while at < len(text):
            found = next(
                (text[at : at + n] for n in (4, 3, 2, 1) if text[at : at + n] in pieces), ""
            )
            if found and rest:
                expected.append(rest)
            rest = "" if found else rest + text[at]
            expected += [found] if found else []
            at += len(found) or 1
        expected += [rest] if rest else []
        assert [word for word, _ in split.pre_tokenize_str(text)] == expected


# ── saved and opened elsewhere ──────────────────────────────────────────────────────────────────


@both
def test_a_saved_tokenizer_opens_with_the_same_ids_again_and_again(
    name: str, tmp_path: Path
) -> None:
    expected = released(name)(TEXTS)
    fast = fast_of(name)
    for number in range(3):  # a consumer may save what it opened
        folder = tmp_path / str(number)
        fast.save_pretrained(folder)
        if number == 0:
            write_tokenizer_class(folder)
        fast = AutoTokenizer.from_pretrained(folder)
        assert (fast.truncation_side, fast.padding_side) == ("left", "right")
        assert fast.model_max_length == 52
        inputs = fast(TEXTS, padding=True, truncation=True, return_tensors="np")
        assert list(inputs) == ["input_ids", "attention_mask"]
        np.testing.assert_array_equal(inputs["input_ids"], expected.ids)
        np.testing.assert_array_equal(inputs["attention_mask"], expected.mask)


@both
def test_tokenizer_json_alone_truncates_pads_and_looks_for_no_special_token(
    name: str, tmp_path: Path
) -> None:
    fast_of(name)("a call leaves its padding behind", padding="max_length", max_length=100)
    fast_of(name).save_pretrained(tmp_path)
    write_tokenizer_class(tmp_path)
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encodings = alone.encode_batch(TEXTS)
    batch = released(name)(TEXTS)
    assert [encoding.ids for encoding in encodings] == batch.ids.tolist()
    assert [encoding.attention_mask for encoding in encodings] == batch.mask.tolist()


@both
def test_the_fast_tokenizer_decodes_to_readable_text(name: str) -> None:
    for text, read in {
        "一只红色的猫": "一只红色的猫",
        "ａ　ｒｅｄ cat": "a red cat",
        "a  red   cat ": "a  red   cat ",
        "": "",
    }.items():
        fast = fast_of(name)
        assert fast.decode(fast(text)["input_ids"], skip_special_tokens=True) == read


# ── models it cannot hold ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "trainer_spec.model_type 1, expected 2"),
        ({"add_dummy_prefix": False}, "normalizer_spec.add_dummy_prefix 0, expected 1"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces 1, expected 0"),
        ({"byte_fallback": True, "vocab_size": 600}, "trainer_spec.byte_fallback 1, expected 0"),
        ({"user_defined_symbols": (*SPECIAL, "ａ")}, "such as 'ａ': user-defined, but its"),
    ],
)
def test_a_setting_that_tokenizer_json_cannot_hold_is_one_line(
    changes: dict[str, object], message: str
) -> None:
    ours = ReleasedTokenizer(small_model(**changes))
    assert ours.encode("a red cat")
    with pytest.raises(CheckpointError) as caught:
        ours.to_fast()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("it cannot be written as tokenizer.json")


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (piece("ꙮꙮ", -0.1), "1 pieces such as 'ꙮꙮ': made of characters that are no pieces"),
        (piece("zzz", -0.1, kind=5), "1 pieces such as 'zzz': of a type that is not converted"),
    ],
)
def test_a_piece_that_tokenizer_json_cannot_hold_is_one_line(added: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ReleasedTokenizer(small_model() + added).to_fast()
    assert message in str(caught.value)
