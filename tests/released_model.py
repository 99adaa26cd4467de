"""A small model with the released tokenizer's settings and special pieces, and its texts.

Trained here in milliseconds, so that every claim about such models is held without the released
one. Not a test: test_released_tokenizer.py and test_released_fast.py use it.
"""

import functools
import io
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from m2encoder.released_tokenizer import BLANKS, ReleasedTokenizer
from m2encoder.tokenizer import MAX_TEXT_CHARACTERS

SHARED = Path(__file__).resolve().parents[2] / "shared"
OFFICIAL = SHARED / "data/official/sp.model"
CONFORMANCE = SHARED / "conformance/official"
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_file(), reason="the released sp.model is not beside us"
)
CORPUS = 4 * [
    "一只红色的猫坐在蓝色的沙发上，两只狗在公园里玩耍。",
    "一張繁體中文的圖片",
    "a red cat sits on a blue sofa. Two dogs are playing in the park!",
    "three green circles, a café and the number 2024",
    "カタカナ ガギグ 한국어 네 é è ü",
]
SPECIAL = ["<n>", "<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", *BLANKS.values(), "<pad>"]
WORDS = [
    "cafe",
    "cat",
    "▁cat",
    "▁the",
    "the",
    "re",
    "▁a",
    "的",
    "的猫",
    "+",
    "++",
    "<",
    ")",
]
FAMILY = "👨‍👩‍👧‍👦"
TEXTS = [
    "一只红色的猫",
    "繁體中文：貓與狗，龘靐齉",
    "ＦＵＬＬ　ｗｉｄｔｈ　１２３！？",
    f"family {FAMILY} 👍🏽 🏳️‍🌈 🇨🇳 ❤️",
    "",
    " ",
    "  two  spaces   three " + 10 * " " + "ten" + 23 * " ",
    "tab\tline\nfeed\r\n　ideographic\u00a0no-break\u200bzero\ufeffbom\x00nul\x01",
    "[CLS] x[MASK]y <|endoftext|><|blank_3|>[UNK]<n> <unk> <s> </s> <pad>",
    "▁ ▁▁cat▁ a▁b ＜ ➕",
    "的wind的nbe的\r\n\r的龘龘靐",
    "catcafe the red cat +++ Microsoft 20242024",
    "кириллица عربى עברית हिन्दी ไทย 한국어 にほんご café",
    "a" * 500,
    "a red cat on a blue sofa. 一只红色的猫 " * 400,
    "猫" * MAX_TEXT_CHARACTERS,
]


@functools.cache
def small_model(**changes: Any) -> bytes:
    """Train a GLM-style model; the last pieces imitate later additions to a vocabulary."""
    model = io.BytesIO()
    asked: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 300,
        "hard_vocab_limit": False,
        "character_coverage": 1.0,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": (*SPECIAL, *WORDS),
    } | changes
    asked["user_defined_symbols"] = list(asked["user_defined_symbols"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, **asked
    )
    # one made between older ones, one that only another order makes, one that a word forbids
    return model.getvalue() + piece("nb", -1.5) + piece("wind", -0.5) + piece("a▁cat", -0.5)


def piece(text: str, score: float, kind: int = 1) -> bytes:
    """Return one more piece, to be appended to a model file."""
    raw = text.encode()
    content = bytes([10, len(raw), *raw, 21, *struct.pack("<f", score), 24, kind])
    return bytes([10, len(content)]) + content


@functools.cache
def model_bytes(name: str) -> bytes:
    return small_model() if name == "small" else OFFICIAL.read_bytes()


@functools.cache
def released(name: str = "small", max_length: int = 52, side: str = "left") -> ReleasedTokenizer:
    return ReleasedTokenizer(model_bytes(name), max_length=max_length, truncation_side=side)  # pyright: ignore[reportArgumentType]


@functools.cache
def fast_of(name: str, side: str = "left") -> PreTrainedTokenizerFast:
    return released(name, side=side).to_fast()


both = pytest.mark.parametrize("name", ["small", pytest.param("released", marks=needs_official)])
