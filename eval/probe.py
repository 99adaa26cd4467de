"""What a model's picture vectors hold of classes: linear probe and nearest neighbours.

On vectors that are there already. Not for a few examples per class (few_shot.py), nor for classes
described in words (classification.py).
"""

# N train pictures   Q test pictures   D width of an embedding   K classes

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.classification import measure_scores
from m2encoder.eval.logistic import GRID, choose_strength, fit_logistic
from m2encoder.eval.metric import TaskOutput
from m2encoder.eval.scores import check_vectors, score_blocks

HELD_OUT = 0.2
NEIGHBOURS = 20
TEMPERATURE = 0.07
SPARE = 32
"""Neighbours looked at beyond k, so that rounding seldom hides one that ties."""
ROUNDING = 1e-5
"""More than float32 can be off in a cosine."""
QUERIES = 256


@dataclass(frozen=True)
class Features:
    """Vectors of pictures and the class of each. Raises ValueError on shapes, DataError on NaN."""

    vectors: NDArray[np.float32]
    """(N, D), unit norm."""
    targets: NDArray[np.int64]
    """(N,) position in `labels`."""
    labels: list[str]

    def __post_init__(self) -> None:
        check_vectors(self.vectors, "labelled pictures")
        if self.targets.shape != (len(self.vectors),):
            raise ValueError(
                f"targets have shape {self.targets.shape}, expected one for each of "
                f"{len(self.vectors):,} pictures"
            )
        if self.targets.min() < 0 or self.targets.max() >= len(self.labels):
            raise ValueError(
                f"targets reach from {self.targets.min()} to {self.targets.max()}, expected 0 to "
                f"{len(self.labels) - 1}"
            )
        if len(set(self.labels)) != len(self.labels):
            twice = next(x for i, x in enumerate(self.labels) if x in self.labels[:i])
            raise DataError(f"label {twice!r} appears twice, labels must differ; rename one")


@dataclass(frozen=True)
class Split:
    """Train and test pictures with common class numbers."""

    train: Features
    test: Features
    """Its labels are those of `train`."""
    unseen: NDArray[np.int64]
    """Classes of test pictures that no train picture has: behind all others, and named."""

    @property
    def labels(self) -> list[str]:
        """The name of each class."""
        return self.train.labels

    def facts(self) -> dict[str, Any]:
        """Return what results say of it."""
        names = [self.labels[k] for k in self.unseen]
        return {
            "train_pictures": len(self.train.targets),
            "train_classes": len(np.unique(self.train.targets)),
            "missing_from_train": names,
            "pictures_missing_from_train": int(np.isin(self.test.targets, self.unseen).sum()),
        }


def join(train: Features, test: Features) -> Split:
    """Give the classes of both the same numbers: those of train, then what only test has.

    Raises DataError if train shows a single class, or nothing that test asks for; ValueError if
    the vectors differ in width.
    """
    if train.vectors.shape[1] != test.vectors.shape[1]:
        raise ValueError(
            f"train vectors have width {train.vectors.shape[1]}, test vectors "
            f"{test.vectors.shape[1]}; expected those of one model"
        )
    shown = [train.labels[k] for k in np.unique(train.targets)]
    if len(shown) < 2:
        raise DataError(
            f"train shows one class, {shown[0]!r}, expected at least two; check the labels"
        )
    labels = list(dict.fromkeys([*train.labels, *test.labels]))
    number = {label: k for k, label in enumerate(labels)}
    renumbered = np.asarray([number[label] for label in test.labels], np.int64)
    targets = renumbered[test.targets]
    unseen = np.setdiff1d(targets, np.unique(train.targets))
    if len(unseen) == len(np.unique(targets)):
        raise DataError(
            f"no label of test is in train: train has {_some(shown)}, test has "
            f"{_some([labels[k] for k in unseen])}; are they of the same data set?"
        )
    return Split(
        Features(train.vectors, train.targets, labels),
        Features(test.vectors, targets, labels),
        unseen,
    )


def _some(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:3])) + (", ..." if len(labels) > 3 else "")


def _measured(scores: Any, split: Split, details: dict[str, Any], seed: int) -> TaskOutput:
    """Measure scores (Q, K) of the test pictures."""
    output = measure_scores(scores, split.test.targets, labels=split.labels, seed=seed)
    return replace(output, details=output.details | split.facts() | details)


# --- linear probe --------------------------------------------------------------------------------


def measure_linear_probe(
    split: Split, *, grid: Sequence[float] = GRID, seed: int = 0
) -> TaskOutput:
    """Fit logistic regression to all train pictures and measure it on the test pictures.

    Its strength is the one of `grid` that is right most often on a fifth of the train pictures,
    drawn by `seed`, after fitting to the others; then it is fitted to all. Each value of a vector
    is scaled by its mean and deviation over what is fitted to. Raises MissingExtraError without
    scikit-learn.
    """
    x_ND, targets = split.train.vectors, split.train.targets
    fitted, held_out = stratified(targets, HELD_OUT, seed=seed)
    if len(grid) > 1 and len(held_out) and len(np.unique(targets[fitted])) > 1:
        strength, tried = choose_strength(
            x_ND[fitted], targets[fitted], x_ND[held_out], targets[held_out], grid
        )
    else:  # no class has two pictures, so none can be held out
        strength, tried = sorted(grid)[len(grid) // 2], {}
    model = fit_logistic(x_ND, targets, strength)
    scores = with_unseen(model.scores(split.test.vectors), model.classes, len(split.labels))
    details = {
        "strength": strength,
        "strengths": {f"{value:g}": share for value, share in tried.items()},
        "strength_at_edge": bool(tried) and strength in (min(grid), max(grid)),
        "held_out": len(held_out),
        "standardised": "mean and deviation over train",
        "converged": model.converged,
        "iterations": model.iterations,
    }
    return _measured(scores, split, details, seed)


def stratified(
    targets: NDArray[np.int64], share: float, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into (rest, share), drawn within each class; a class keeps at least one in rest.

    A class of two or more has at least one in the share. Both are in rising order.
    """
    rng = np.random.default_rng(seed)
    taken: list[NDArray[np.int64]] = []
    for k in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == k))
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        taken.append(rows[:count])
    held_out = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(targets)), held_out), held_out


def with_unseen(
    scores: NDArray[np.floating], classes: NDArray[np.int64], num_classes: int
) -> NDArray[np.float64]:
    """Return (Q, K): scores of (Q, len(classes)) in their columns, the others below all of them."""
    below = scores.min(axis=1, keepdims=True) - 1
    found = np.repeat(below, num_classes, axis=1).astype(np.float64)
    found[:, classes] = scores
    return found


# --- nearest neighbours --------------------------------------------------------------------------


def measure_knn(
    split: Split, *, k: int = NEIGHBOURS, temperature: float = TEMPERATURE, seed: int = 0
) -> TaskOutput:
    """Let the k nearest train pictures vote for their classes, as DINO does (`knn_votes`).

    Raises ConfigError if there are fewer than k train pictures.
    """
    count = len(split.train.targets)
    if not 1 <= k <= count:
        raise ConfigError(f"k is {k:,}, expected 1 to {count:,}, the number of train pictures")
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}, expected more than 0")
    votes = knn_votes(
        split.train.vectors, split.train.targets, split.test.vectors,
        num_classes=len(split.labels), k=k, temperature=temperature,
    )  # fmt: skip
    votes[:, split.unseen] = -1
    return _measured(votes, split, {"k": k, "temperature": temperature}, seed)


def knn_votes(
    train_ND: Any,
    targets: NDArray[np.int64],
    test_QD: Any,
    *,
    num_classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> NDArray[np.float64]:
    """Return (Q, K): per class the votes of the k train vectors with the largest cosines.

    A vote weighs exp(cosine / temperature), here divided by that of the nearest neighbour so that
    it stays finite. Source: Caron et al. (arXiv 2104.14294), facebookresearch/dino eval_knn.py: k
    20, temperature 0.07. Neighbours that tie for the last places share them evenly: what they weigh
    in the mean over random orders. Cosines are compared as float32 rounded from float64.
    """
    train_ND, test_QD = np.asarray(train_ND, np.float32), np.asarray(test_QD, np.float32)
    votes = np.zeros((len(test_QD), num_classes))
    for rows, ids, cosines in _neighbours(train_ND, test_QD, k):
        order = np.lexsort((ids, -cosines))  # so that equal votes are equal sums
        ids, cosines = ids[order], cosines[order]
        last = cosines[k - 1]
        above, same = np.count_nonzero(cosines > last), np.count_nonzero(cosines == last)
        kept = above + same
        weights = np.exp((cosines[:kept].astype(np.float64) - cosines[0]) / temperature)
        weights[above:] *= (k - above) / same
        np.add.at(votes[rows], targets[ids[:kept]], weights)
    return votes


def _neighbours(
    train_ND: NDArray[np.float32], test_QD: NDArray[np.float32], k: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (row, ids, cosines) of at least the k nearest and all that tie with the last of them.

    Found in float32, then compared in float64; where more might tie, all train vectors are.
    """
    wide = min(len(train_ND), k + SPARE)
    for start in range(0, len(test_QD), QUERIES):
        block_QD = np.ascontiguousarray(test_QD[start : start + QUERIES])
        near, found = faiss.knn(block_QD, train_ND, wide, metric=faiss.METRIC_INNER_PRODUCT)
        for place, (roughly, ids) in enumerate(zip(near, found, strict=True)):
            query_D = block_QD[place].astype(np.float64)
            cosines = (train_ND[ids].astype(np.float64) @ query_D).astype(np.float32)
            last = np.partition(cosines, -k)[-k]
            if wide < len(train_ND) and roughly.min() >= last - ROUNDING:
                ids = np.arange(len(train_ND))
                cosines = next(score_blocks(block_QD[place : place + 1], train_ND))[1][0]
            yield start + place, ids, cosines
