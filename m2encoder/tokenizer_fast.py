"""A transformers tokenizer as training uses it, for text towers that bring their own.

Not for our own tokenizers (tokenizer.py).
"""

from typing import Protocol

from transformers import PreTrainedTokenizerFast


class TrainingTokenizer(Protocol):
    """What the training stream and a run ask of a tokenizer, whoever made it."""

    @property
    def vocab_size(self) -> int:
        """Pieces, special ones included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, truncated, special tokens included."""
        ...

    def to_fast(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer that a model folder holds."""
        ...


class FastTokenizer:
    """One of transformers' fast tokenizers; picklable."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Pieces, special ones included."""
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, truncated, special tokens included."""
        return self._tokenizer(text, truncation=True)["input_ids"]  # pyright: ignore[reportReturnType]

    def to_fast(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer itself."""
        return self._tokenizer
