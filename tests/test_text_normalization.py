"""The text normalisation setting: equal to the official clean-up, saved, and the same in both."""

import json
import unicodedata
from pathlib import Path

import pytest
from released_model import CONFORMANCE, OFFICIAL, TEXTS, released, small_model
from test_tokenizer import MODEL, tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from m2encoder.errors import ConfigError
from m2encoder.released_tokenizer import ReleasedTokenizer
from m2encoder.text_normalization import (
    LOWER_QUOTES,
    get_text_normalization,
    normalizing,
    set_text_normalization,
)
from m2encoder.tokenizer import TextTokenizer, write_tokenizer_class

CASED = [
    "A Red CAT says “Hello”",
    "Ａ　ＲＥＤ　ＣＡＴ　“１２３”",
    "繁體中文“貓”與‘狗’ ABC",
    "ÀÉÎ ÜBER ÇA İstanbul Ωμέγα ДОМ",
    "👨‍👩‍👧‍👦 OK",
    "[CLS] <|ENDOFTEXT|> <|endoftext|>",
    "A  B   C" + 12 * " ",
    "",
    "A RED CAT. " * 3000,
]
MAKE = {
    "ours": lambda value: TextTokenizer(MODEL, max_length=52, text_normalization=value),
    "released": lambda value: ReleasedTokenizer(small_model(), text_normalization=value),
}
both_kinds = pytest.mark.parametrize("kind", ["ours", "released"])


def cleaned(text: str) -> str:
    """Clean a text as the released retrieval script does."""
    return text.lower().replace("“", '"').replace("”", '"')


def test_only_letters_that_python_does_not_know_get_another_lower_case() -> None:
    every = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    differ = [c for c in every if LOWER_QUOTES.normalize_str(c) != cleaned(c)]
    assert [c for c in differ if unicodedata.category(c) != "Cn"] == []


def test_a_last_sigma_is_the_one_difference_inside_a_word() -> None:
    assert LOWER_QUOTES.normalize_str("ΟΔΟΣ Σ") == "οδοσ σ"
    assert cleaned("ΟΔΟΣ Σ") == "οδος σ"
    for text in CASED:
        assert LOWER_QUOTES.normalize_str(text) == cleaned(text)


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="the official fixtures are not beside us")
def test_texts_are_cleaned_as_the_official_script_cleans_them() -> None:
    lines = (CONFORMANCE / "retrieval_annotations.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["caption"]]
    expected = json.loads((CONFORMANCE / "retrieval_expected.json").read_text(encoding="utf-8"))
    found = [LOWER_QUOTES.normalize_str(caption) for caption in captions]
    assert found == expected["texts_after_preprocessing"]
    assert found != captions


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the released sp.model is not beside us")
def test_every_cleaned_caption_has_the_same_ids_in_both() -> None:
    ours = ReleasedTokenizer(OFFICIAL.read_bytes(), text_normalization="lower-quotes")
    captions = []
    for path in sorted(OFFICIAL.parent.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            captions += json.loads(line)["caption"]
    assert len(captions) == 32_063
    plain = released("released")
    found = ours.to_fast()(captions, truncation=True)["input_ids"]
    differ = [
        text
        for text, ids in zip(captions, found, strict=True)
        if not ids == ours.encode(text) == plain.encode(cleaned(text))
    ]
    assert differ == []


@both_kinds
def test_a_normalised_text_has_the_ids_of_the_cleaned_one(kind: str) -> None:
    ours, plain = MAKE[kind]("lower-quotes"), MAKE[kind]("none")
    for text in CASED + TEXTS:
        assert ours.encode(text) == plain.encode(cleaned(text))
    assert plain.encode("CAT") != plain.encode("cat")


@both_kinds
def test_the_fast_tokenizer_normalises_alike_and_keeps_the_setting(
    kind: str, tmp_path: Path
) -> None:
    texts = CASED + TEXTS
    expected = {value: MAKE[kind](value)(texts).ids.tolist() for value in ("none", "lower-quotes")}
    fast = MAKE[kind]("lower-quotes").to_fast()
    for number, value in enumerate(("lower-quotes", "none", "lower-quotes", "lower-quotes")):
        set_text_normalization(fast, value)  # pyright: ignore[reportArgumentType]
        folder = tmp_path / str(number)
        fast.save_pretrained(folder)
        write_tokenizer_class(folder)
        fast = AutoTokenizer.from_pretrained(folder)
        assert get_text_normalization(fast) == value
        assert fast(texts, padding=True, truncation=True)["input_ids"] == expected[value]


@both_kinds
def test_setting_it_back_restores_the_tokenizer_exactly(kind: str) -> None:
    fast = MAKE[kind]("none").to_fast()
    before = fast.backend_tokenizer.to_str()
    set_text_normalization(fast, "lower-quotes")
    once = fast.backend_tokenizer.to_str()
    set_text_normalization(fast, "lower-quotes")
    assert fast.backend_tokenizer.to_str() == once != before
    set_text_normalization(fast, "none")
    assert fast.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("own", [None, normalizers.NFC()])
def test_a_tokenizer_with_one_normalizer_or_none_gets_it_back(own: object) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, '"': 1, "?": 2}, unk_token="?"))
    if own is not None:
        backend.normalizer = own  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    before = fast.backend_tokenizer.to_str()
    assert get_text_normalization(fast) == "none"
    assert fast("A")["input_ids"] == [2]
    set_text_normalization(fast, "lower-quotes")
    assert [fast(text)["input_ids"] for text in ("A", "“")] == [[0], [1]]
    set_text_normalization(fast, "none")
    assert fast.backend_tokenizer.to_str() == before


def test_an_unknown_setting_is_one_line() -> None:
    message = r"^text normalisation 'upper' is unknown, expected one of none, lower-quotes$"
    fast = tokenizer().to_fast()
    before = fast.backend_tokenizer.to_str()
    with pytest.raises(ConfigError, match=message):
        set_text_normalization(fast, "upper")  # pyright: ignore[reportArgumentType]
    assert fast.backend_tokenizer.to_str() == before
    for kind in MAKE:
        with pytest.raises(ConfigError, match=message):
            MAKE[kind]("upper")


def test_none_in_front_of_nothing_is_nothing() -> None:
    assert normalizing(None, "none") is None
