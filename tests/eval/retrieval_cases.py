"""Random retrievals and the definition of a rank, one query at a time, in float64.

Not a test: test_retrieval.py and test_exact_ranks.py compare with it.
"""

import math
from itertools import product

import numpy as np
from hypothesis import strategies as st


def unit_case(seed, num_images, num_texts, *, dim=8, distinct=None):
    """Unit vectors and owners; with `distinct`, only so many different vectors, so many ties."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((distinct or num_images + num_texts, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = rng.integers(distinct, size=num_images + num_texts) if distinct else slice(None)
    vectors = vectors[rows]
    owner = rng.integers(num_images, size=num_texts)
    return vectors[:num_images], vectors[num_images:], owner


@st.composite
def small_cases(draw):
    """Ragged captions, images without any, ties: vectors of few small whole numbers, or units."""
    num_images, num_texts = draw(st.integers(1, 12)), draw(st.integers(1, 18))
    seed = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["units", "repeated", "whole", "collapsed"]))
    if kind == "whole":  # products are exact, and many of them the same
        rng = np.random.default_rng(seed)
        vectors = rng.integers(-2, 3, size=(num_images + num_texts, 3)).astype(np.float32)
        owner = rng.integers(num_images, size=num_texts)
        return vectors[:num_images], vectors[num_images:], owner
    distinct = {"units": None, "repeated": 4, "collapsed": 1}[kind]
    return unit_case(seed, num_images, num_texts, distinct=distinct)


def true_scores(image, text):
    """Sums without any rounding before that to float32, as the definition has them."""
    image, text = (np.asarray(side, np.float64).tolist() for side in (image, text))
    sums = [math.fsum(a * b for a, b in zip(*pair, strict=True)) for pair in product(image, text)]
    return np.array(sums, np.float32).reshape(len(image), len(text))


def true_ranks(scores, right):
    """Per query with a right answer (above, tied, right); both (queries, candidates)."""
    found = []
    for row, is_right in zip(scores.tolist(), np.asarray(right).tolist(), strict=True):
        own = [score for score, yes in zip(row, is_right, strict=True) if yes]
        wrong = [score for score, yes in zip(row, is_right, strict=True) if not yes]
        if own:
            best = max(own)
            above, tied = sum(x > best for x in wrong), sum(x == best for x in wrong)
            found.append((above, tied, own.count(best)))
    return found


def as_tuples(ranks):
    """Ranks as `true_ranks` writes them."""
    return list(zip(*(part.tolist() for part in ranks), strict=True))


def owned(owner, num_images):
    """(I, T) whether the image owns the text."""
    return np.arange(num_images)[:, None] == np.asarray(owner)
