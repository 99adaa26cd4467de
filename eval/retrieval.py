"""Recall of image-text retrieval in both directions, from a similarity matrix or from embeddings.

Not for embedding pictures and texts (embed.py), nor for choosing what to compare (suite.py).
"""

# I images   T texts   D width of an embedding

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import DataError

TILE = 1024
"""Rows and columns of similarities in memory at once."""


class Ranks(NamedTuple):
    """Rank of the right answer for every query, from 1."""

    i2t: NDArray[np.int64]
    """Per image with a caption, in order: the rank of its best caption among all texts."""
    t2i: NDArray[np.int64]
    """Per text: the rank of its image among all images."""


def recall_at_k(sim_IT: Any, *, owner: Any, k: int) -> dict[str, float]:
    """Return {"i2t", "t2i"}: the share of queries, 0..1, whose right answer is in the top k.

    sim_IT: (I, T) similarities. owner: (T,) the image that each text describes.
    An image may own several texts, and any of them counts; an image without one is no query, but
    texts are still compared with it. A tie counts against the query: rank = 1 + the wrong answers
    with a greater or equal score. So a model that maps everything to one point scores 0, not 1.
    Raises ValueError on wrong shapes or owners, DataError on NaN or infinite similarities.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    ranks = ranks_of_matrix(sim_IT, owner=owner)
    return {"i2t": float(np.mean(ranks.i2t <= k)), "t2i": float(np.mean(ranks.t2i <= k))}


def ranks_of_matrix(sim_IT: Any, *, owner: Any) -> Ranks:
    """Return the ranks that `recall_at_k` counts; same arguments and errors."""
    sim_IT = np.asarray(sim_IT)
    sim_IT = sim_IT.astype(np.result_type(sim_IT, np.float32))  # a copy, changed below
    if sim_IT.ndim != 2:
        raise ValueError(f"similarities have shape {sim_IT.shape}, expected (images, texts)")
    owner_T = _checked_owner(owner, *sim_IT.shape)
    _check_finite(sim_IT, "similarities")
    texts = np.arange(len(owner_T))
    own_T = sim_IT[owner_T, texts]
    best_I = _best_of_own(own_T, owner_T, len(sim_IT))
    sim_IT[owner_T, texts] = -np.inf  # what remains are wrong answers
    wrong_I = np.count_nonzero(sim_IT >= best_I[:, None], axis=1)
    wrong_T = np.count_nonzero(sim_IT >= own_T, axis=0)
    return Ranks(1 + wrong_I[np.unique(owner_T)], 1 + wrong_T)


def retrieval_ranks(image: Any, text: Any, owner: Any, *, tile: int = TILE) -> Ranks:
    """Return every query's rank as `recall_at_k` defines it, holding one tile of similarities.

    image: (I, D). text: (T, D). owner: (T,) the image that each text describes.
    Cosines are summed in float64 and rounded to float32: two equal pairs of vectors then have the
    same score wherever they lie in a tile, so ties are found. Raises as `recall_at_k` does.
    """
    image_ID, text_TD = np.asarray(image), np.asarray(text)
    if image_ID.ndim != 2 or text_TD.ndim != 2 or image_ID.shape[1] != text_TD.shape[1]:
        raise ValueError(
            f"embeddings have shapes {image_ID.shape} and {text_TD.shape}, expected (images, D) "
            f"and (texts, D)"
        )
    owner_T = _checked_owner(owner, len(image_ID), len(text_TD))
    _check_finite(image_ID, "image embeddings")
    _check_finite(text_TD, "text embeddings")
    own_T = np.empty(len(text_TD), np.float32)
    for t in range(0, len(text_TD), tile):
        part = slice(t, t + tile)
        own_TD = _double(image_ID[owner_T[part]])
        own_T[part] = np.einsum("td,td->t", own_TD, _double(text_TD[part]))
    best_I = _best_of_own(own_T, owner_T, len(image_ID))
    wrong_I = np.zeros(len(image_ID), np.int64)
    wrong_T = np.zeros(len(text_TD), np.int64)
    for i in range(0, len(image_ID), tile):
        rows = slice(i, i + tile)
        tile_ID = _double(image_ID[rows])
        for t in range(0, len(text_TD), tile):
            columns = slice(t, t + tile)
            sim = (tile_ID @ _double(text_TD[columns]).T).astype(np.float32)
            row = owner_T[columns] - i
            mine = np.flatnonzero((row >= 0) & (row < len(sim)))
            sim[row[mine], mine] = -np.inf  # what remains are wrong answers
            wrong_I[rows] += np.count_nonzero(sim >= best_I[rows, None], axis=1)
            wrong_T[columns] += np.count_nonzero(sim >= own_T[columns], axis=0)
    return Ranks(1 + wrong_I[np.unique(owner_T)], 1 + wrong_T)


def retrieval_metrics(
    image: Any, text: Any, owner: Any, ks: Sequence[int] = (1, 5, 10), *, tile: int = TILE
) -> dict[str, float]:
    """Return recalls (0..1), median ranks and counts of retrieval in both directions.

    Arguments, ties and errors as in `retrieval_ranks`. Keys: `i2t_r1`, ... `t2i_r10` for each k;
    `mean_recall` over all of these; `rsum`, their sum in percent (with three ks: at most 600);
    `i2t_median_rank`, `t2i_median_rank`; `images`, `texts`, and `images_without_text`, which are
    candidates for texts but no queries.
    """
    ranks = retrieval_ranks(image, text, owner, tile=tile)
    recalls = {
        f"{direction}_r{k}": float(np.mean(found <= k))
        for direction, found in ranks._asdict().items()
        for k in ks
    }
    return recalls | {
        "mean_recall": float(np.mean(list(recalls.values()))),
        "rsum": 100 * sum(recalls.values()),
        "i2t_median_rank": float(np.median(ranks.i2t)),
        "t2i_median_rank": float(np.median(ranks.t2i)),
        "images": len(image),
        "texts": len(text),
        "images_without_text": len(image) - len(ranks.i2t),
    }


def _best_of_own(own_T: NDArray[Any], owner_T: NDArray[Any], num_images: int) -> NDArray[Any]:
    """Return (I,) the best score among each image's own texts; infinite where it has none."""
    best_I = np.full(num_images, -np.inf, own_T.dtype)
    np.maximum.at(best_I, owner_T, own_T)
    best_I[np.isneginf(best_I)] = np.inf
    return best_I


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
    if owner_T.min() < 0 or owner_T.max() >= num_images:
        raise ValueError(
            f"owners reach from {owner_T.min()} to {owner_T.max()}, expected 0 to {num_images - 1}"
        )
    return owner_T.astype(np.int64)


def _check_finite(values: NDArray[Any], what: str) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(
            f"{what}: {np.count_nonzero(bad):,} of {len(values):,} rows hold NaN or infinity, the "
            f"first is row {int(bad.argmax())}; check the model's weights"
        )


def _double(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float64)
