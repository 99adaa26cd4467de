"""Our own bilingual SentencePiece tokenizer: train it, encode with it, hand it on as a fast one.

Training encodes with sentencepiece (about ten times faster); a model folder carries
`tokenizer.json`, which gives the same ids. Not for the released vocabulary.
"""

import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from m2encoder.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PAD_ID, UNK_ID, CLS_ID, END_ID = 0, 1, 2, 3
# Full-width brackets keep them out of reach: NFKC folds them, so no text can spell a special token.
PAD, UNK, CLS, END = "＜pad＞", "＜unk＞", "＜cls＞", "＜end＞"
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
    try:
        return NORMALIZER.normalize_str(text)
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds half of a surrogate pair (character {error.start}), expected valid "
            f"Unicode; read it again with the right encoding"
        ) from None


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


class TextTokenizer:
    """Encode texts with a SentencePiece model: [CLS] pieces [END], right-padded.

    truncation_side: which end of a too long text is dropped; `left` is the released behaviour.
    Thread and process safe; picklable.
    """

    def __init__(
        self, model: bytes, *, max_length: int, truncation_side: TruncationSide = "left"
    ) -> None:
        if not model:
            raise DataError("an empty file is no SentencePiece model; train one first")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({error}); train one first") from None
        size = self._processor.vocab_size()
        first = [self._processor.id_to_piece(i) for i in range(min(size, 4))]
        if first != [PAD, UNK, CLS, END]:
            raise DataError(
                f"this SentencePiece model begins with {' '.join(first) or 'nothing'}, expected "
                f"{PAD} {UNK} {CLS} {END}; train one of ours with: m2enc tokenizer train"
            )
        self.model = model
        self.max_length = max_length
        self.truncation_side: TruncationSide = truncation_side

    @classmethod
    def load(
        cls, path: Path, *, max_length: int, truncation_side: TruncationSide = "left"
    ) -> "TextTokenizer":
        """Read `sp.model`. Raises DataError if it is missing or no SentencePiece model."""
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer; train one with: m2enc tokenizer train")
        return cls(path.read_bytes(), max_length=max_length, truncation_side=truncation_side)

    @property
    def vocab_size(self) -> int:
        """Pieces, special ones included."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, truncated, special tokens included."""
        keep = self.max_length - 2
        ids: list[int] = self._processor.encode(normalize(clip(text, self.truncation_side)))
        ids = ids[max(0, len(ids) - keep) :] if self.truncation_side == "left" else ids[:keep]
        return [CLS_ID, *ids, END_ID]

    def __call__(self, texts: Sequence[str]) -> TextBatch:
        """Return ids and mask (M, L), padded to the longest of these texts."""
        rows = [self.encode(text) for text in texts]
        ids = np.full((len(rows), max(map(len, rows), default=0)), PAD_ID, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return TextBatch(ids, mask)

    def to_fast(self) -> PreTrainedTokenizerFast:
        """Return the same tokenizer for transformers; no text can spell a special token.

        Ids are equal for every text (tests compare random Unicode), as far as `clip` reaches: a
        longer text is cut before it is split here, after it there.
        """
        sp = self._processor
        vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
        fast = Tokenizer(
            models.BPE(vocab, _merges(sp), unk_token=UNK, fuse_unk=True, byte_fallback=True)
        )
        fast.normalizer = NORMALIZER
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        fast.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=True)]
        )
        fast.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {END}", special_tokens=[(CLS, CLS_ID), (END, END_ID)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=fast,
            pad_token=PAD,
            unk_token=UNK,
            cls_token=CLS,
            eos_token=END,
            model_max_length=self.max_length,
            truncation_side=self.truncation_side,
            padding_side="right",
            split_special_tokens=True,
            model_input_names=["input_ids", "attention_mask"],
        )


def _merges(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Return BPE merges in the order SentencePiece makes them: best scored result first."""
    special = {PAD_ID, UNK_ID, CLS_ID, END_ID}
    scores = {
        processor.id_to_piece(i): processor.get_score(i)
        for i in range(processor.vocab_size())
        if i not in special and not processor.is_byte(i)
    }
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def write_tokenizer_class(folder: Path) -> None:
    """Name a tokenizer class in `folder` that transformers 4.57 and 5 both open.

    transformers 5 writes TokenizersBackend, which 4.57 rejects.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
