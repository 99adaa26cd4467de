"""Recall of image-text retrieval in both directions, from a similarity matrix or from embeddings.

Not for embedding pictures and texts (embed.py), nor for the ranks themselves (exact_ranks.py).
"""

# I images   T texts   D width of an embedding

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.bootstrap import (
    DRAWS,
    Resamples,
    cluster_totals,
    interval,
    median_interval,
)
from m2encoder.eval.exact_ranks import exact_ranks
from m2encoder.eval.metric import Metric, TaskOutput
from m2encoder.eval.right_answers import GROUND_TRUTHS, GroundTruth, right_pairs
from m2encoder.eval.screens import check_finite
from m2encoder.ranks import Hits, Ranks, expected_ranks, hits_at_k

Direction = Literal["i2t", "t2i"]
DIRECTIONS: tuple[Direction, ...] = ("i2t", "t2i")
KS = (1, 5, 10)
Floats = NDArray[np.float64]


class RetrievalRanks(NamedTuple):
    """Where the right answers of all queries stand."""

    i2t: Ranks
    """Per image with a caption, in order: its best caption among all texts."""
    t2i: Ranks
    """Per text: its image, or the best of its images, among all images."""
    i2t_image: NDArray[np.int64]
    """The row of the image that each image-to-text query is."""
    t2i_image: NDArray[np.int64]
    """The row of the image that each text describes, of the first where it describes several."""


def retrieval_ranks(
    image: Any,
    text: Any,
    owner: Any,
    *,
    gt: GroundTruth = "index",
    texts: Sequence[str] = (),
    also: Any = (),
) -> RetrievalRanks:
    """Return where the right answers of every query stand, holding one tile of similarities.

    image: (I, D). text: (T, D). owner: (T,) the image that each text describes; an image may own
    several texts or none, and one without is no query but still a candidate. gt, texts, also: what
    is right, see `right_pairs`. Scores and ties are those of exact_ranks.py.
    Raises ValueError on wrong shapes, DataError on empty sides, captions without an image, NaN.
    """
    image_ID, text_TD = np.asarray(image), np.asarray(text)
    if image_ID.ndim != 2 or text_TD.ndim != 2 or image_ID.shape[1] != text_TD.shape[1]:
        raise ValueError(
            f"embeddings have shapes {image_ID.shape} and {text_TD.shape}, expected (images, D) "
            f"and (texts, D)"
        )
    owner_T = _checked_owner(owner, len(image_ID), len(text_TD))
    also = _checked_also(also, len(image_ID), len(text_TD))
    right = right_pairs(owner_T, gt=gt, texts=texts, also=also)
    ranks = exact_ranks(image_ID, text_TD, right)
    return RetrievalRanks(ranks.i2t, ranks.t2i, np.unique(right.image), owner_T)


@dataclass(frozen=True)
class RetrievalSettings:
    """What to measure of a retrieval."""

    gt: GroundTruth = "index"
    """What is right: see `right_pairs`."""
    ks: tuple[int, ...] = KS
    """The k of each recall; may be larger than the gallery."""
    directions: tuple[Direction, ...] = DIRECTIONS
    """Which of both; some data sets are made for one alone."""
    draws: int = DRAWS
    """Bootstrap draws of images behind each interval."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ConfigError(f"ks is {self.ks}, expected different numbers from 1")
        if not self.directions or not set(self.directions) <= set(DIRECTIONS):
            raise ConfigError(f"directions is {self.directions}, expected i2t, t2i or both")
        if self.gt not in GROUND_TRUTHS:
            raise ConfigError(f"gt is {self.gt!r}, expected index, string or m2")
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}, expected at least 1")

    @property
    def mean_recall(self) -> str:
        """Say what the mean recall is the mean of."""
        names = [f"{direction}_r{k}" for direction in self.directions for k in self.ks]
        return f"mean of the {len(names)} recalls {', '.join(names)}"


def measure_retrieval(
    image: Any,
    text: Any,
    owner: Any,
    *,
    texts: Sequence[str] = (),
    also: Any = (),
    settings: RetrievalSettings | None = None,
) -> TaskOutput:
    """Return recalls and median ranks with intervals and tie bounds, and every query's ranks.

    Arguments and errors as for `retrieval_ranks`, metrics as for `metrics_of_ranks`. ranks:
    `i2t_above`, `i2t_tied`, `i2t_right`, `i2t_image`, the same of t2i, for comparisons.
    """
    settings = settings or RetrievalSettings()
    ranks = retrieval_ranks(image, text, owner, gt=settings.gt, texts=texts, also=also)
    described = right_pairs(owner, also=also).image
    per_image = Counter(np.bincount(described, minlength=len(image)).tolist())
    details = {
        "gt": settings.gt,
        "ks": list(settings.ks),
        "mean_recall": settings.mean_recall,
        "images": len(image),
        "texts": len(text),
        "images_without_text": per_image[0],
        "captions_per_image": {str(count): per_image[count] for count in sorted(per_image)},
        "tied_queries": {
            direction: int(np.count_nonzero(getattr(ranks, direction).tied))
            for direction in settings.directions
        },
        "intervals": f"percentiles of {settings.draws:,} draws of images, seed {settings.seed}",
    }
    arrays = {
        f"{direction}_{name}": values
        for direction in settings.directions
        for name, values in [
            *getattr(ranks, direction)._asdict().items(),
            ("image", getattr(ranks, f"{direction}_image")),
        ]
    }
    return TaskOutput(metrics_of_ranks(ranks, settings), details, arrays)


def metrics_of_ranks(ranks: RetrievalRanks, settings: RetrievalSettings) -> dict[str, Metric]:
    """Return `i2t_r1`, ..., `t2i_r10`, `i2t_median_rank`, `t2i_median_rank` and sums of recalls.

    `i2t_mean_recall`, `t2i_mean_recall`: the mean of one direction's recalls. `mean_recall`: the
    mean of all recalls measured, six with two directions and three ks. `rsum`: their sum, at most
    6. A median rank is the median of the queries' expected ranks; its bounds are the medians with
    all ties decided for and against. Intervals resample images with all their captions.
    """
    clusters = ranks.i2t_image
    resamples = Resamples(len(clusters), draws=settings.draws, seed=settings.seed)
    recalls: dict[str, Hits] = {}
    medians: dict[str, Metric] = {}
    totals = []
    for direction in settings.directions:
        found: Ranks = getattr(ranks, direction)
        cluster = np.searchsorted(clusters, getattr(ranks, f"{direction}_image"))
        hits = {f"{direction}_r{k}": hits_at_k(found, k) for k in settings.ks}
        recalls |= hits
        values = np.stack([hit.value for hit in hits.values()], axis=1)
        totals.append(cluster_totals(values, cluster, len(clusters)))
        medians[f"{direction}_median_rank"] = _median_rank(found, cluster, resamples)
    width = len(settings.ks) + 1
    sums = resamples.sums(np.concatenate(totals, axis=1)).reshape(settings.draws, -1, width)
    counts = np.where(sums[..., -1:] > 0, sums[..., -1:], np.nan)  # a draw may hold no text
    means = (sums[..., :-1] / counts).reshape(settings.draws, -1)
    drawn = dict(zip(recalls, means.T, strict=True))
    groups = {name: [name] for name in recalls}
    for direction in settings.directions:
        groups[f"{direction}_mean_recall"] = [name for name in recalls if name[:3] == direction]
    groups |= {"mean_recall": list(recalls), "rsum": list(recalls)}
    metrics = {
        name: _metric_of(
            [recalls[each] for each in group],
            [drawn[each] for each in group] if len(clusters) > 1 else None,
            scale=len(group) if name == "rsum" else 1,
        )
        for name, group in groups.items()
    }
    return metrics | medians


def _metric_of(hits: list[Hits], drawn: list[Floats] | None, *, scale: int) -> Metric:
    """Return the mean of the means of several groups of queries, times scale."""
    low, value, high = (
        scale * float(np.mean([np.mean(each) for each in part])) for part in zip(*hits, strict=True)
    )
    ci95 = None if drawn is None else interval(scale * np.mean(drawn, axis=0))
    ties = (low, high) if low < high else (None, None)
    return Metric(value, sum(len(each.value) for each in hits), ci95, *ties)


def _median_rank(ranks: Ranks, cluster: NDArray[np.int64], resamples: Resamples) -> Metric:
    expected = expected_ranks(ranks)
    low, value, high = (float(np.median(part)) for part in expected)
    ties = (low, high) if low < high else (None, None)
    several = resamples.num_clusters > 1
    ci95 = median_interval(expected.value, cluster, resamples) if several else None
    return Metric(value, len(cluster), ci95, *ties)


def retrieval_metrics(
    image: Any, text: Any, owner: Any, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return recalls (0..1), median ranks and counts of retrieval, without bounds and intervals.

    Arguments and errors as for `retrieval_ranks`, values as for `metrics_of_ranks`, ties at their
    expected value. Besides these: `rsum` in percent, with three ks at most 600; `images`, `texts`,
    and `images_without_text`, which are candidates for texts but no queries.
    """
    ranks = retrieval_ranks(image, text, owner)
    settings = RetrievalSettings(ks=tuple(ks), draws=1)
    metrics = {name: found.value for name, found in metrics_of_ranks(ranks, settings).items()}
    return metrics | {
        "rsum": 100 * metrics["rsum"],
        "images": len(image),
        "texts": len(text),
        "images_without_text": len(image) - len(ranks.i2t_image),
    }


def recall_at_k(sim_IT: Any, *, owner: Any, k: int) -> dict[str, float]:
    """Return {"i2t", "t2i"}: the share of queries, 0..1, with a right answer in the top k.

    sim_IT: (I, T) similarities. owner: (T,) the image that each text describes.
    An image may own several texts, and any of them counts; an image without one is no query, but
    texts are still compared with it. Ties count as the chance of a hit if they come in random
    order, so a model that maps everything to one point scores what guessing does.
    Raises ValueError on wrong shapes, DataError on captions without an image and on NaN.
    """
    ranks = ranks_of_matrix(sim_IT, owner=owner)
    return {
        direction: float(hits_at_k(found, k).value.mean())
        for direction, found in (("i2t", ranks.i2t), ("t2i", ranks.t2i))
    }


def ranks_of_matrix(sim_IT: Any, *, owner: Any) -> RetrievalRanks:
    """Return the ranks that `recall_at_k` counts; same arguments and errors."""
    sim_IT = np.asarray(sim_IT)
    sim_IT = sim_IT.astype(np.result_type(sim_IT, np.float32))  # a copy, changed below
    if sim_IT.ndim != 2:
        raise ValueError(f"similarities have shape {sim_IT.shape}, expected (images, texts)")
    owner_T = _checked_owner(owner, *sim_IT.shape)
    check_finite(sim_IT, "similarities")
    texts = np.arange(len(owner_T))
    own_T = sim_IT[owner_T, texts]
    sim_IT[owner_T, texts] = -np.inf  # what remains are wrong answers
    asked = np.unique(owner_T)
    best_I = np.full(len(sim_IT), -np.inf, own_T.dtype)
    np.maximum.at(best_I, owner_T, own_T)
    right_I = np.bincount(owner_T[own_T == best_I[owner_T]], minlength=len(sim_IT))
    best, wrong = best_I[asked, None], sim_IT[asked]
    i2t = np.count_nonzero(wrong > best, axis=1), np.count_nonzero(wrong == best, axis=1)
    t2i = np.count_nonzero(sim_IT > own_T, axis=0), np.count_nonzero(sim_IT == own_T, axis=0)
    return RetrievalRanks(
        Ranks(*i2t, right_I[asked]), Ranks(*t2i, np.ones(len(texts), np.int64)), asked, owner_T
    )


def _checked_owner(owner: Any, num_images: int, num_texts: int) -> NDArray[np.int64]:
    if not num_images or not num_texts:
        raise DataError(
            f"{num_images:,} images and {num_texts:,} texts, retrieval needs at least one of each; "
            f"check the data"
        )
    owner_T = np.asarray(owner)
    if owner_T.shape != (num_texts,) or not np.issubdtype(owner_T.dtype, np.integer):
        raise ValueError(
            f"owner is {owner_T.dtype} {owner_T.shape}, expected one integer for each of "
            f"{num_texts:,} texts"
        )
    _check_rows(owner_T, num_images, num_texts)
    return owner_T.astype(np.int64)


def _checked_also(also: Any, num_images: int, num_texts: int) -> NDArray[np.int64]:
    pairs = np.asarray(also, np.int64).reshape(-1, 2)
    if len(pairs) and not 0 <= pairs[:, 0].min() <= pairs[:, 0].max() < num_texts:
        raise ValueError(f"also names texts that do not exist, expected 0 to {num_texts - 1}")
    _check_rows(pairs[:, 1], num_images, num_texts)
    return pairs


def _check_rows(image: NDArray[Any], num_images: int, num_texts: int) -> None:
    lost = np.flatnonzero((image < 0) | (image >= num_images))
    if len(lost):
        raise DataError(
            f"captions: {len(lost):,} of {num_texts:,} have no image, the first is row {lost[0]} "
            f"with image {image[lost[0]]}, expected 0 to {num_images - 1}; leave them out"
        )
