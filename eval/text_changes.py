"""Ways of writing the same text otherwise: script, width, case, punctuation, white space.

Not for measuring what they do to a model (robustness.py), nor for what a tokenizer folds itself.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module

from m2encoder.errors import MissingExtraError

Change = Callable[[str], str]

HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_TO_FULL = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
_TO_HALF = {full: half for half, full in _TO_FULL.items()}
_MARKS = {"，": ",", "。": ".", "！": "!", "？": "?", "：": ":", "；": ";", "（": "(", "）": ")"}
_TO_ASCII_MARKS = str.maketrans(_MARKS | {"“": '"', "”": '"', "‘": "'", "’": "'", "、": ","})
_TO_CHINESE_MARKS = str.maketrans({half: full for full, half in _MARKS.items()})


def to_full_width(text: str) -> str:
    """Write ASCII as its full-width forms, ＡＢＣ１２３."""
    return text.translate(_TO_FULL)


def to_half_width(text: str) -> str:
    """Write full-width forms of ASCII as ASCII."""
    return text.translate(_TO_HALF)


def without_punctuation(text: str) -> str:
    """Put a space in place of every punctuation mark (Unicode category P), one between words."""
    marks = (" " if unicodedata.category(each).startswith("P") else each for each in text)
    return " ".join("".join(marks).split())


def with_final_stop(text: str) -> str:
    """End the text in a full stop of its own script, or take it away where there is one."""
    if text.endswith((".", "。", "．")):
        return text[:-1]
    return text + ("。" if re.search(HAN, text) else ".")


def with_wide_spaces(text: str) -> str:
    """Double every space, and put one in front and behind."""
    return " " + text.replace(" ", "  ") + " "


def with_spaced_characters(text: str) -> str:
    """Put a space between Chinese characters."""
    return re.sub(rf"({HAN})(?={HAN})", r"\1 ", text)


def to_ascii_marks(text: str) -> str:
    """Write Chinese punctuation as ASCII."""
    return text.translate(_TO_ASCII_MARKS)


def to_chinese_marks(text: str) -> str:
    """Write ASCII punctuation as Chinese."""
    return text.translate(_TO_CHINESE_MARKS)


EVERYWHERE: Mapping[str, Change] = {
    "full_width": to_full_width,
    "half_width": to_half_width,
    "lower_case": str.lower,
    "upper_case": str.upper,
    "no_punctuation": without_punctuation,
    "ascii_punctuation": to_ascii_marks,
    "chinese_punctuation": to_chinese_marks,
    "final_stop": with_final_stop,
    "wide_spaces": with_wide_spaces,
}
CHINESE: Mapping[str, Change] = {"spaced_characters": with_spaced_characters}
SCRIPTS = {"traditional": "s2t", "simplified": "t2s"}
"""Changes that OpenCC makes, and its name for each."""


@cache
def script_change(name: str) -> Change:
    """Return the change `traditional` or `simplified`. Raises MissingExtraError without OpenCC."""
    try:
        opencc = import_module("opencc")
    except ImportError:
        raise MissingExtraError("opencc", extra="zh") from None
    return opencc.OpenCC(SCRIPTS[name]).convert


def changes_for(language: str) -> tuple[dict[str, Change], dict[str, str]]:
    """Return the changes that make sense in a language by name, and why others cannot be made."""
    changes = dict(EVERYWHERE)
    missing: dict[str, str] = {}
    if language.split("-")[0] == "zh":
        changes |= CHINESE
        for name in SCRIPTS:
            try:
                changes[name] = script_change(name)
            except MissingExtraError as error:
                missing[name] = str(error)
    return changes, missing
