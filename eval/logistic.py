"""Logistic regression by scikit-learn, an extra: the fit, and the choice of its strength.

Not for what is measured with it (probe.py, few_shot.py).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import MissingExtraError

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""scikit-learn's C for scaled vectors: how much the examples weigh against small weights."""
ITERATIONS = 1000


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier."""

    weights: NDArray[np.float64]
    """(C, D) for scaled vectors."""
    biases: NDArray[np.float64]
    classes: NDArray[np.int64]
    """(C,) the class of each row."""
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    iterations: int
    converged: bool

    def scores(self, x_ND: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return (N, C) logits."""
        return (x_ND - self.mean) / self.scale @ self.weights.T + self.biases


def has_sklearn() -> bool:
    """Say whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def fit_logistic(
    x_ND: NDArray[np.floating], targets: NDArray[np.int64], strength: float
) -> Logistic:
    """Fit multinomial logistic regression with an L2 penalty by L-BFGS, in float64.

    Each column is scaled to mean 0 and deviation 1 over x_ND; a constant column to 0. strength: C
    of scikit-learn. Raises MissingExtraError without scikit-learn, ValueError with one class.
    """
    if not has_sklearn():
        raise MissingExtraError("scikit-learn", extra="probe")
    from sklearn.exceptions import ConvergenceWarning  # pyright: ignore[reportMissingImports]
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]

    mean, deviation = _moments(x_ND)
    scale = np.where(deviation > 1e-9, deviation, 1.0)
    model: Any = LogisticRegression(C=strength, solver="lbfgs", max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said by `converged`
        model.fit((x_ND - mean) / scale, targets)
    weights, biases, classes = model.coef_, model.intercept_, model.classes_
    if len(classes) == 2:  # one row, the logit of the second class
        weights, biases = np.concatenate([-weights, weights]) / 2, np.append(-biases, biases) / 2
    iterations = int(np.max(model.n_iter_))
    return Logistic(
        weights, biases, classes, mean, scale, iterations, converged=iterations < ITERATIONS
    )


def _moments(x_ND: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return x_ND.mean(axis=0, dtype=np.float64), x_ND.std(axis=0, dtype=np.float64)


def choose_strength(
    x_ND: NDArray[np.floating],
    targets: NDArray[np.int64],
    held_out_ND: NDArray[np.floating],
    held_out_targets: NDArray[np.int64],
    grid: Sequence[float],
) -> tuple[float, dict[float, float]]:
    """Return the strength that is right most often on the held-out rows, and each one's share.

    Of equal ones the smallest, which prefers small weights.
    """
    shares: dict[float, float] = {}
    for strength in sorted(grid):
        model = fit_logistic(x_ND, targets, strength)
        said = model.classes[model.scores(held_out_ND).argmax(axis=1)]
        shares[strength] = float(np.mean(said == held_out_targets))
    return max(shares, key=lambda strength: (shares[strength], -strength)), shares
