"""What a measurement gives: numbers with their count, interval and tie bounds.

Not for files (results.py) nor for the measuring itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metric:
    """One number and how far to trust it. Shares are 0..1."""

    value: float
    """The expected value, over random orders where scores tie; NaN where nothing was measured."""
    n: int
    """Queries, pictures or pairs that it is the mean of."""
    ci95: tuple[float, float] | None = None
    """Bootstrap interval, 2.5 to 97.5 percent."""
    tie_low: float | None = None
    """The value if every tie were decided against the right answer; None where there are none."""
    tie_high: float | None = None
    """The value if every tie were decided for it."""


def undefined(n: int = 0) -> Metric:
    """Return the metric of something that could not be measured."""
    return Metric(math.nan, n)


@dataclass(frozen=True)
class TaskOutput:
    """What a task measured, before anything is said about model, data and machine."""

    metrics: dict[str, Metric]
    details: dict[str, Any] = field(default_factory=dict)
    """Values that JSON holds, for tables and pages: per class, per kind, examples."""
    ranks: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Per query, for comparisons of two models: kept in an .npz beside the JSON."""
