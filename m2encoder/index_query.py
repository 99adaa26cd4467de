"""What is searched for: words and pictures, to be had and to be avoided, as one vector.

Not for searching (index.py).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.encoder import Encoder, language_of
from m2encoder.errors import ConfigError, DataError
from m2encoder.images import IMAGE_SUFFIXES, open_image

MINUS_WEIGHT = 0.5
"""All texts have much in common, which a full minus would take away from the query too."""
WEIGHTED = re.compile(r"(?P<content>.*\S)\s*\^(?P<weight>\d+(\.\d+)?)", re.DOTALL)
SMALLEST_LENGTH = 1e-3


class Term(NamedTuple):
    """One part of a query."""

    content: str | Path
    """Words, or the path of a picture."""
    weight: float = 1.0
    """Below zero: to be avoided."""


def read_terms(
    query: str | None = None,
    *,
    image: Path | None = None,
    plus: Sequence[str] = (),
    minus: Sequence[str] = (),
) -> list[Term]:
    """Read the parts of a query; `query`, `plus` and `minus` are words or paths of pictures.

    A plus or minus term may end in its weight, as in `人^0.3`; without one it is 1 or MINUS_WEIGHT.
    Raises DataError on an empty term or a picture that is missing, ConfigError without anything to
    be had.
    """
    terms = [] if query is None else [Term(_content(query))]
    if image is not None:
        if not image.is_file():
            raise DataError(f"{image}: no such picture; check the path")
        terms.append(Term(image))
    for given, sign, usual in ((plus, 1, 1.0), (minus, -1, MINUS_WEIGHT)):
        for text in given:
            match = WEIGHTED.fullmatch(text)
            weight = float(match["weight"]) if match else usual
            terms.append(Term(_content(match["content"] if match else text), sign * weight))
    if not any(term.weight > 0 for term in terms):
        raise ConfigError("nothing to search for; give words, --image or --plus")
    return terms


def encode_terms(encoder: Encoder, terms: Sequence[Term]) -> NDArray[np.float32]:
    """Return the weighted sum of the terms' vectors, (1, D) float32, unit norm.

    Raises DataError if the terms cancel each other out, or on an unreadable picture.
    """
    total = np.zeros(encoder.dim, np.float32)
    for content, weight in terms:
        if isinstance(content, Path):
            picture = open_image(content, upright=True)  # as the index's own
            total += weight * encoder.encode_image(picture)[0]
        else:
            total += weight * encoder.encode_text(content)[0]
    length = float(np.linalg.norm(total))
    if not length > SMALLEST_LENGTH:  # also where it is NaN
        raise DataError(
            f"the terms of the query cancel each other out (length {length:.2g}); change weights"
        )
    return (total / length)[None]


def language_of_terms(terms: Sequence[Term]) -> str | None:
    """Return the language of a query that is one text; None for any other, never measured."""
    alone = terms[0].content if len(terms) == 1 else None
    return language_of(alone) if isinstance(alone, str) else None


def is_picture(query: str) -> bool:
    """Say whether a query is the path of a file, not words. Raises DataError if it is neither."""
    if not query.strip():
        raise DataError("the query is empty, expected words or the path of a picture; type some")
    if os.path.isfile(query):  # unlike Path.is_file, False on names that are too long to be one
        return True
    if Path(query[-8:]).suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{query}: no such picture; check the path")
    return False


def _content(text: str) -> str | Path:
    return Path(text) if is_picture(text) else text
