"""Recall by hand and against brute force, ties, several captions per image, bad input.

Not for what is fed into it: see test_suite.py.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from m2encoder.errors import DataError
from m2encoder.eval.retrieval import (
    ranks_of_matrix,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)


def brute_force_ranks(image, text, owner):
    """The definition, one query at a time: 1 + wrong answers with a greater or equal score."""
    sim = (np.asarray(image, np.float64) @ np.asarray(text, np.float64).T).astype(np.float32)
    i2t, t2i = [], []
    for i in range(len(image)):
        own = [sim[i, t] for t in range(len(text)) if owner[t] == i]
        if own:
            wrong = [sim[i, t] for t in range(len(text)) if owner[t] != i]
            i2t.append(1 + sum(score >= max(own) for score in wrong))
    for t in range(len(text)):
        wrong = [sim[i, t] for i in range(len(image)) if i != owner[t]]
        t2i.append(1 + sum(score >= sim[owner[t], t] for score in wrong))
    return i2t, t2i


def random_case(seed, num_images, num_texts, dim=8, distinct=None):
    """Unit vectors and owners; with `distinct`, only so many different vectors, so many ties."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((distinct or num_images + num_texts, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = rng.integers(distinct, size=num_images + num_texts) if distinct else slice(None)
    vectors = vectors[rows]
    owner = rng.integers(num_images, size=num_texts)
    return vectors[:num_images], vectors[num_images:], owner


def test_recall_counts_any_of_several_captions():
    sim_IT = tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.3]])  # image 0 owns texts 0 and 2
    assert recall_at_k(sim_IT, owner=tensor([0, 1, 0]), k=1) == {"i2t": 1.0, "t2i": 1.0}


def test_recall_worked_by_hand_where_some_miss():
    sim_IT = np.array([[0.5, 0.9, 0.1], [0.6, 0.2, 0.3], [0.4, 0.1, 0.8]])
    # image 0: text 1 is wrongly first; image 1: both others before; image 2: right
    # text 0: image 1 before; text 1: images 0 before, 2 behind; text 2: right
    ranks = ranks_of_matrix(sim_IT, owner=[0, 1, 2])
    assert ranks.i2t.tolist() == [2, 3, 1]
    assert ranks.t2i.tolist() == [2, 2, 1]
    assert recall_at_k(sim_IT, owner=[0, 1, 2], k=2) == {"i2t": pytest.approx(2 / 3), "t2i": 1.0}


def test_a_later_caption_alone_makes_a_hit():
    sim_IT = np.array([[0.1, 0.9, 0.5], [0.0, 0.6, 0.4]])  # image 0 owns texts 0 and 1
    assert recall_at_k(sim_IT, owner=[0, 0, 1], k=1)["i2t"] == 0.5


def test_own_captions_do_not_stand_in_each_others_way():
    sim_IT = np.array([[0.9, 0.9, 0.8], [0.1, 0.1, 0.9]])
    assert ranks_of_matrix(sim_IT, owner=[0, 0, 1]).i2t.tolist() == [1, 1]


def test_a_collapsed_model_scores_zero():
    same = np.full((20, 8), 8**-0.5, np.float32)
    metrics = retrieval_metrics(same, same, np.arange(20), tile=7)
    assert (metrics["mean_recall"], metrics["rsum"]) == (0.0, 0.0)
    assert metrics["i2t_median_rank"] == 20


def test_a_tie_counts_against_the_query():
    sim_IT = np.array([[0.5, 0.5], [0.1, 0.6]])
    assert ranks_of_matrix(sim_IT, owner=[0, 1]).i2t.tolist() == [2, 1]


def test_an_image_without_text_is_no_query_but_stands_in_the_way():
    image = np.array([[1, 0], [0, 1], [0.8, 0.6]], np.float32)
    text = np.array([[0.8, 0.6], [0, 1]], np.float32)
    metrics = retrieval_metrics(image, text, np.array([0, 1]))
    assert metrics["images_without_text"] == 1
    assert retrieval_ranks(image, text, np.array([0, 1])).t2i.tolist() == [2, 1]
    assert len(retrieval_ranks(image, text, np.array([0, 1])).i2t) == 2


def test_one_pair_is_always_found():
    one = np.array([[1.0, 0.0]], np.float32)
    metrics = retrieval_metrics(one, one, [0])
    assert metrics["i2t_r1"] == metrics["t2i_r1"] == 1.0
    assert metrics["rsum"] == 600.0


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 14),
    num_texts=st.integers(1, 20),
    tile=st.integers(1, 9),
    distinct=st.sampled_from([None, 1, 3]),
)
def test_tiles_equal_brute_force(seed, num_images, num_texts, tile, distinct):
    image, text, owner = random_case(seed, num_images, num_texts, distinct=distinct)
    i2t, t2i = brute_force_ranks(image, text, owner)
    ranks = retrieval_ranks(image, text, owner, tile=tile)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_matrix_and_its_embeddings_give_the_same_recall(seed):
    image, text, owner = random_case(seed, 9, 15)
    sim_IT = (image.astype(np.float64) @ text.T.astype(np.float64)).astype(np.float32)
    metrics = retrieval_metrics(image, text, owner, tile=4)
    for k in (1, 5, 10):
        recall = recall_at_k(sim_IT, owner=owner, k=k)
        assert recall == {"i2t": metrics[f"i2t_r{k}"], "t2i": metrics[f"t2i_r{k}"]}


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_recall_never_falls_as_k_grows(seed):
    image, text, owner = random_case(seed, 12, 20, distinct=6)
    metrics = retrieval_metrics(image, text, owner, ks=(1, 2, 3, 5, 8, 20))
    for direction in ("i2t", "t2i"):
        recalls = [metrics[f"{direction}_r{k}"] for k in (1, 2, 3, 5, 8, 20)]
        assert recalls == sorted(recalls)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_the_order_of_images_and_texts_does_not_matter(seed):
    image, text, owner = random_case(seed, 12, 20, distinct=9)
    rng = np.random.default_rng(seed)
    images, texts = rng.permutation(12), rng.permutation(20)
    moved_owner = np.argsort(images)[owner[texts]]
    moved = retrieval_metrics(image[images], text[texts], moved_owner, tile=5)
    assert moved == pytest.approx(retrieval_metrics(image, text, owner), abs=1e-12)


def test_large_tiles_agree_with_small_ones_on_ties_of_wide_vectors():
    """BLAS sums in another order for other shapes; rounding from float64 hides that."""
    image, text, owner = random_case(3, 300, 500, dim=768, distinct=40)
    whole, parts = (retrieval_ranks(image, text, owner, tile=tile) for tile in (1000, 37))
    assert np.array_equal(whole.i2t, parts.i2t)
    assert np.array_equal(whole.t2i, parts.t2i)


def test_nan_embeddings_are_named():
    image, text, owner = random_case(0, 4, 4)
    text[2, 1] = np.nan
    with pytest.raises(DataError, match=r"text embeddings: 1 of 4 rows .* first is row 2"):
        retrieval_metrics(image, text, owner)


@pytest.mark.parametrize(("num_images", "num_texts"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sets_are_refused(num_images, num_texts):
    with pytest.raises(DataError, match=f"{num_images} images and {num_texts} texts"):
        retrieval_metrics(np.zeros((num_images, 2)), np.zeros((num_texts, 2)), [0] * num_texts)


@pytest.mark.parametrize("owner", [[0, 2], [-1, 0]])
def test_an_owner_out_of_range_is_refused(owner):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        retrieval_metrics(np.eye(2), np.eye(2), owner)


@pytest.mark.parametrize("owner", [[0], [[0, 1]], [0.0, 1.0]])
def test_an_owner_of_the_wrong_shape_or_type_is_refused(owner):
    with pytest.raises(ValueError, match="expected one integer for each of 2 texts"):
        recall_at_k(np.eye(2), owner=owner, k=1)


def test_embeddings_of_different_width_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        retrieval_metrics(np.zeros((2, 3)), np.zeros((2, 2)), [0, 1])


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        recall_at_k(np.eye(2), owner=[0, 1], k=0)
