"""Measure from which cosine on a picture fits a text, and how surely "nothing fits" is told.

Not for keeping or using what was found (m2encoder/calibration.py).
"""

# I images   Q queries   D width of an embedding

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.calibration import Calibration, LanguageCalibration
from m2encoder.embed import PairEmbeddings
from m2encoder.encoder import Encoder
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.bootstrap import DRAWS, interval
from m2encoder.eval.metric import Metric, TaskOutput, undefined
from m2encoder.eval.scores import score_blocks

Floats = NDArray[np.float64]
MOST_NEEDED = 100
"""Pairs that are asked for at a precision of 0.99 and above."""
DRAWN_AT_ONCE = 2_000_000
"""Weights of queries in memory at once."""


class QueryScores(NamedTuple):
    """What each query reaches with and without its pictures in the gallery."""

    right: Floats
    """(Q,) best cosine with a picture that it describes: a match."""
    best: Floats
    """(Q,) best cosine with any picture."""
    wrong: Floats
    """(Q,) best cosine once every picture that it describes is gone: no match."""
    cluster: NDArray[np.int64]
    """(Q,) the picture, for intervals."""
    left_out: int
    """Queries that describe every picture, so that nothing is left to compare with."""


class Choice(NamedTuple):
    """A threshold, or how near one came."""

    threshold: float | None
    """None if no cosine has the precision asked for."""
    precision: float
    """Of this threshold; without one, the best that enough pairs reach."""
    recall: float


def query_scores(
    image: NDArray[np.floating],
    text: NDArray[np.floating],
    owner: NDArray[np.int64],
    texts: Sequence[str],
) -> QueryScores:
    """Score every text with every picture, a block at a time.

    image: (I, D), text: (T, D), unit norm. owner: (T,) the picture of each text. A text describes
    the pictures of all texts that read the same, so that twins are no mistakes.
    Raises DataError on NaN, or if there are fewer than two pictures or no query is left.
    """
    if len(image) < 2:
        raise DataError(f"{len(image)} pictures, calibration needs at least two; check the data")
    owner = np.asarray(owner)
    starts, described = _pictures_of(owner, texts)
    right, best, wrong = np.empty((3, len(text)))
    for rows, scores in score_blocks(text, image):
        counts = np.diff(starts[rows.start : rows.stop + 1])
        row = np.repeat(np.arange(len(scores)), counts)
        column = described[starts[rows.start] : starts[rows.stop]]
        own = scores[row, column]
        right[rows] = np.maximum.reduceat(own, starts[rows] - starts[rows.start])
        best[rows] = scores.max(axis=1)
        scores[row, column] = -np.inf
        wrong[rows] = scores.max(axis=1)
    kept = np.isfinite(wrong)
    if not kept.any():
        raise DataError("every text describes every picture, calibration needs others; check it")
    return QueryScores(right[kept], best[kept], wrong[kept], owner[kept], int((~kept).sum()))


def _pictures_of(
    owner: NDArray[np.int64], texts: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (starts, pictures): text t describes pictures[starts[t]:starts[t + 1]]."""
    by_text: dict[str, dict[int, None]] = {}
    for text, picture in zip(texts, owner.tolist(), strict=True):
        by_text.setdefault(text, {})[picture] = None
    lists = [list(by_text[text]) for text in texts]
    starts = np.cumsum([0, *map(len, lists)])
    return starts, np.asarray([picture for own in lists for picture in own], np.int64)


def choose_threshold(
    match: Floats, no_match: Floats, precision: float, *, least: int | None = None
) -> Choice:
    """Return the lowest threshold from which on the pairs have the precision, so the most recall.

    match, no_match: scores of pairs that fit and that do not. Pairs from a score on are counted
    with all that equal it; the threshold lies halfway to the next lower score, out of the reach of
    rounding.
    least: only scores that so many pairs reach; by default as many as may hold one mistake, 20 for
    a precision of 0.95. Fewer are no evidence: the best pair alone has a precision of 0 or 1.
    Raises ValueError on a precision outside of 0 to 1 or no scores.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"precision is {precision}, expected more than 0, at most 1")
    if least is None:
        least = math.ceil(1 / max(1 - precision, 1 / MOST_NEEDED) - 1e-9)
    known, hits, misses = _counts(match, no_match)
    kept = np.cumsum(hits[::-1])[::-1]  # from each score on
    accepted = kept + np.cumsum(misses[::-1])[::-1]
    found = np.where(accepted >= least, kept / accepted, -1)
    found[0] = kept[0] / accepted[0]  # all pairs are what there is
    reached = np.flatnonzero((found >= precision) & (accepted >= least))
    at = int(reached[0]) if len(reached) else int(found.argmax())
    threshold = None
    if len(reached):
        threshold = float((known[at - 1] + known[at]) / 2 if at else known[at])
    return Choice(threshold, float(found[at]), float(kept[at] / len(match)))


def _counts(match: Floats, no_match: Floats) -> tuple[Floats, Floats, Floats]:
    """Return every score from below, and how many matches and no matches have it."""
    if not len(match) or not len(no_match):
        raise ValueError(f"{len(match)} matches and {len(no_match)} others, expected some of each")
    known, place = np.unique(np.concatenate([match, no_match]), return_inverse=True)
    hits = np.bincount(place[: len(match)], minlength=len(known))
    misses = np.bincount(place[len(match) :], minlength=len(known))
    return known, hits.astype(np.float64), misses.astype(np.float64)


def auroc(match: Floats, no_match: Floats) -> float:
    """Return the share of pairs of a match and a no match in which the match scores higher.

    Equal scores count 1/2: 0.5 is chance.
    """
    _, hits, misses = _counts(match, no_match)
    below = np.cumsum(misses) - misses / 2
    return float((hits * below).sum() / (hits.sum() * misses.sum()))


def measure_calibration(
    scores: QueryScores,
    *,
    precision: float = 0.95,
    pictures: int,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[LanguageCalibration, TaskOutput]:
    """Choose one language's threshold, and say how far to trust it.

    `threshold`: for pairs with one match to one no match. `precision`, `recall` from there on;
    undefined threshold and the best precision there is if none suffices. `precision_held_out`: with
    the threshold chosen on the other half of the pictures, which `seed` draws. `rejection`: share
    of no matches below it. `no_match_auroc`: best score with the picture in the gallery against
    best score without. Intervals are clustered by picture; those of precision and recall hold the
    threshold fixed.
    """
    choice = choose_threshold(scores.right, scores.wrong, precision)
    held_out = _held_out_precision(scores, precision, seed)
    area = auroc(scores.best, scores.wrong)
    count = len(scores.right)
    samples = _samples(scores, choice.threshold, seed=seed, draws=draws)
    several = len(np.unique(scores.cluster)) > 1
    ci95 = [interval(column) if several else None for column in samples.T]
    metrics = {
        "threshold": Metric(np.nan if choice.threshold is None else choice.threshold, count),
        "precision": Metric(choice.precision, count, ci95[0]),
        "recall": Metric(choice.recall, count, ci95[1]),
        "precision_held_out": undefined() if held_out is None else Metric(held_out, count),
        "rejection": undefined(),
        "no_match_auroc": Metric(area, count, ci95[3]),
    }
    if choice.threshold is not None:
        share = float(np.mean(scores.wrong < choice.threshold))
        metrics["rejection"] = Metric(share, count, ci95[2])
    kept = LanguageCalibration(
        choice.threshold, choice.precision, choice.recall, held_out, area, ci95[3], count, pictures
    )
    details = {
        "precision_asked_for": precision,
        "reached": choice.threshold is not None,
        "pictures": pictures,
        "left_out": scores.left_out,
        "matches_per_no_match": 1,
    }
    ranks = {"right": scores.right, "best": scores.best, "wrong": scores.wrong}
    return kept, TaskOutput(metrics, details, ranks)


def _held_out_precision(scores: QueryScores, precision: float, seed: int) -> float | None:
    """Return the precision on each half of the pictures with the other half's threshold."""
    pictures = np.unique(scores.cluster)
    first_half = np.random.default_rng(seed).permutation(pictures)[: len(pictures) // 2]
    is_first = np.isin(scores.cluster, first_half)
    matches = misses = 0
    for chosen_on, used_on in ((is_first, ~is_first), (~is_first, is_first)):
        if not chosen_on.any() or not used_on.any():
            return None
        threshold = choose_threshold(
            scores.right[chosen_on], scores.wrong[chosen_on], precision
        ).threshold
        if threshold is None:
            return None
        matches += int((scores.right[used_on] >= threshold).sum())
        misses += int((scores.wrong[used_on] >= threshold).sum())
    return matches / (matches + misses) if matches + misses else None


def _samples(
    scores: QueryScores, threshold: float | None, *, seed: int, draws: int
) -> NDArray[np.float64]:
    """Return (draws, 4): precision, recall, rejection and AUROC of pictures drawn with replacement.

    NaN where a draw has no pair to take the share of, or there is no threshold.
    """
    pictures, cluster = np.unique(scores.cluster, return_inverse=True)
    order = np.argsort(scores.wrong)
    # where each best score would stand among the wrong ones, without and with those that equal it
    below = np.searchsorted(scores.wrong[order], scores.best, side="left")
    up_to = np.searchsorted(scores.wrong[order], scores.best, side="right")
    accepted = np.zeros((2, len(order)))
    if threshold is not None:
        accepted = np.stack([scores.right >= threshold, scores.wrong >= threshold]) * 1.0
    chance = np.random.default_rng([seed, 1])
    found: list[NDArray[np.float64]] = []
    step = max(1, DRAWN_AT_ONCE // len(order))
    for start in range(0, draws, step):
        even = np.full(len(pictures), 1 / len(pictures))
        drawn = chance.multinomial(len(pictures), even, size=min(step, draws - start))
        weights = drawn[:, cluster].astype(np.float64)
        total = weights.sum(axis=1)
        taken = (
            weights @ accepted.T if threshold is not None else np.full((len(weights), 2), np.nan)
        )
        behind = np.zeros((len(weights), len(order) + 1))
        np.cumsum(weights[:, order], axis=1, out=behind[:, 1:])
        pairs = weights * (behind[:, below] + behind[:, up_to]) / 2
        with np.errstate(invalid="ignore"):
            shares = [taken[:, 0] / taken.sum(axis=1), taken[:, 0] / total, 1 - taken[:, 1] / total]
        found.append(np.stack([*shares, pairs.sum(axis=1) / total**2], axis=1))
    return np.concatenate(found)


def calibrate(
    encoder: Encoder,
    pairs: PairEmbeddings,
    *,
    precision: float = 0.95,
    data: str,
    languages: Sequence[str] = ("zh", "en"),
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[Calibration, dict[str, TaskOutput]]:
    """Measure every language that has captions; returns what to keep, and the results by language.

    data: the name of the data, to be kept. Raises ConfigError on a precision outside of 0 to 1,
    DataError if there are no captions or fewer than two pictures.
    """
    if not 0 < precision <= 1:
        raise ConfigError(f"precision is {precision:g}, expected more than 0 and at most 1")
    known = [language for language in languages if language in pairs.texts]
    if not known:
        raise DataError(f"no captions in {' or '.join(languages)}, calibration needs some")
    found: dict[str, LanguageCalibration] = {}
    outputs: dict[str, TaskOutput] = {}
    for language in known:
        text = pairs.texts[language]
        scores = query_scores(pairs.image, text.vectors, text.owner, text.texts)
        found[language], outputs[language] = measure_calibration(
            scores, precision=precision, pictures=len(pairs.image), seed=seed, draws=draws
        )
    return Calibration(encoder.fingerprint, precision, data, found), outputs
