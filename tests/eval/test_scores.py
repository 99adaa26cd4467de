"""Cosines in blocks and of pairs, against one matrix.

Not for pictures and captions: test_bilingual.py.
"""

import numpy as np
import pytest

from m2encoder.errors import DataError
from m2encoder.eval.scores import SCORES_AT_ONCE, paired_scores, score_blocks


def unit(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_blocks_are_the_whole_matrix():
    rng = np.random.default_rng(0)
    query, gallery = unit(rng, 1_100, 4), unit(rng, 4_200, 4)
    blocks = list(score_blocks(query, gallery))
    assert len(blocks) > 1
    assert max(block.size for _, block in blocks) <= SCORES_AT_ONCE
    expected = (query.astype(np.float64) @ gallery.astype(np.float64).T).astype(np.float32)
    assert np.array_equal(np.concatenate([block for _, block in blocks]), expected)
    assert np.array_equal(paired_scores(query, gallery[:1_100]), np.diagonal(expected))


def test_a_gallery_wider_than_a_block_is_scored_row_by_row():
    gallery = np.ones((SCORES_AT_ONCE + 1, 1), np.float32)
    blocks = [block.shape for _, block in score_blocks(np.ones((2, 1), np.float32), gallery)]
    assert blocks == [(1, SCORES_AT_ONCE + 1)] * 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_are_named(bad):
    vectors = np.ones((3, 2), np.float32)
    vectors[1, 0] = bad
    with pytest.raises(DataError, match=r"gallery: 1 of 3 vectors hold NaN or infinity.*row 1"):
        list(score_blocks(np.ones((1, 2)), vectors))


def test_no_vectors_at_all_are_refused():
    with pytest.raises(DataError, match="no queries"):
        list(score_blocks(np.ones((0, 2)), np.ones((1, 2))))


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match="vectors of one width"):
        list(score_blocks(np.ones((1, 2)), np.ones((1, 3))))
    with pytest.raises(ValueError, match="expected the same"):
        paired_scores(np.ones((1, 2)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="expected \\(N, D\\)"):
        paired_scores(np.ones(2), np.ones(2))
