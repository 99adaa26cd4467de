"""Our recalls and accuracies beside CLIP_benchmark's own functions.

Not for its models and data sets. Its accuracy fails with NumPy 2.4 and later, see `accuracy`.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("clip_benchmark", reason="clip-benchmark is not installed")

from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

from m2encoder.eval.classification import measure_scores
from m2encoder.eval.retrieval import RetrievalSettings, measure_retrieval

KS = (1, 2, 5, 10)


def retrieval(seed, num_images, num_texts, *, distinct=None):
    """Unit vectors with some signal, and owners: every image has a text, some several."""
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(num_images), rng.integers(num_images, size=num_texts)])
    image = rng.standard_normal((num_images, 24)).astype(np.float32)
    text = image[owner] + 3 * rng.standard_normal((len(owner), 24)).astype(np.float32)
    if distinct:
        text, image = (
            text[np.arange(len(owner)) % distinct],
            image[np.arange(num_images) % distinct],
        )
    return *(side / np.linalg.norm(side, axis=1, keepdims=True) for side in (image, text)), owner


def their_recalls(image, text, owner):
    """What their `evaluate` makes of embeddings."""
    scores = torch.from_numpy(text) @ torch.from_numpy(image).t()
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(scores)), torch.from_numpy(owner)] = True
    return {
        f"{direction}_r{k}": (batchify(recall_at_k, *sides, 16, "cpu", k=k) > 0).float().mean()
        for direction, sides in (("t2i", (scores, right)), ("i2t", (scores.T, right.T)))
        for k in KS
    }


@pytest.mark.parametrize("seed", range(5))
def test_recalls_agree_where_nothing_ties(seed):
    image, text, owner = retrieval(seed, 60, 130)
    ours = measure_retrieval(image, text, owner, settings=RetrievalSettings(ks=KS, draws=2)).metrics
    for name, theirs in their_recalls(image, text, owner).items():
        assert ours[name].tie_low is None
        assert ours[name].value == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("distinct", [1, 3, 20])
def test_their_recalls_lie_within_our_bounds_where_scores_tie(distinct):
    image, text, owner = retrieval(7, 60, 130, distinct=distinct)
    ours = measure_retrieval(image, text, owner, settings=RetrievalSettings(ks=KS, draws=2)).metrics
    assert ours["i2t_r1"].tie_low is not None
    for name, theirs in their_recalls(image, text, owner).items():
        low, high = ours[name].tie_low, ours[name].tie_high
        low, high = (ours[name].value if end is None else end for end in (low, high))
        assert low - 1e-6 <= float(theirs) <= high + 1e-6


@pytest.fixture
def accuracy():
    """Their function, where it runs: it makes a number of a one-element array."""
    module = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_classification", reason="scikit-learn is not installed"
    )
    try:
        module.accuracy(torch.eye(2), torch.tensor([0, 1]))
    except TypeError as error:
        pytest.skip(
            f"clip-benchmark's accuracy needs numpy < 2.4, here is {np.__version__}: {error}"
        )
    return module.accuracy


def classification(seed, num_pictures, num_classes, *, most):
    rng = np.random.default_rng(seed)
    targets = rng.integers(num_classes, size=num_pictures)
    scores = rng.integers(0, most + 1, (num_pictures, num_classes)).astype(np.float32)
    scores[np.arange(num_pictures), targets] += most // 3
    return scores, targets


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("num_classes", [6, 40])
def test_accuracies_agree_where_nothing_ties(accuracy, num_classes):
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(num_classes)
    targets = rng.integers(num_classes, size=400)
    scores = rng.standard_normal((400, num_classes)).astype(np.float32)
    scores[np.arange(400), targets] += 1
    ours = measure_scores(scores, targets, labels=["x"] * num_classes, draws=2).metrics
    theirs = accuracy(torch.from_numpy(scores), torch.from_numpy(targets), topk=(1, 5))
    assert [ours["top1"].value, ours["top5"].value] == pytest.approx(theirs, abs=1e-6)
    recall = balanced_accuracy_score(targets, scores.argmax(axis=1))
    assert ours["mean_per_class_recall"].value == pytest.approx(recall, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("most", [0, 3])
def test_their_accuracies_lie_within_our_bounds_where_scores_tie(accuracy, most):
    scores, targets = classification(2, 300, 12, most=most)
    ours = measure_scores(scores, targets, labels=["x"] * 12, draws=2).metrics
    theirs = accuracy(torch.from_numpy(scores), torch.from_numpy(targets), topk=(1, 5))
    for metric, value in zip((ours["top1"], ours["top5"]), theirs, strict=True):
        assert metric.tie_low is not None
        assert metric.tie_high is not None
        assert metric.tie_low - 1e-6 <= value <= metric.tie_high + 1e-6
