"""Which FAISS index a set of vectors gets, how it is trained, and how much of it a search reads.

Not for storing it (index_files.py) nor for searching (index_search.py).
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from m2encoder.index_meta import Ann, IndexSettings, SearchKind
from m2encoder.index_search import BLOCK_ROWS, AnnIndex, Nearest, Rows, Vectors, exact_nearest

logger = logging.getLogger(__name__)

MIN_POINTS_PER_LIST, POINTS_PER_LIST = 39, 100
"""Below 39 faiss warns on the terminal; 100 is what autofaiss trains with."""
MAX_SAMPLE_BYTES = 1 << 30
SAMPLE_QUERIES = 256
RECALL_K = 10
HNSW_LINKS = 32
NEARLY_EQUAL = 1e-6
"""Cosines this close are a tie: either of two equal pictures counts as found."""


class Measured(NamedTuple):
    """Queries by kind, and the scores of what is truly nearest to each."""

    queries: dict[str, Vectors]
    itself: dict[str, Rows]
    """Per query the row of the same picture, which does not count; -1 if there is none."""
    worst: dict[str, NDArray[np.float32]]
    """Per query the score of the last of its true ten."""


def choose_kind(count: int, dim: int, settings: IndexSettings) -> SearchKind:
    """Return how `count` vectors are to be searched."""
    if settings.kind != "auto":
        return settings.kind if count else "flat"
    budget_mb = settings.memory_budget_mb
    fits = budget_mb is None or count * dim * 4 <= budget_mb * 1_000_000
    return "flat" if fits and count <= settings.flat_limit else "ivf"


def num_lists(count: int) -> int:
    """Return the number of lists for `count` vectors, after autofaiss' rules.

    Up to a million 4 sqrt(count) as a power of two, but 39 vectors per list at least; then 16,384
    to ten million, 65,536 to 300 million, 131,072 above.
    """
    if count > 1_000_000:
        return 16_384 if count <= 10_000_000 else 65_536 if count <= 300_000_000 else 131_072
    wished = round(math.log2(4 * math.sqrt(max(count, 1))))
    possible = math.floor(math.log2(max(count, 1) / MIN_POINTS_PER_LIST + 1e-9))
    return 2 ** max(0, min(wished, possible))


def train(
    vectors: Vectors, live: Rows, kind: Literal["ivf", "hnsw"], settings: IndexSettings
) -> Any:
    """Return an empty faiss index for the vectors at rows `live`, trained on a sample of them."""
    dim = vectors.shape[1]
    if kind == "hnsw":
        index: Any = faiss.index_factory(dim, f"HNSW{HNSW_LINKS},SQ8", faiss.METRIC_INNER_PRODUCT)
        points = 10_000
    else:
        lists = num_lists(len(live))
        description = f"IVF{lists},SQ8"
        index = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = settings.seed + 1234
        points = min(POINTS_PER_LIST * lists, MAX_SAMPLE_BYTES // (4 * dim))
        points = max(points, MIN_POINTS_PER_LIST * lists)
    rng = np.random.default_rng(settings.seed)
    sample = np.sort(rng.choice(live, min(points, len(live)), replace=False))
    logger.info("training the index on %s of %s vectors", f"{len(sample):,}", f"{len(live):,}")
    index.train(vectors[sample])
    return index


def add_rows(index: Any, vectors: Vectors, rows: Rows) -> None:
    """Add the vectors at `rows`; an HNSW index must get all of them, from row 0 on."""
    for some in _blocks(rows):
        if isinstance(index, faiss.IndexHNSW):
            index.add(vectors[some])
        else:
            index.add_with_ids(vectors[some], some)


def tune(
    index: Any,
    facts: Ann,
    vectors: Vectors,
    live: Rows,
    settings: IndexSettings,
    words: Vectors | None = None,
) -> Ann:
    """Choose how many lists a search reads so that it finds `settings.recall` of the true ten.

    Chosen on one half of the queries, stated for the other; where that falls short, more lists are
    read. Never fewer than `facts.probes`. words: (M, D) vectors of texts, which lie elsewhere than
    pictures and find other lists.
    """
    rng = np.random.default_rng(settings.seed + 1)
    chosen_on = _measure(vectors, live, rng, None if words is None else words[0::2])
    stated_on = _measure(vectors, live, rng, None if words is None else words[1::2])
    steps = _steps(index, facts.kind)
    steps = [step for step in steps if step >= facts.probes] or steps[-1:]
    probes = next((p for p in steps if _reaches(index, facts, p, vectors, chosen_on, settings)), 0)
    probes = probes or steps[-1]
    for more in [step for step in steps if step >= probes]:
        recalls = _recalls(AnnIndex(index, facts.kind, more), vectors, stated_on)
        probes = more
        if min(recalls.values()) >= settings.recall:
            break
    if min(recalls.values()) < settings.recall:
        logger.warning("recall@10 is %.3f, asked for %.2f", min(recalls.values()), settings.recall)
    elif facts.kind == "ivf" and probes > max(8, facts.lists // 4):
        logger.warning(
            "the vectors hardly cluster: a search reads %d of %d lists", probes, facts.lists
        )
    asked = {name: len(queries) for name, queries in stated_on.queries.items()}
    return replace(facts, probes=probes, recall_at_10=recalls, queries=asked)


def _steps(index: Any, kind: str) -> list[int]:
    """Return the widths to try: 1, 2, 3, 4, 6, 8, 12, ... as far as the index goes."""
    last = index.nlist if kind == "ivf" else 1024
    powers = [2**i for i in range(last.bit_length())]
    steps = {step for power in powers for step in (power, power * 3 // 2) if step <= last}
    return sorted(steps | {last})


def _reaches(
    index: Any, facts: Ann, probes: int, vectors: Vectors, on: Measured, settings: IndexSettings
) -> bool:
    recalls = _recalls(AnnIndex(index, facts.kind, probes), vectors, on)
    return min(recalls.values()) >= settings.recall


def _measure(
    vectors: Vectors, live: Rows, rng: np.random.Generator, words: Vectors | None
) -> Measured:
    """Draw pictures of the index as queries, take the words too, and find what is truly nearest."""
    own = np.sort(rng.choice(live, min(SAMPLE_QUERIES, len(live)), replace=False))
    queries, itself = {"pictures": vectors[own]}, {"pictures": own}
    if words is not None and len(words):
        queries["words"] = np.ascontiguousarray(words)
        itself["words"] = np.full(len(words), -1, np.int64)
    worst = {}
    for name, some in queries.items():
        found = _without(exact_nearest(vectors, some, RECALL_K + 1, live), itself[name])
        worst[name] = found.scores[:, -1]
    return Measured(queries, itself, worst)


def _recalls(ann: AnnIndex, vectors: Vectors, on: Measured) -> dict[str, float]:
    """Return by kind of query the mean share of the true ten that the index finds."""
    recalls = {}
    for name, queries in on.queries.items():
        found = _without(ann.nearest(vectors, queries, RECALL_K + 1), on.itself[name])
        right = found.scores >= on.worst[name][:, None] - NEARLY_EQUAL
        recalls[name] = float(right.mean())
    return recalls


def _without(found: Nearest, itself: Rows) -> Nearest:
    """Take each query's own picture out, or else the last that was found: ten remain."""
    is_self = found.rows == itself[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    shape = (len(found.rows), found.rows.shape[1] - 1)
    return Nearest(found.scores[~is_self].reshape(shape), found.rows[~is_self].reshape(shape))


def _blocks(rows: Rows) -> Iterator[Rows]:
    return (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS))
