"""Single queries of a retrieval to look at: the worst failures and a few that went well.

Not for measuring (retrieval.py), nor for showing them (result_examples.py).
"""

# I images   T texts   D width of an embedding

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.pictures import Pictures
from m2encoder.ranks import Ranks, expected_ranks

Examples = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Asked:
    """What a retrieval was measured on."""

    image: NDArray[np.floating]
    """(I, D), unit norm."""
    text: NDArray[np.floating]
    """(T, D), unit norm."""
    owner: NDArray[np.integer]
    """(T,) the picture that each text describes."""
    pictures: Pictures
    texts: Sequence[str]

    def __post_init__(self) -> None:
        counts = (len(self.text), len(self.owner), len(self.texts))
        if len(set(counts)) != 1 or len(self.image) != len(self.pictures):
            raise ValueError(
                f"{counts[0]:,} text vectors, {counts[1]:,} owners and {counts[2]:,} texts, "
                f"{len(self.image):,} picture vectors and {len(self.pictures):,} pictures, "
                f"expected one for each"
            )


def retrieval_examples(
    asked: Asked,
    ranks: Mapping[str, NDArray[Any]],
    *,
    failures: int = 6,
    successes: int = 3,
    found: int = 4,
    seed: int = 0,
) -> Examples:
    """Return queries and what they found, for a result's details["examples"].

    ranks: what `measure_retrieval` returned: `t2i_above`, `t2i_image`, ... Of each picture at most
    one query. seed: draws the successes.
    Returns {"t2i": [...], "i2t": [...]}, failures first, each {"query": text or picture's name,
    "rank": of the right answer, from 1, "right": [...], "found": [{"name" or "text", "score"}]}.
    """
    examples: Examples = {}
    for direction in ("t2i", "i2t"):
        arrays = [ranks.get(f"{direction}_{name}") for name in (*Ranks._fields, "image")]
        if any(array is None for array in arrays):
            continue
        above, tied, right, image = (np.asarray(array, np.int64) for array in arrays)
        rank = expected_ranks(Ranks(above, tied, right)).value
        rows = _chosen(rank, image, failures=failures, successes=successes, seed=seed)
        examples[direction] = [
            _from_text(asked, row, rank[row], found)
            if direction == "t2i"
            else _from_picture(asked, int(image[row]), rank[row], found)
            for row in rows
        ]
    return examples


def _chosen(
    rank: NDArray[np.float64],
    image: NDArray[np.int64],
    *,
    failures: int,
    successes: int,
    seed: int,
) -> list[int]:
    """Return the rows of the worst queries, then of drawn ones that are right at once."""
    seen: set[int] = set()
    worst = _first_of_each(np.argsort(-rank, kind="stable"), image, seen, rank > 1, failures)
    drawn = np.random.default_rng(seed).permutation(len(rank))
    return worst + _first_of_each(drawn, image, seen, rank <= 1, successes)


def _first_of_each(
    order: NDArray[np.int64],
    image: NDArray[np.int64],
    seen: set[int],
    wanted: NDArray[np.bool_],
    count: int,
) -> list[int]:
    rows: list[int] = []
    for row in order.tolist():
        if len(rows) < count and wanted[row] and int(image[row]) not in seen:
            seen.add(int(image[row]))
            rows.append(row)
    return rows


def _from_text(asked: Asked, row: int, rank: float, found: int) -> dict[str, Any]:
    scores = asked.image @ asked.text[row]
    hits = [
        {"name": asked.pictures.name(place), "score": float(scores[place])}
        for place in _best(scores, found)
    ]
    right = [asked.pictures.name(int(asked.owner[row]))]
    return {"query": asked.texts[row], "rank": float(rank), "right": right, "found": hits}


def _from_picture(asked: Asked, image: int, rank: float, found: int) -> dict[str, Any]:
    scores = asked.text @ asked.image[image]
    hits = [
        {"text": asked.texts[place], "score": float(scores[place])}
        for place in _best(scores, found)
    ]
    right = [asked.texts[place] for place in np.flatnonzero(asked.owner == image).tolist()]
    name = asked.pictures.name(image)
    return {"query": name, "rank": float(rank), "right": right, "found": hits}


def _best(scores: NDArray[np.floating], count: int) -> list[int]:
    return np.argsort(-scores, kind="stable")[:count].tolist()
