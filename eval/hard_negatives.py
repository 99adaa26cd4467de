"""Right captions against ones that are wrong in one way: scores, and where such captions come from.

Not for making a caption wrong (caption_edits.py), nor for SugarCrepe and Winoground
(fine_grained.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.embed import PairEmbeddings, TextEmbeddings
from m2encoder.encoder import Encoder
from m2encoder.errors import DataError
from m2encoder.eval.bootstrap import DRAWS
from m2encoder.eval.caption_edits import KINDS, EditKind, Language, edit_caption
from m2encoder.eval.means import mean_metric
from m2encoder.eval.metric import TaskOutput
from m2encoder.eval.scores import paired_scores


@dataclass(frozen=True)
class WrongCaptions:
    """Captions that are wrong in one way each, for some captions that are right."""

    right: NDArray[np.int64]
    """(Q,) row of each right caption in `TextEmbeddings`; one per picture."""
    texts: list[str]
    """The wrong ones."""
    row: NDArray[np.int64]
    """(W,) which of `right` each of them spoils; never falls."""
    kinds: list[str]
    """(W,) in what way."""
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per kind, why captions have none: {reason: captions}."""


def score_hard_negatives(
    right: NDArray[np.floating],
    wrong: NDArray[np.floating],
    row: NDArray[np.int64],
    kinds: Sequence[str],
    *,
    clusters: NDArray[np.int64] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Measure how often a picture prefers its right caption.

    right: (Q,) cosines of pictures with their captions. wrong: (W,) with wrong ones, of which
    `row` (W,) says whose and `kinds` how they are wrong. clusters: (Q,) what is drawn together in
    intervals, by default each alone.
    `accuracy`: the right one is above every wrong one; with t of them at the same score, expected
    1 / (1 + t). `accuracy_KIND`: above the one that is wrong in this way; a tie counts 1/2.
    Queries without wrong captions are not asked. Raises DataError if none is left or scores hold
    NaN, ValueError on arrays that do not fit.
    """
    right, wrong, row = np.asarray(right), np.asarray(wrong), np.asarray(row)
    if not wrong.shape == row.shape == (len(kinds),) or right.ndim != 1:
        raise ValueError(
            f"{wrong.shape} wrong scores, {row.shape} rows and {len(kinds)} kinds, expected one "
            f"each; {right.shape} right scores, expected (Q,)"
        )
    if not len(wrong):
        raise DataError("no wrong captions, expected at least one; check the data")
    if not (np.isfinite(right).all() and np.isfinite(wrong).all()):
        raise DataError("scores hold NaN or infinity; check the model's weights")
    clusters = np.arange(len(right)) if clusters is None else np.asarray(clusters)
    asked, place = np.unique(row, return_inverse=True)
    lost = np.bincount(place, wrong > right[row]) > 0
    tied = np.bincount(place, wrong == right[row])
    counts = np.bincount(place)
    expected = np.where(lost, 0, 1 / (1 + tied))
    options = {"seed": seed, "draws": draws}
    metrics = {
        "accuracy": mean_metric(expected, clusters[asked], low=expected == 1, high=~lost, **options)
    }
    above, same = (right[row] > wrong).astype(float), right[row] == wrong
    for kind in dict.fromkeys(kinds):
        of_kind = np.asarray(kinds) == kind
        metrics[f"accuracy_{kind}"] = mean_metric(
            (above + same / 2)[of_kind], clusters[row[of_kind]], low=above[of_kind],
            high=(above + same)[of_kind], **options,
        )  # fmt: skip
    details = {
        "chance": {"accuracy": float(np.mean(1 / (1 + counts))), "accuracy_KIND": 0.5},
        "kinds": {kind: metrics[f"accuracy_{kind}"].n for kind in dict.fromkeys(kinds)},
    }
    return TaskOutput(metrics, details, {"row": asked, "right": expected})


def given_hard_negatives(pairs: PairEmbeddings, language: str) -> WrongCaptions:
    """Return the wrong captions that `Pair.meta` carries, each against its picture's first caption.

    meta["hard_negatives"]: {language: captions}. meta["hard_negative_kinds"]: the kind of each, or
    {language: kinds}; without it, all are of kind `any`. Raises DataError if their numbers differ.
    """
    captions = pairs.texts.get(language)
    if captions is None:
        return _collected([], [])
    owners, first = np.unique(captions.owner, return_index=True)
    found: list[list[tuple[str, str]]] = []
    for owner in owners:
        found.append(_given(pairs.keys[owner], pairs.metas[owner], language))
    return _collected([int(row) for row in first], found)


def _given(key: str, meta: Mapping[str, Any], language: str) -> list[tuple[str, str]]:
    """Return (kind, text) pairs of one picture. Raises DataError naming it if they are wrong."""
    by_language = meta.get("hard_negatives", {})
    texts = by_language.get(language, []) if isinstance(by_language, Mapping) else None
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(
            f"{key}: its hard negatives in {language} are no lists of texts by language; write the "
            f"shards again"
        )
    kinds = meta.get("hard_negative_kinds", ["any"] * len(texts))
    kinds = kinds.get(language, []) if isinstance(kinds, Mapping) else kinds
    if not isinstance(kinds, list) or len(kinds) != len(texts):
        count = len(kinds) if isinstance(kinds, list) else "no list of"
        raise DataError(
            f"{key}: {len(texts)} hard negatives in {language}, but {count} kinds; write the "
            f"shards again"
        )
    return list(zip(map(str, kinds), texts, strict=True))


def template_hard_negatives(
    captions: TextEmbeddings,
    language: Language,
    *,
    kinds: Sequence[EditKind] = KINDS,
    seed: int = 0,
) -> WrongCaptions:
    """Make wrong captions from the first caption of each picture, as far as the rules reach.

    One that equals another caption of the same picture is left out.
    """
    owners, first = np.unique(captions.owner, return_index=True)
    own: dict[int, set[str]] = {int(owner): set() for owner in owners}
    for owner, text in zip(captions.owner, captions.texts, strict=True):
        own[int(owner)].add(text)
    found: list[list[tuple[str, str]]] = []
    left_out: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    for owner, row in zip(owners, first, strict=True):
        found.append([])
        for kind in kinds:
            attempt = edit_caption(captions.texts[row], kind, language, seed=seed)
            reason = attempt.reason
            if attempt.text is not None and attempt.text in own[int(owner)]:
                reason = "the picture has this caption too"
            if reason or attempt.text is None:
                left_out[kind][reason] = left_out[kind].get(reason, 0) + 1
            else:
                found[-1].append((kind, attempt.text))
    return _collected([int(row) for row in first], found, left_out)


def _collected(
    first: Sequence[int],
    found: Sequence[Sequence[tuple[str, str]]],
    left_out: dict[str, dict[str, int]] | None = None,
) -> WrongCaptions:
    flat = [(i, kind, text) for i, wrong in enumerate(found) for kind, text in wrong]
    return WrongCaptions(
        np.asarray(first, np.int64),
        [text for _, _, text in flat],
        np.asarray([i for i, _, _ in flat], np.int64),
        [kind for _, kind, _ in flat],
        left_out or {},
    )


def to_rows(
    captions: TextEmbeddings, wrong: WrongCaptions, keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one plain row per caption that has wrong ones, for a file to look at and correct.

    {"key", "caption", "hard_negatives": [{"kind", "text"}]}. keys: of the pictures.
    """
    rows: dict[int, dict[str, Any]] = {}
    for i, kind, text in zip(wrong.row.tolist(), wrong.kinds, wrong.texts, strict=True):
        at = wrong.right[i]
        row = {
            "key": keys[int(captions.owner[at])],
            "caption": captions.texts[at],
            "hard_negatives": [],
        }
        rows.setdefault(i, row)["hard_negatives"].append({"kind": kind, "text": text})
    return list(rows.values())


def measure_hard_negatives(
    encoder: Encoder,
    pairs: PairEmbeddings,
    language: str,
    wrong: WrongCaptions,
    *,
    batch_size: int = 64,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Encode wrong captions of one language and score them against the right ones."""
    captions = pairs.texts[language]
    if not wrong.texts:
        raise DataError(f"no wrong captions in {language}, expected at least one; check the data")
    vectors = encoder.encode_text(wrong.texts, batch_size=batch_size, show_progress=False)
    picture = captions.owner[wrong.right]
    own = paired_scores(pairs.image[picture], captions.vectors[wrong.right])
    scores = paired_scores(pairs.image[picture[wrong.row]], vectors)
    output = score_hard_negatives(
        own, scores, wrong.row, wrong.kinds, clusters=picture, seed=seed, draws=draws
    )
    return replace(output, details=output.details | {"left_out": wrong.left_out})
