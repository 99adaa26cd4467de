"""How alike a model takes Chinese and English captions of the same pictures.

Whether both find the same pictures, find each other, and find equally well. Not for labels in one
list (language_bias.py), changed texts (robustness.py), nor one language alone (retrieval.py).
"""

# I pictures   Q parallel captions   D width of an embedding

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.embed import PairEmbeddings, TextEmbeddings
from m2encoder.errors import DataError
from m2encoder.eval.agreement import kendall, overlap_at_k, spearman
from m2encoder.eval.bootstrap import DRAWS
from m2encoder.eval.exact_ranks import RightPairs, exact_ranks
from m2encoder.eval.means import change_metric, hits_metric, mean_metric
from m2encoder.eval.metric import Metric, TaskOutput
from m2encoder.eval.retrieval import retrieval_ranks
from m2encoder.eval.scores import check_vectors, paired_scores, score_blocks
from m2encoder.ranks import hits_at_k

KS = (1, 5, 10)
CORRELATED = 1000
"""Queries whose whole gallery is ordered for the rank correlations; more are sampled."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class ParallelCaptions:
    """Pictures and captions in two languages; row q of one says what row q of the other does."""

    languages: tuple[str, str]
    image: Vectors
    """(I, D) float32, unit norm: every picture, also those without captions."""
    first: Vectors
    """(Q, D) in the first language."""
    second: Vectors
    """(Q, D) in the second."""
    owner: NDArray[np.int64]
    """(Q,) the picture that both describe."""
    left_out: dict[str, int]
    """Captions per language that have no partner."""

    def __post_init__(self) -> None:
        count = len(self.owner)
        if not count:
            raise DataError(
                f"no picture has captions in both {self.languages[0]} and {self.languages[1]}, "
                f"parallel measures need some; check the data"
            )
        vectors = (self.image, self.first, self.second)
        for what, each in zip(("picture", *self.languages), vectors, strict=True):
            check_vectors(each, f"{what} vectors")
        if not len(self.first) == len(self.second) == count:
            raise ValueError(
                f"{len(self.first):,} and {len(self.second):,} captions and {count:,} owners, "
                f"expected one each"
            )
        if self.owner.min() < 0 or self.owner.max() >= len(self.image):
            raise ValueError(
                f"owners reach to {self.owner.max()}, expected below {len(self.image)}"
            )


def parallel_captions(
    image: Vectors,
    first: TextEmbeddings,
    second: TextEmbeddings,
    languages: tuple[str, str] = ("zh", "en"),
) -> ParallelCaptions:
    """Pair the captions of each picture by their order: the first with the first, and so on.

    Where a picture has more in one language, its last ones are left out and counted. Raises
    DataError if no picture has both.
    """
    places = [_places(text.owner) for text in (first, second)]
    known = {place: row for row, place in enumerate(places[1])}
    rows = [(row, known[place]) for row, place in enumerate(places[0]) if place in known]
    row_first, row_second = np.asarray(rows, np.int64).reshape(-1, 2).T
    return ParallelCaptions(
        languages,
        image,
        first.vectors[row_first],
        second.vectors[row_second],
        np.asarray(first.owner, np.int64)[row_first],
        {language: len(own) - len(rows) for language, own in zip(languages, places, strict=True)},
    )


def _places(owner: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return for each caption its picture, and how many of the picture's captions precede it."""
    seen: dict[int, int] = {}
    places: list[tuple[int, int]] = []
    for picture in np.asarray(owner).tolist():
        places.append((picture, seen.get(picture, 0)))
        seen[picture] = places[-1][1] + 1
    return places


def measure_bilingual(
    pairs: PairEmbeddings,
    languages: tuple[str, str] = ("zh", "en"),
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Measure everything in this file on a shard folder's embeddings.

    Raises DataError if no picture has captions in both languages.
    """
    for language in languages:
        if language not in pairs.texts:
            raise DataError(f"no captions in {language}, parallel measures need some")
    first, second = (pairs.texts[language] for language in languages)
    parallel = parallel_captions(pairs.image, first, second, languages)
    options: dict[str, Any] = {"seed": seed, "draws": draws}
    parts = [
        consistency(parallel, ks=ks, **options),
        text_retrieval(parallel, ks=ks, **options),
        cross_lingual_gap(parallel, ks=ks, **options),
        cosine_offsets(parallel, **options),
    ]
    output = TaskOutput({}, {"left_out": parallel.left_out, "languages": list(languages)})
    for part in parts:
        output = TaskOutput(
            output.metrics | part.metrics,
            output.details | part.details,
            {**output.ranks, **part.ranks},
        )
    return output


def consistency(
    parallel: ParallelCaptions, *, ks: Sequence[int] = KS, seed: int = 0, draws: int = DRAWS
) -> TaskOutput:
    """Compare the pictures that two parallel captions find.

    `overlap_at_K`: share of the K best pictures that both find; ties in random order, each list for
    itself, so that a model that ties everything gets chance. A K above the number of pictures is
    left out. `spearman`, `kendall` (tau-b): correlation of the whole gallery's order, over at most
    1,000 queries drawn by `seed`; a query that scores every picture the same has none and is not
    in their `n`.
    """
    count, gallery = len(parallel.owner), len(parallel.image)
    fitting = [k for k in ks if k <= gallery]
    shared = {k: np.empty((3, count)) for k in fitting}
    drawn = np.zeros(count, bool)
    drawn[np.random.default_rng(seed).permutation(count)[:CORRELATED]] = True
    correlations = {"spearman": np.full(count, np.nan), "kendall": np.full(count, np.nan)}
    blocks = zip(
        score_blocks(parallel.first, parallel.image),
        score_blocks(parallel.second, parallel.image),
        strict=True,
    )
    for (rows, a), (_, b) in blocks:
        for k in fitting:
            shared[k][:, rows] = overlap_at_k(a, b, k)
        chosen = drawn[rows]
        places = np.arange(count)[rows][chosen]
        for name, correlate in (("spearman", spearman), ("kendall", kendall)):
            correlations[name][places] = correlate(a[chosen], b[chosen])
    metrics = {
        f"overlap_at_{k}": mean_metric(
            value, parallel.owner, low=low, high=high, seed=seed, draws=draws
        )
        for k, (low, value, high) in shared.items()
    }
    for name, values in correlations.items():
        metrics[name] = mean_metric(values, parallel.owner, seed=seed, draws=draws)
    details = {
        "chance": {f"overlap_at_{k}": k / gallery for k in fitting},
        "correlated_queries": int(drawn.sum()),
        "pictures": gallery,
    }
    return TaskOutput(metrics, details, {f"overlap_at_{k}": shared[k][1] for k in fitting})


def text_retrieval(
    parallel: ParallelCaptions, *, ks: Sequence[int] = KS, seed: int = 0, draws: int = DRAWS
) -> TaskOutput:
    """Measure how often a caption finds one of the same picture in the other language.

    `zh_to_en_r1`, ... `en_to_zh_r10`: share of captions with any of the picture's captions in the
    other language among the first K.
    """
    first, second = parallel.languages
    found = exact_ranks(parallel.first, parallel.second, _same_owner(parallel.owner))
    metrics: dict[str, Metric] = {}
    for name, ranks in ((f"{first}_to_{second}", found.i2t), (f"{second}_to_{first}", found.t2i)):
        for k in ks:
            hits = hits_at_k(ranks, k)
            metrics[f"{name}_r{k}"] = hits_metric(hits, parallel.owner, seed=seed, draws=draws)
    return TaskOutput(metrics)


def _same_owner(owner: NDArray[np.int64]) -> RightPairs:
    """Return every pair of a caption of one language and one of the other with one picture."""
    order = np.argsort(owner, kind="stable")
    _, start, group, size = np.unique(
        owner[order], return_index=True, return_inverse=True, return_counts=True
    )
    times = size[group]
    within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    others = order[np.repeat(start[group], times) + within]
    return RightPairs(np.repeat(order, times), others, np.ones(len(others), bool))


def cross_lingual_gap(
    parallel: ParallelCaptions, *, ks: Sequence[int] = KS, seed: int = 0, draws: int = DRAWS
) -> TaskOutput:
    """Compare the retrieval of both languages on the same pictures and parallel captions.

    `t2i_r1_gap`, `i2t_r1_gap`, ...: recall in the first language less recall in the second, with an
    interval that is paired by picture; `t2i_r1_zh`, ... the two recalls themselves. Both galleries
    hold as many captions. An interval without 0 in it is a gap.
    """
    found = [
        retrieval_ranks(parallel.image, text, parallel.owner)
        for text in (parallel.first, parallel.second)
    ]
    metrics: dict[str, Metric] = {}
    ranks: dict[str, NDArray[np.int64]] = {}
    for direction in ("t2i", "i2t"):
        own = [getattr(each, direction) for each in found]
        clusters = getattr(found[0], f"{direction}_image")
        for k in ks:
            hits = [hits_at_k(each, k) for each in own]
            for language, each in zip(parallel.languages, hits, strict=True):
                name = f"{direction}_r{k}_{language}"
                metrics[name] = hits_metric(each, clusters, seed=seed, draws=draws)
            metrics[f"{direction}_r{k}_gap"] = change_metric(
                hits[1], hits[0], clusters, seed=seed, draws=draws
            )
        for language, each in zip(parallel.languages, own, strict=True):
            for name, values in each._asdict().items():
                ranks[f"{direction}_{language}_{name}"] = values
    return TaskOutput(metrics, {}, ranks)


def cosine_offsets(parallel: ParallelCaptions, *, seed: int = 0, draws: int = DRAWS) -> TaskOutput:
    """Compare the scores themselves: one threshold serves both languages only if they agree.

    `cosine_zh`, `cosine_en`: mean cosine of captions with their own picture; `cosine_offset` the
    first less the second, paired. `cosine_parallel`: of parallel captions with each other.
    `centroid_distance_A_B`: between the mean vectors of two kinds, the modality gap of Liang et al.
    (arXiv 2203.02053); 0 to 2.
    """
    picture = parallel.image[parallel.owner]
    own = [paired_scores(picture, text) for text in (parallel.first, parallel.second)]
    options: dict[str, Any] = {"seed": seed, "draws": draws}
    metrics = {
        f"cosine_{language}": mean_metric(scores, parallel.owner, **options)
        for language, scores in zip(parallel.languages, own, strict=True)
    }
    difference = own[0].astype(np.float64) - own[1]
    metrics["cosine_offset"] = mean_metric(difference, parallel.owner, **options)
    metrics["cosine_parallel"] = mean_metric(
        paired_scores(parallel.first, parallel.second), parallel.owner, **options
    )
    first, second = parallel.languages
    centres = {
        "image": picture.mean(axis=0, dtype=np.float64),
        first: parallel.first.mean(axis=0, dtype=np.float64),
        second: parallel.second.mean(axis=0, dtype=np.float64),
    }
    for a, b in (("image", first), ("image", second), (first, second)):
        distance = float(np.linalg.norm(centres[a] - centres[b]))
        metrics[f"centroid_distance_{a}_{b}"] = Metric(distance, len(parallel.owner))
    return TaskOutput(metrics)
