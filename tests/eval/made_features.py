"""Made-up vectors of labelled pictures, for tests of what is learned from them."""

import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from m2encoder.eval.probe import Features

needs_sklearn = pytest.mark.skipif(
    find_spec("sklearn") is None, reason="scikit-learn is not installed: m2encoder[probe]"
)
LABELS = ["猫", "狗", "red bird", "🐟", "馬"]


def unit(vectors):
    """The rows at length 1, as float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clusters(count, *, labels=LABELS, noise=0.6, dim=8, seed=0):
    """Pictures around one direction for each class, as many of each."""
    centres = unit(np.random.default_rng(99).normal(size=(len(labels), dim)))
    targets = np.arange(count) % len(labels)
    rng = np.random.default_rng(seed)
    noisy = centres[targets] + noise * rng.normal(size=(count, dim)) / math.sqrt(dim)
    return Features(unit(noisy), targets, list(labels))


def some(features, rows):
    """Features of these rows alone."""
    return replace(features, vectors=features.vectors[rows], targets=features.targets[rows])
