"""The tokenizer of the released models: SentencePiece as they were trained, and as a fast one.

Takes any model with the same special pieces. Not for our own tokenizer (tokenizer.py), which
`load_tokenizer` tells apart from it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from m2encoder.errors import CheckpointError, DataError
from m2encoder.text_normalization import TextNormalization, normalizing
from m2encoder.tokenizer import (
    MAX_TEXT_CHARACTERS,
    OUR_PIECES,
    SentencePieceTokenizer,
    TextTokenizer,
    TruncationSide,
    apply,
    bpe_merges,
    first_pieces,
    open_sentencepiece,
    read_model,
)

CLS, END = "[CLS]", "<|endoftext|>"
BLANKS = {n: f"<|blank_{n}|>" for n in range(10, 1, -1)}
"""Pieces for runs of so many spaces, the longest first, as they are put in."""
MARK = "▁"  # what SentencePiece writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of a piece in the model file: made by merges, never made (2, 3), found before any merge."""

# Field numbers of sentencepiece_model.proto: (message, field) -> name, default, what we can convert
SETTINGS = {
    (2, 3): ("trainer_spec.model_type", 1, 2),  # BPE
    (2, 24): ("trainer_spec.treat_whitespace_as_suffix", 0, 0),
    (2, 35): ("trainer_spec.byte_fallback", 0, 0),
    (3, 3): ("normalizer_spec.add_dummy_prefix", 1, 1),
    (3, 4): ("normalizer_spec.remove_extra_whitespaces", 1, 0),
    (3, 5): ("normalizer_spec.escape_whitespaces", 1, 1),
}
# Appended to a model file, replaces its normalizer_spec: no character map, no dummy prefix
PLAIN = bytes([3 << 3 | 2, 4, 2 << 3 | 2, 0, 3 << 3, 0])


class ReleasedTokenizer(SentencePieceTokenizer):
    """Encode texts as the released models were trained: [CLS] pieces <|endoftext|>, right-padded.

    Runs of 2 to 10 spaces become one piece each; padding has the id of the end, so that only the
    mask tells them apart. The model's special pieces are pieces like others: a text may spell them.
    Of a text over `MAX_TEXT_CHARACTERS` only that many are looked at, blanks included. The cut
    changes the ids next to it, which truncation drops; further ones only in a run of blanks or of
    one repeated syllable that reaches from the cut to the end that is kept.

    Raises DataError if the bytes are no SentencePiece model, one without these pieces, or one cut
    short, which SentencePiece opens where the cut lies between two pieces.
    """

    def __init__(
        self,
        model: bytes,
        *,
        max_length: int = 52,
        truncation_side: TruncationSide = "left",
        text_normalization: TextNormalization = "none",
    ) -> None:
        super().__init__(
            model,
            max_length=max_length,
            truncation_side=truncation_side,
            text_normalization=text_normalization,
        )
        if missing := _missing_pieces(self._processor):
            raise DataError(
                f"this SentencePiece model has no {' '.join(missing)}, expected the special pieces "
                f"of a released tokenizer; is it the sp.model that came with the weights?"
            )
        blank = BLANKS[2]
        if self._processor.encode("＜" + blank[1:] + "\n") != self._processor.encode(blank + " "):
            raise DataError(
                "this SentencePiece model does not fold full-width text and line ends, expected "
                "the normalizer nmt_nfkc as in a released one; is the file complete?"
            )
        self.cls_id: int = self._processor.piece_to_id(CLS)
        self.end_id: int = self._processor.piece_to_id(END)
        self.pad_id = self.end_id
        self._normalizer = normalizing(None, text_normalization)

    def prepare(self, text: str) -> str:
        """Return the part of a text that is looked at, with pieces for its runs of spaces."""
        if len(text) > MAX_TEXT_CHARACTERS:
            left = self.truncation_side == "left"
            text = text[-MAX_TEXT_CHARACTERS:] if left else text[:MAX_TEXT_CHARACTERS]
        text = apply(self._normalizer, text)
        for n, piece in BLANKS.items():
            text = text.replace(n * " ", piece)
        return text

    def to_fast(self) -> PreTrainedTokenizerFast:
        """Return the same tokenizer for transformers.

        Ids are equal for every single character of Unicode, and in tests for all captions of the
        official files and random strings of many scripts, as far as `MAX_TEXT_CHARACTERS` reach.
        They may differ where several characters stand for one: a letter before a combining mark
        (NFD accents; some Arabic and Indic marks), conjoining or compatibility jamo, half-width
        kana with a voicing mark. There the fast tokenizer folds graphemes, SentencePiece the
        longest run that its map knows. `unicodedata.normalize("NFKC", text)` makes both agree.

        Raises CheckpointError if the model has settings that cannot be written so.
        """
        pieces, charsmap = _read_model_file(self.model)
        sp = self._processor
        dead = _unreachable(self.model, pieces)
        unk = sp.id_to_piece(sp.unk_id()) + " "
        vocab = {
            # a normalised text has no space, so that no text holds such a piece
            piece + " " if kind not in (NORMAL, USER_DEFINED) or piece in dead else piece: i
            for i, (piece, _, kind) in enumerate(pieces)
        }
        scores = {p: score for p, score, kind in pieces if kind == NORMAL and p not in dead}
        merges = bpe_merges(scores)
        found_first = [piece for piece, _, kind in pieces if kind == USER_DEFINED]
        _check_pieces(pieces, charsmap, [piece for piece in scores if len(piece) > 1], merges)
        fast = Tokenizer(
            models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, ignore_merges=True)
        )
        fast.normalizer = normalizing(_normalizer(charsmap), self.text_normalization)  # pyright: ignore[reportAttributeAccessIssue]
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first(found_first)), "isolated")
        blanks = [decoders.Replace(piece, n * " ") for n, piece in BLANKS.items()]
        fast.decoder = decoders.Sequence(
            [*blanks, decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return self.wrap(fast, pad=END, unk=unk, cls=CLS, end=END)


def load_tokenizer(
    path: Path,
    *,
    max_length: int,
    truncation_side: TruncationSide = "left",
    text_normalization: TextNormalization = "none",
) -> TextTokenizer | ReleasedTokenizer:
    """Read an `sp.model` of either kind; its pieces say which.

    Raises DataError if it is missing, no SentencePiece model, cut short, or of a third kind.
    """
    model = read_model(path)
    try:
        processor = open_sentencepiece(model)
        first = first_pieces(processor)
        kind = TextTokenizer if first == OUR_PIECES else ReleasedTokenizer
        if kind is ReleasedTokenizer and (missing := _missing_pieces(processor)):
            raise DataError(
                f"this SentencePiece model begins with {' '.join(first)} and has no "
                f"{' '.join(missing)}, expected one of ours or a released one; train one of ours "
                f"with: m2enc tokenizer train"
            )
        return kind(
            model,
            max_length=max_length,
            truncation_side=truncation_side,
            text_normalization=text_normalization,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _missing_pieces(processor: Any) -> list[str]:
    """Return the special pieces that a model lacks, or that no text can spell, among blanks."""
    unk = processor.unk_id()
    missing = [piece for piece in (CLS, END) if processor.piece_to_id(piece) == unk]
    for piece in BLANKS.values():
        found = processor.piece_to_id(piece)
        if found == unk or processor.encode(piece)[-1:] != [found]:
            missing.append(piece)
    return missing


# ── the model file ──────────────────────────────────────────────────────────────────────────────


def _read_model_file(model: bytes) -> tuple[list[tuple[str, float, int]], bytes]:
    """Return pieces as (text, score, type) in the order of their ids, and the character map.

    sentencepiece tells neither a piece's type nor its character map, and its own reader needs
    protobuf. Raises CheckpointError if a setting is none that `to_fast` can convert.
    """
    pieces: list[tuple[str, float, int]] = []
    settings: dict[tuple[int, int], Any] = {}
    for message, content in _fields(model):
        if message == 1:
            piece = dict(_fields(content))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif message in (2, 3):
            settings |= {(message, field): value for field, value in _fields(content)}
    for place, (name, default, expected) in SETTINGS.items():
        if (found := settings.get(place, default)) != expected:
            raise CheckpointError(
                f"this SentencePiece model has {name} {found}, expected {expected} as in a "
                f"released one; it cannot be written as tokenizer.json"
            )
    return pieces, settings.get((3, 2), b"")


def _check_pieces(
    pieces: list[tuple[str, float, int]],
    charsmap: bytes,
    merged: list[str],
    merges: list[tuple[str, str]],
) -> None:
    """Raise CheckpointError on a piece that the fast tokenizer would not find as SentencePiece."""
    fold = normalizers.Precompiled(charsmap).normalize_str
    made = {left + right for left, right in merges}
    reasons = {
        "of a type that is not converted": [
            piece
            for piece, _, kind in pieces
            if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "user-defined, but its characters are folded into others": [
            piece
            for piece, _, kind in pieces
            if kind == USER_DEFINED and fold(piece).replace(" ", MARK) != piece
        ],
        "made of characters that are no pieces": [p for p in merged if p not in made],
    }
    for reason, found in reasons.items():
        if found:
            raise CheckpointError(
                f"this SentencePiece model has {len(found):,} pieces such as {found[0]!r}: "
                f"{reason}; it cannot be written as tokenizer.json"
            )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message's fields: int, or bytes if of another type."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: 0, 5: 4}[wire] or varint()
        yield number, message[at : at + size]
        at += size


def _unreachable(model: bytes, pieces: list[tuple[str, float, int]]) -> set[str]:
    """Return the normal pieces that SentencePiece never makes of their own text."""
    normal = [(i, piece) for i, (piece, _, kind) in enumerate(pieces) if kind == NORMAL]
    found = open_sentencepiece(model + PLAIN).encode([piece for _, piece in normal])
    return {piece for (i, piece), ids in zip(normal, found, strict=True) if ids != [i]}


# ── parts of the fast tokenizer ─────────────────────────────────────────────────────────────────


def _normalizer(charsmap: bytes) -> normalizers.Normalizer:
    """Return SentencePiece's normalisation, dummy prefix included, with the blank pieces put in.

    The prefix is a newline, which the character map turns into a space: a space would join the
    text's own blanks, and a mark would join an accent behind it.
    """
    return normalizers.Sequence(
        [
            normalizers.Prepend("\n"),
            *(normalizers.Replace(n * " ", piece) for n, piece in BLANKS.items()),
            normalizers.Replace("\r", "\n"),  # "\r\n" is one grapheme, which no map holds
            normalizers.Precompiled(charsmap),
            normalizers.Replace(" ", MARK),
        ]
    )


def longest_first(pieces: list[str]) -> str:
    """Return a regular expression that finds the longest of these pieces at a place.

    It is shaped like a trie; choices among many letters are halved and halved again by looking
    ahead, which makes it five times faster than trying one after the other.
    """
    trie: dict[str, Any] = {}
    for piece in pieces:
        node = trie
        for letter in piece:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _expression(trie)


def _expression(node: dict[str, Any]) -> str:
    last = sorted(letter for letter in node if letter and node[letter].keys() == {""})
    more = sorted(letter for letter in node if letter and letter not in last)
    ways = [(letter, _letter(letter) + _expression(node[letter])) for letter in more]
    choices = [f"[{''.join(map(_letter, last))}]"] if last else []
    if ways:
        choices.append(_choice(ways))
    if not choices:
        return ""
    return f"(?:{'|'.join(choices)})" + ("?" if "" in node else "")


def _choice(ways: list[tuple[str, str]]) -> str:
    if len(ways) <= 4:
        return "|".join(way for _, way in ways)
    half = len(ways) // 2
    return "|".join(
        f"(?=[{_letter(part[0][0])}-{_letter(part[-1][0])}])(?:{_choice(part)})"
        for part in (ways[:half], ways[half:])
    )


def _letter(letter: str) -> str:
    return letter if letter.isalnum() or letter == MARK else f"\\x{{{ord(letter):x}}}"
