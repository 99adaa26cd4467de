"""The released tokenizer through SentencePiece: the official ids, truncation, and which model fits.

Held on a small model trained here with the same settings and special pieces, and on the released
one where it lies beside us. Its fast form: test_released_fast.py.
"""

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
from released_model import (
    CONFORMANCE,
    CORPUS,
    OFFICIAL,
    TEXTS,
    both,
    fast_of,
    needs_official,
    released,
    small_model,
)

from m2encoder.errors import DataError
from m2encoder.released_tokenizer import ReleasedTokenizer, load_tokenizer
from m2encoder.tokenizer import TextTokenizer, train_tokenizer

# ── against the official ids ────────────────────────────────────────────────────────────────────


@needs_official
@pytest.mark.parametrize(
    ("file", "count", "differ"),
    [
        (
            "tokenizer_cases.json",
            238,
            ["[CLS][SEP]", "[MASK] x", "[UNK]", "<|endoftext|>", "x<|endoftext|>y"],
        ),
        ("tokenizer_cases_len16.json", 16, []),
    ],
)
def test_official_ids_and_masks_but_for_five_literals(
    file: str, count: int, differ: list[str]
) -> None:
    """The five hold special pieces, around which the official class splits before SentencePiece."""
    content = json.loads((CONFORMANCE / file).read_text(encoding="utf-8"))
    cases, length = content["cases"], content["max_length"]
    assert len(cases) == count
    texts = [case["text"] for case in cases]
    inputs = fast_of("released")(texts, truncation=True, padding="max_length", max_length=length)
    batch = released("released", length)(texts)
    different = []
    for i, case in enumerate(cases):
        padding = length - batch.ids.shape[1]
        ids = [*batch.ids[i].tolist(), *padding * [content["pad_id"]]]
        mask = [*batch.mask[i].tolist(), *padding * [0]]
        assert (inputs["input_ids"][i], inputs["attention_mask"][i]) == (ids, mask), case["text"]
        if (ids, mask) != (case["input_ids"], case["attention_mask"]):
            assert case["category"] == "special_literal"
            different.append(case["text"])
    assert sorted(different) == sorted(differ)


@needs_official
def test_special_literals_are_the_plain_pieces_of_sentencepiece() -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(OFFICIAL))
    content = json.loads((CONFORMANCE / "tokenizer_cases.json").read_text(encoding="utf-8"))
    texts = [c["text"] for c in content["cases"] if c["category"] == "special_literal"]
    assert len(texts) > 5
    for text in texts:
        assert released("released").encode(text) == [50002, *plain.encode(text), 50000]
    assert released("released").encode("[CLS]").count(50002) == 2


# ── what an encoding looks like ─────────────────────────────────────────────────────────────────


def test_blank_runs_are_one_piece_each_and_the_rest_of_longer_ones_another() -> None:
    plain = sentencepiece.SentencePieceProcessor(model_proto=small_model())
    ids = released().encode("的  的" + 13 * " ")
    assert [plain.id_to_piece(i) for i in ids] == [
        "[CLS]", "▁", "的", "<|blank_2|>", "的", "<|blank_10|>", "<|blank_3|>", "<|endoftext|>",
    ]  # fmt: skip


def test_the_end_pads_and_only_the_mask_tells_which_is_real() -> None:
    ours = released()
    assert ours.pad_id == ours.end_id != ours.cls_id
    batch = ours(["", "的猫<|endoftext|>"])
    assert batch.ids[0].tolist() == [ours.cls_id, *4 * [ours.end_id]]
    assert batch.ids[1, -2:].tolist() == 2 * [ours.end_id]
    assert batch.mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_ids_of_special_pieces_are_looked_up() -> None:
    plain = sentencepiece.SentencePieceProcessor(model_proto=small_model())
    ours = released()
    assert (ours.cls_id, ours.end_id) == (
        plain.piece_to_id("[CLS]"),
        plain.piece_to_id("<|endoftext|>"),
    )
    assert ours.vocab_size == plain.vocab_size()


def test_truncation_keeps_the_end_or_the_start_at_choice() -> None:
    text = "a red cat sits on a blue sofa 一只红色的猫"
    inner = released(max_length=1000).encode(text)[1:-1]
    assert len(inner) > 6
    assert released(max_length=7).encode(text)[1:-1] == inner[-5:]
    assert released(max_length=7, side="right").encode(text)[1:-1] == inner[:5]


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_very_long_text_the_kept_ids_are_the_ones_without_a_cut(name: str, side: str) -> None:
    ours = released(name, side=side)
    plain = sentencepiece.SentencePieceProcessor(model_proto=ours.model)
    for text in ("a red cat on a blue sofa. " * 2000, "一只红色的猫，" * 9999, " " * 30_000):
        blanked = text.replace(10 * " ", "<|blank_10|>")
        ids = plain.encode(blanked)
        assert ours.encode(text)[1:-1] == (ids[-50:] if side == "left" else ids[:50])


def test_no_texts_make_an_empty_batch() -> None:
    assert released()([]).ids.shape == released()([]).mask.shape == (0, 0)


def test_half_a_surrogate_pair_is_one_line() -> None:
    with pytest.raises(DataError, match=r"half of a surrogate pair \(character 4\), expected"):
        released().encode("cat \ud83d")


def test_a_pickled_tokenizer_gives_the_same_ids() -> None:
    ours = ReleasedTokenizer(
        small_model(), max_length=9, truncation_side="right", text_normalization="lower-quotes"
    )
    again = pickle.loads(pickle.dumps(ours))
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert again.pad_id == ours.pad_id


# ── which model is which ────────────────────────────────────────────────────────────────────────


def test_a_model_file_of_either_kind_is_told_by_its_pieces(tmp_path: Path) -> None:
    path = tmp_path / "sp.model"
    path.write_bytes(small_model())
    found = load_tokenizer(path, max_length=9, truncation_side="right")
    assert isinstance(found, ReleasedTokenizer)
    assert (found.max_length, found.truncation_side, found.text_normalization) == (
        9, "right", "none",
    )  # fmt: skip
    path.write_bytes(train_tokenizer(CORPUS, vocab_size=500))
    found = load_tokenizer(path, max_length=9, text_normalization="lower-quotes")
    assert isinstance(found, TextTokenizer)
    assert found.encode("RED") == found.encode("red")


def test_a_model_of_a_third_kind_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sp.model"
    path.write_bytes(small_model(user_defined_symbols=("[CLS]", "<|blank_2|>")))
    with pytest.raises(DataError) as caught:
        load_tokenizer(path, max_length=52)
    message = str(caught.value)
    assert "\n" not in message
    assert (
        f"{path}: this SentencePiece model begins with <unk> <s> </s> [CLS] and has no" in message
    )
    assert "no <|endoftext|> <|blank_10|>" in message
    assert "<|blank_2|>" not in message
    assert message.endswith("train one of ours with: m2enc tokenizer train")


def test_files_that_are_no_model_are_one_line_with_their_path(tmp_path: Path) -> None:
    path = tmp_path / "sp.model"
    with pytest.raises(DataError, match=r"sp\.model: no such tokenizer"):
        load_tokenizer(path, max_length=52)
    for content in (b"", b"junk", small_model()[:50]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"sp\.model: .* SentencePiece model") as caught:
            load_tokenizer(path, max_length=52)
        assert "\n" not in str(caught.value)


def test_one_of_ours_is_refused_as_a_released_one() -> None:
    with pytest.raises(DataError, match=r"has no \[CLS\] <\|endoftext\|> .*came with the weights"):
        ReleasedTokenizer(train_tokenizer(CORPUS, vocab_size=500))


@pytest.mark.parametrize("rule", ["identity", "nfkc"])
def test_only_the_released_folding_is_taken(rule: str) -> None:
    with pytest.raises(DataError, match=r"does not fold full-width text and line ends, expected"):
        ReleasedTokenizer(small_model(normalization_rule_name=rule))


def test_a_model_cut_short_between_two_pieces_is_one_line(tmp_path: Path) -> None:
    """SentencePiece opens such a file, and makes other ids with it."""
    model = small_model()
    path = tmp_path / "sp.model"
    opened = 0
    for size in range(3000, 3100):
        try:
            sentencepiece.SentencePieceProcessor(model_proto=model[:size])
        except RuntimeError:
            continue
        opened += 1
        path.write_bytes(model[:size])
        with pytest.raises(DataError, match=r"sp\.model: .* nmt_nfkc .* file complete\?"):
            load_tokenizer(path, max_length=52)
    assert opened > 2
