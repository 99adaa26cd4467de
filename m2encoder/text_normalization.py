"""What may be done to a text in front of a tokenizer: nothing, or what retrieval protocols ask for.

A saved setting: it stands inside `tokenizer.json`, so that whoever opens a model folder applies it.
Not for what a tokenizer itself does to a text (tokenizer.py, released_tokenizer.py).
"""

from typing import Literal, get_args

from tokenizers.normalizers import Lowercase, Normalizer, Replace, Sequence
from transformers import PreTrainedTokenizerFast

from m2encoder.errors import ConfigError

TextNormalization = Literal["none", "lower-quotes"]

LOWER_QUOTES = Sequence([Lowercase(), Replace("“", '"'), Replace("”", '"')])
"""Lower-case letters and straight double quotes, the clean-up of the released retrieval script.

That script calls Python's `str.lower`. Each single character gets the same lower case here, but for
letters that Python's Unicode tables do not know yet (8 in the basic plane under Python 3.11); in a
word, Python writes a last Σ as ς and this one, which looks at no neighbours, as σ.
"""


def normalizing(base: Normalizer | None, value: TextNormalization) -> Normalizer | None:
    """Return `base` with the normalisation called `value` in front; None does nothing.

    Raises ConfigError if it is unknown.
    """
    if value not in get_args(TextNormalization):
        known = ", ".join(get_args(TextNormalization))
        raise ConfigError(f"text normalisation {value!r} is unknown, expected one of {known}")
    steps = [*(_steps(LOWER_QUOTES) if value == "lower-quotes" else []), *_steps(base)]
    if len(steps) <= 1:
        return steps[0] if steps else None
    return Sequence(steps)


def get_text_normalization(fast: PreTrainedTokenizerFast) -> TextNormalization:
    """Return what `fast` does to a text in front of its own normalizers."""
    return _split(fast)[0]


def set_text_normalization(fast: PreTrainedTokenizerFast, value: TextNormalization) -> None:
    """Make `fast` do so from now on; saved with it. Raises ConfigError if `value` is unknown."""
    found, own = _split(fast)
    normalizer = normalizing(Sequence(own) if own else None, value)
    if found != value:
        fast.backend_tokenizer.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]


def _split(fast: PreTrainedTokenizerFast) -> tuple[TextNormalization, list[Normalizer]]:
    """Return the setting and the tokenizer's own normalizers behind it."""
    steps = _steps(fast.backend_tokenizer.normalizer)
    count = len(LOWER_QUOTES)
    states = [step.__getstate__() for step in steps[:count]]
    if states == [step.__getstate__() for step in _steps(LOWER_QUOTES)]:
        return "lower-quotes", steps[count:]
    return "none", steps


def _steps(normalizer: Normalizer | None) -> list[Normalizer]:
    if normalizer is None:
        return []
    if isinstance(normalizer, Sequence):
        return [normalizer[i] for i in range(len(normalizer))]
    return [normalizer]
