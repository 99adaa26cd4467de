"""Which captions are right for which pictures: by index, by what they say, as M2-Encoder has it.

Not for finding them (retrieval.py), nor for reading captions.
"""

# I images   T texts   P right pairs   G groups of equal captions

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

GroundTruth = Literal["index", "string", "m2"]
GROUND_TRUTHS: tuple[GroundTruth, ...] = ("index", "string", "m2")


class RightPairs(NamedTuple):
    """Which texts are right for which images, (P,) each, without repeats."""

    image: NDArray[np.int64]
    text: NDArray[np.int64]
    for_image: NDArray[np.bool_]
    """Whether the text is right when the image asks; the image always is when the text asks."""


def clean_caption(text: str) -> str:
    """Return a caption as the released script compares it: lower-case, double quotes straight."""
    return text.lower().replace("“", '"').replace("”", '"')


def right_pairs(
    owner: Any, *, gt: GroundTruth = "index", texts: Sequence[str] = (), also: Any = ()
) -> RightPairs:
    """Return which captions are right for which images.

    owner: (T,) the image that each text describes. also: (E, 2) further right (text, image) pairs,
    where a text describes several. texts: what the T captions say, for `string` and `m2`, which
    take captions for one another if they are equal once cleaned.
    - index: a caption is right for its images alone.
    - string: a caption is right for each image that has an equal one, in both directions.
    - m2: as the released script has it: the same when texts ask, but for an image only the last
      occurrence in the whole list of each of its captions is right.
    """
    owner_T = np.asarray(owner, np.int64)
    if gt not in GROUND_TRUTHS:
        raise ValueError(f"gt is {gt!r}, expected index, string or m2")
    if gt != "index" and len(texts) != len(owner_T):
        raise ValueError(f"{len(texts):,} texts for {len(owner_T):,} owners, expected one for each")
    more = np.asarray(also, np.int64).reshape(-1, 2)
    if gt == "index" and not len(more):
        return RightPairs(owner_T, np.arange(len(owner_T)), np.ones(len(owner_T), bool))
    text = np.concatenate([np.arange(len(owner_T)), more[:, 0]])
    image = np.concatenate([owner_T, more[:, 1]])
    group_T = np.arange(len(owner_T)) if gt == "index" else _groups(texts)
    order = np.argsort(group_T, kind="stable")  # the texts of a group lie together, in order
    size_G = np.bincount(group_T)
    end_G = np.cumsum(size_G)
    num_images = image.max() + 1
    group, image = np.divmod(np.unique(group_T[text] * num_images + image), num_images)
    times = size_G[group]  # each image of a group goes with every text of it
    within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    place = np.repeat((end_G - size_G)[group], times) + within
    is_last = place == np.repeat(end_G[group] - 1, times)
    counts = is_last if gt == "m2" else np.ones(len(place), bool)
    return RightPairs(np.repeat(image, times), order[place], counts)


def _groups(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return (T,) a number for each caption, the same for equal ones."""
    seen: dict[str, int] = {}
    return np.asarray([seen.setdefault(clean_caption(text), len(seen)) for text in texts])
