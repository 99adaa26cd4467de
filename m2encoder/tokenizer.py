"""Our own bilingual SentencePiece tokenizer: train it, encode with it, hand it on as a fast one.

Training encodes with sentencepiece (about ten times faster); a model folder carries
`tokenizer.json`, which gives the same ids. Not for the released vocabulary
(released_tokenizer.py), which shares the base class here.
"""

import io
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from m2encoder.errors import ConfigError, DataError
from m2encoder.text_normalization import TextNormalization, normalizing

logger = logging.getLogger(__name__)

PAD_ID, UNK_ID, CLS_ID, END_ID = 0, 1, 2, 3
# Full-width brackets keep them out of reach: NFKC folds them, so no text can spell a special token.
PAD, UNK, CLS, END = "＜pad＞", "＜unk＞", "＜cls＞", "＜end＞"
OUR_PIECES = [PAD, UNK, CLS, END]
ASCII = "".join(map(chr, range(33, 127)))
MAX_SENTENCE_BYTES = 65_536
MAX_TEXT_CHARACTERS = 10_000
"""Characters of a text that are looked at; far beyond any model's token limit."""
NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.Replace(Regex(r"[\s\x{2581}]+"), " "),
        normalizers.Strip(),
    ]
)

TruncationSide = Literal["left", "right"]


class TextBatch(NamedTuple):
    """Texts as the model takes them."""

    ids: np.ndarray[Any, Any]  # (M, L) int64, right-padded
    mask: np.ndarray[Any, Any]  # (M, L) int64, 1 where real


def normalize(text: str) -> str:
    """Fold to NFKC (full-width letters become ASCII), then one space between words, none outside.

    Done here and in `tokenizer.json` by one and the same normalizer, never inside SentencePiece,
    whose own rules do not carry over to the fast tokenizer, nor by Python, whose Unicode tables are
    others in every version. Raises DataError on half of a surrogate pair, which is no character.
    """
    return apply(NORMALIZER, text)


def apply(normalizer: normalizers.Normalizer | None, text: str) -> str:
    """Run a normalizer over a text. Raises DataError on half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds half of a surrogate pair (character {error.start}), expected valid "
            f"Unicode; read it again with the right encoding"
        ) from None
    return text if normalizer is None else normalizer.normalize_str(text)


def clip(text: str, side: TruncationSide) -> str:
    """Return the part of a long text that is looked at; truncation drops the rest anyway."""
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text
    text = text.strip()
    return text[-MAX_TEXT_CHARACTERS:] if side == "left" else text[:MAX_TEXT_CHARACTERS]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a BPE model with byte fallback on zh and en texts; returns the bytes of `sp.model`.

    BPE, not unigram: SentencePiece seeds unigram pieces with maximal repeats, so a word that always
    stands before a space is never a candidate; short captions then fall into letters.
    vocab_size is an upper bound: little text gives fewer pieces. Raises DataError without texts and
    ConfigError if it is too small for the characters seen (256 bytes and ASCII are always in).
    """
    sentences = list(_normalized(texts))
    if not sentences:
        raise DataError("no text to train a tokenizer on, expected zh and en captions")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=ASCII,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=1,  # the same texts give the same model
            minloglevel=2,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=CLS_ID,
            eos_id=END_ID,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=CLS,
            eos_piece=END,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].partition(" or decrease")[0] or str(error).strip()
        raise ConfigError(
            f"cannot train a tokenizer of vocab_size {vocab_size} on {len(sentences):,} texts: "
            f"{reason}"
        ) from None
    return model.getvalue()


def _normalized(texts: Iterable[str]) -> Iterator[str]:
    """Yield what is left to train on; a broken text is no reason to stop."""
    for text in texts:
        try:
            line = normalize(text)
        except DataError as error:
            logger.warning("left out of the tokenizer's training: %s", error)
            continue
        if line:
            yield line


class SentencePieceTokenizer(ABC):
    """What our own tokenizer and the released one share: [CLS] pieces [END], right-padded.

    truncation_side: which end of a too long text is dropped; `left` is the released behaviour.
    text_normalization: what is done to a text first (text_normalization.py).
    Thread and process safe; picklable.
    """

    pad_id: int
    cls_id: int
    end_id: int

    def __init__(
        self,
        model: bytes,
        *,
        max_length: int,
        truncation_side: TruncationSide,
        text_normalization: TextNormalization,
    ) -> None:
        self._processor = open_sentencepiece(model)
        self.model = model
        self.max_length = max_length
        self.truncation_side: TruncationSide = truncation_side
        self.text_normalization: TextNormalization = text_normalization

    @property
    def vocab_size(self) -> int:
        """Pieces, special ones included."""
        return self._processor.vocab_size()

    @abstractmethod
    def prepare(self, text: str) -> str:
        """Return a text as SentencePiece gets it. Raises DataError on half of a surrogate pair."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, truncated, special tokens included."""
        keep = self.max_length - 2
        ids: list[int] = self._processor.encode(self.prepare(text))
        ids = ids[max(0, len(ids) - keep) :] if self.truncation_side == "left" else ids[:keep]
        return [self.cls_id, *ids, self.end_id]

    def __call__(self, texts: Sequence[str]) -> TextBatch:
        """Return ids and mask (M, L), padded to the longest of these texts."""
        rows = [self.encode(text) for text in texts]
        ids = np.full((len(rows), max(map(len, rows), default=0)), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return TextBatch(ids, mask)

    @abstractmethod
    def to_fast(self) -> PreTrainedTokenizerFast:
        """Return the same tokenizer for transformers."""

    def wrap(
        self, fast: Tokenizer, *, pad: str, unk: str, cls: str, end: str
    ) -> PreTrainedTokenizerFast:
        """Return `fast` as transformers takes it; no special token is looked for in a text."""
        fast.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {end}", special_tokens=[(cls, self.cls_id), (end, self.end_id)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=fast,
            pad_token=pad,
            unk_token=unk,
            cls_token=cls,
            eos_token=end,
            model_max_length=self.max_length,
            truncation_side=self.truncation_side,
            padding_side="right",
            split_special_tokens=True,
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
        )


def open_sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return the processor of the bytes of an `sp.model`. Raises DataError if they are none."""
    if not model:
        raise DataError("an empty file is no SentencePiece model; train one first")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise DataError(f"not a SentencePiece model ({error}); train one first") from None


class TextTokenizer(SentencePieceTokenizer):
    """Encode texts with a SentencePiece model of ours; texts are normalised as `normalize` says."""

    pad_id, cls_id, end_id = PAD_ID, CLS_ID, END_ID

    def __init__(
        self,
        model: bytes,
        *,
        max_length: int,
        truncation_side: TruncationSide = "left",
        text_normalization: TextNormalization = "none",
    ) -> None:
        super().__init__(
            model,
            max_length=max_length,
            truncation_side=truncation_side,
            text_normalization=text_normalization,
        )
        first = first_pieces(self._processor)
        if first != OUR_PIECES:
            raise DataError(
                f"this SentencePiece model begins with {' '.join(first) or 'nothing'}, expected "
                f"{' '.join(OUR_PIECES)}; train one of ours with: m2enc tokenizer train"
            )
        self._normalizer = normalizing(NORMALIZER, text_normalization)

    def prepare(self, text: str) -> str:
        """Return the part of a text that is looked at, normalised."""
        return apply(self._normalizer, clip(text, self.truncation_side))

    def to_fast(self) -> PreTrainedTokenizerFast:
        """Return the same tokenizer for transformers; no text can spell a special token.

        Ids are equal for every text (tests compare random Unicode), as far as `clip` reaches: a
        longer text is cut before it is split here, after it there.
        """
        sp = self._processor
        vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
        scores = {
            piece: sp.get_score(i)
            for piece, i in vocab.items()
            if piece not in OUR_PIECES and not sp.is_byte(i)
        }
        fast = Tokenizer(
            models.BPE(vocab, bpe_merges(scores), unk_token=UNK, fuse_unk=True, byte_fallback=True)
        )
        fast.normalizer = self._normalizer  # pyright: ignore[reportAttributeAccessIssue]
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        fast.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=True)]
        )
        return self.wrap(fast, pad=PAD, unk=UNK, cls=CLS, end=END)


def first_pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Return the first pieces of a model, which tell ours from others."""
    return [processor.id_to_piece(i) for i in range(min(processor.vocab_size(), len(OUR_PIECES)))]


def read_model(path: Path) -> bytes:
    """Read `sp.model`. Raises DataError if it is missing."""
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; train one with: m2enc tokenizer train")
    return path.read_bytes()


def bpe_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return BPE merges in the order SentencePiece makes them: best scored result first."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def write_tokenizer_class(folder: Path) -> None:
    """Make the tokenizer saved in `folder` open in transformers 4.57 and 5, and without them.

    transformers 5 names the class TokenizersBackend, which 4.57 rejects.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if config.get("split_special_tokens"):  # one of ours or a released one
        _write_whole_definition(folder / "tokenizer.json", config)


def _write_whole_definition(path: Path, config: dict[str, Any]) -> None:
    """Make `tokenizer.json` complete for those who read no `tokenizer_config.json`.

    transformers saves special tokens as ones to look for in a text, and whatever truncation and
    padding its last call had. It adds the tokens again when it opens the file.
    """
    definition = json.loads(path.read_text(encoding="utf-8"))
    pad = config["pad_token"]
    definition["added_tokens"] = []
    definition["truncation"] = {
        "direction": config["truncation_side"].capitalize(),
        "max_length": config["model_max_length"],
        "strategy": "LongestFirst",
        "stride": 0,
    }
    definition["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": definition["model"]["vocab"][pad],
        "pad_type_id": 0,
        "pad_token": pad,
    }
    path.write_text(json.dumps(definition, ensure_ascii=False) + "\n", encoding="utf-8")
