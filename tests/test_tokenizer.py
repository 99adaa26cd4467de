"""The tokenizer: trained, foreign and damaged models, and the exactness claim.

The claim: `TextTokenizer` (training) and the `tokenizer.json` of a model folder (everything else)
give the same ids for every text of up to 10,000 characters, on any Python, because both run the
same normalizer and the same merges. Longer texts are cut to 10,000 first; ordinary ones still agree
because truncation drops the rest anyway.
"""

import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from m2encoder.errors import ConfigError, DataError
from m2encoder.released_tokenizer import load_tokenizer
from m2encoder.tokenizer import (
    CLS_ID,
    END_ID,
    MAX_TEXT_CHARACTERS,
    PAD_ID,
    UNK_ID,
    TextTokenizer,
    clip,
    normalize,
    train_tokenizer,
    write_tokenizer_class,
)

OFFICIAL = Path(__file__).resolve().parents[2] / "shared/data/official/sp.model"
CORPUS = 4 * [
    "一只红色的猫坐在蓝色的沙发上",
    "两只狗在公园里玩耍",
    "一張繁體中文的圖片",
    "图中有三个绿色的圆形",
    "a red cat sits on a blue sofa",
    "two dogs are playing in the park",
    "three green circles",
    "a picture of the number 2024",
    "the quick brown fox jumps over the lazy dog",
    "😀 smiling face",
]
MODEL = train_tokenizer(CORPUS, vocab_size=520)
FAMILY = "👨‍👩‍👧‍👦"  # four people and three zero-width joiners
TEXTS = [
    "一只红色的猫",
    "繁體中文：貓與狗，龘靐齉",
    "ＦＵＬＬ　ｗｉｄｔｈ　１２３！？",
    "ｶﾀｶﾅ ㍿ ﬁne ① ½ Ⅷ ㎏",
    f"family {FAMILY} 👍🏽 🏳️‍🌈 🇨🇳 ❤️",
    "",
    " ",
    "  two  spaces \t tab\nline\r\nfeed　ideographic\u00a0no-break\u2003em\u200bzero\ufeffbom ",
    "\u2028line\u2029paragraph\x85next\x1cfile\x1funit\x0bvertical\x0cform",
    "<0x41><0x00> <unk> <s> </s> [CLS] <|endoftext|>",
    "＜cls＞ ＜end＞＜pad＞ ＜unk＞ <cls> <end>",
    "▁ ▁▁cat▁ a▁b \u2585",
    "Mixed 中英 mixed混合text文本, кириллица عربى עברית हिन्दी ไทย 한국어 にほんご",
    "e\u0301 é Å a\u0323\u0307 ḍ̇ ﷺ ㋿ ꟲ 𞥃 𝒜𝓑",
    "\x00\x01 nul\x00inside",
    "\U0010ffff\uffff\ue000",
    "2024年11月23日 3.14159 -1e-6 https://example.org/?q=猫",
    "a" * 500,
    "猫" * 10_000,
    "a red cat on a blue sofa. " * 400,
    ("一只红色的猫坐在蓝色的沙发上，a red cat。" * 4000)[:100_000],
]


def tokenizer(max_length: int = 52, side: str = "left") -> TextTokenizer:
    return TextTokenizer(MODEL, max_length=max_length, truncation_side=side)  # pyright: ignore[reportArgumentType]


def fast_ids(fast: PreTrainedTokenizerFast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    inputs = fast(texts, padding=True, truncation=True, return_tensors="np")
    return np.asarray(inputs["input_ids"]), np.asarray(inputs["attention_mask"])


# ── the two tokenizers are one ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [2, 3, 16, 52, 12_000])
def test_training_and_fast_tokenizer_give_the_same_ids_and_masks(
    side: str, max_length: int
) -> None:
    ours = tokenizer(max_length, side)
    texts = [text for text in TEXTS if max_length < 100 or len(text) <= MAX_TEXT_CHARACTERS]
    ids, mask = fast_ids(ours.to_fast(), texts)
    batch = ours(texts)
    np.testing.assert_array_equal(batch.ids, ids)
    np.testing.assert_array_equal(batch.mask, mask)
    assert batch.ids.dtype == batch.mask.dtype == np.int64
    assert batch.ids.shape[1] <= max_length


FAST = {side: tokenizer(30, side).to_fast() for side in ("left", "right")}
OURS = {side: tokenizer(30, side) for side in ("left", "right")}
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# Letters that merge into each other, blanks and pieces that look like special ones.
TRICKY = st.text(
    st.sampled_from("aeht rdo的红猫一 　\t\x1c▁<0x41>＜cls＞\u200d👨é\u0301"), max_size=60
)


@settings(max_examples=300, deadline=None)
@given(text=UNICODE | TRICKY, side=st.sampled_from(["left", "right"]))
def test_any_text_has_the_same_ids_in_both(text: str, side: str) -> None:
    assert OURS[side].encode(text) == FAST[side](text, truncation=True)["input_ids"]


def test_every_character_that_a_normalizer_might_change_has_the_same_ids_in_both() -> None:
    """Whatever Unicode version Python knows: its own NFKC gave 76 characters other ids."""
    every = map(chr, range(0x30000))
    kept = [c for c in every if unicodedata.category(c) not in ("Lo", "Cs", "Cn")]
    kept += [c for c in map(chr, range(0x30000)) if unicodedata.decomposition(c)]
    texts = ["a" + " b".join(kept[i : i + 8]) + "c" for i in range(0, len(kept), 8)]
    ours, fast = tokenizer(1000), tokenizer(1000).to_fast()
    found = fast(texts)["input_ids"]
    assert [text for text, ids in zip(texts, found, strict=True) if ours.encode(text) != ids] == []


def test_no_text_can_spell_a_special_token() -> None:
    special = {PAD_ID, UNK_ID, CLS_ID, END_ID}
    for text in TEXTS[:17]:
        for ids in (OURS["left"].encode(text), FAST["left"](text, truncation=True)["input_ids"]):
            assert (ids[0], ids[-1]) == (CLS_ID, END_ID)
            assert not special & set(ids[1:-1])


def test_a_saved_tokenizer_opens_in_transformers_with_the_same_ids(tmp_path: Path) -> None:
    tokenizer(52).to_fast().save_pretrained(tmp_path)
    write_tokenizer_class(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert (opened.truncation_side, opened.padding_side) == ("left", "right")
    assert opened.model_max_length == 52
    ids, mask = fast_ids(opened, TEXTS)
    batch = tokenizer(52)(TEXTS)
    np.testing.assert_array_equal(ids, batch.ids)
    np.testing.assert_array_equal(mask, batch.mask)


def test_tokenizer_json_alone_truncates_pads_and_looks_for_no_special_token(
    tmp_path: Path,
) -> None:
    fast = tokenizer(52).to_fast()
    fast("a call leaves its padding behind", padding="max_length", max_length=100)
    fast.save_pretrained(tmp_path)
    write_tokenizer_class(tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    batch = tokenizer(52)(TEXTS)
    assert [encoding.ids for encoding in alone.encode_batch(TEXTS)] == batch.ids.tolist()
    assert [e.attention_mask for e in alone.encode_batch(TEXTS)] == batch.mask.tolist()


def test_a_tokenizer_of_another_kind_only_gets_its_class_named(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1}, unk_token="a"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a", sep_token="[SEP]")
    fast.save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    write_tokenizer_class(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in (
        tmp_path / "tokenizer_config.json"
    ).read_text(encoding="utf-8")


def test_the_fast_tokenizer_decodes_to_the_normalised_text() -> None:
    fast = tokenizer(1000).to_fast()
    for text in ("一只红色的猫", "ａ　red   cat ", f"{FAMILY} ok", "naïve ①"):
        decoded = fast.decode(fast(text)["input_ids"], skip_special_tokens=True)
        assert decoded.strip() == normalize(text)  # pyright: ignore[reportAttributeAccessIssue]


# ── what an encoding looks like ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["", " ", "\t\n　\u00a0", "▁▁"])
def test_an_empty_text_is_both_special_tokens(text: str) -> None:
    assert tokenizer().encode(text) == [CLS_ID, END_ID]


def test_full_width_text_has_the_ids_of_half_width_text() -> None:
    assert tokenizer().encode("ａ　ＲＥＤ　ｃａｔ！１２") == tokenizer().encode("a RED cat!12")


def test_blanks_at_the_ends_and_repeated_ones_change_nothing() -> None:
    assert tokenizer().encode("\n a \t\t red　 cat  ") == tokenizer().encode("a red cat")


def test_upper_and_lower_case_differ_as_in_the_released_tokenizer() -> None:
    assert tokenizer().encode("CAT") != tokenizer().encode("cat")


def test_truncation_keeps_the_end_or_the_start() -> None:
    inner = tokenizer(1000).encode("two dogs are playing in the park 两只狗")[1:-1]
    assert len(inner) > 6
    assert (
        tokenizer(7, "left").encode("two dogs are playing in the park 两只狗")[1:-1] == inner[-5:]
    )
    assert (
        tokenizer(7, "right").encode("two dogs are playing in the park 两只狗")[1:-1] == inner[:5]
    )


def test_a_text_that_ends_in_many_blanks_is_not_taken_for_an_empty_one() -> None:
    blank = " " * 3 * MAX_TEXT_CHARACTERS
    for side in ("left", "right"):
        assert tokenizer(52, side).encode(blank + "a red cat" + blank) == OURS[side].encode(
            "a red cat"
        )


def test_a_clipped_text_keeps_the_side_that_truncation_keeps() -> None:
    long = "a" * MAX_TEXT_CHARACTERS + "b"
    assert clip(long, "left") == long[1:]
    assert clip(long, "right") == long[:-1]
    assert clip(" short ", "left") == " short "


def test_no_texts_make_an_empty_batch() -> None:
    batch = tokenizer()([])
    assert batch.ids.shape == batch.mask.shape == (0, 0)


def test_half_a_surrogate_pair_is_one_line() -> None:
    with pytest.raises(DataError, match=r"half of a surrogate pair \(character 4\), expected"):
        tokenizer().encode("cat \ud83d")


def test_a_pickled_tokenizer_gives_the_same_ids() -> None:
    ours = tokenizer(9, "right")
    again = pickle.loads(pickle.dumps(ours))
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


# ── training ────────────────────────────────────────────────────────────────────────────────────


def test_training_on_the_same_texts_gives_the_same_bytes() -> None:
    assert train_tokenizer(iter(CORPUS), vocab_size=520) == MODEL


def test_the_vocabulary_size_is_an_upper_bound() -> None:
    assert tokenizer().vocab_size <= 520
    small = TextTokenizer(train_tokenizer(["红 red"], vocab_size=5000), max_length=9)
    assert 4 + 256 + 94 < small.vocab_size < 400


def test_with_room_in_the_vocabulary_every_word_seen_is_one_piece() -> None:
    """Unigram training would leave short captions in letters."""
    ours = TextTokenizer(train_tokenizer(CORPUS, vocab_size=5000), max_length=52)
    for text in CORPUS[:10]:
        assert len(ours.encode(text)) == 2 + len(text.split()), text


def test_a_text_that_is_no_unicode_does_not_stop_training() -> None:
    assert train_tokenizer([*CORPUS, "broken \ud83d"], vocab_size=520) == MODEL


@pytest.mark.parametrize("texts", [[], ["", " \t", "　"]])
def test_an_empty_corpus_is_a_data_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"^no text to train a tokenizer on, expected zh and en"):
        train_tokenizer(texts, vocab_size=500)


@pytest.mark.parametrize("vocab_size", [-1, 0, 10, 360])
def test_a_vocabulary_too_small_is_one_line_that_says_how_small(vocab_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        train_tokenizer(CORPUS, vocab_size=vocab_size)
    message = str(caught.value)
    assert "\n" not in message
    assert f"cannot train a tokenizer of vocab_size {vocab_size} on 40 texts: " in message
    assert not message.endswith(": ")


# ── models that are none of ours ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", [b"", b"junk", MODEL[: len(MODEL) // 2], b"\x00" * 100])
def test_bytes_that_are_no_model_are_one_line(model: bytes) -> None:
    with pytest.raises(DataError) as caught:
        TextTokenizer(model, max_length=52)
    assert "SentencePiece model" in str(caught.value)
    assert "train one" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the released vocabulary is not beside us")
def test_the_released_vocabulary_is_refused_in_one_line() -> None:
    with pytest.raises(DataError) as caught:
        TextTokenizer(OFFICIAL.read_bytes(), max_length=52)
    assert "begins with <unk> <s> </s> <n>, expected ＜pad＞ ＜unk＞" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_model_file_is_one_line_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sp\.model: no such tokenizer; train one with: m2enc"):
        load_tokenizer(tmp_path / "sp.model", max_length=52)
