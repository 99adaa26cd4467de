"""Exact ranks against the definition, whichever screen and tile; the screens' bounds.

Not for recall and its metrics (test_retrieval.py).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import as_tuples, owned, small_cases, true_ranks, true_scores, unit_case

from m2encoder.eval import exact_ranks as module
from m2encoder.eval.exact_ranks import exact_ranks
from m2encoder.eval.retrieval import retrieval_ranks
from m2encoder.eval.right_answers import right_pairs
from m2encoder.eval.screens import Bfloat16Screen, Float32Screen, measured

SCREENS = {"float32": [], "twice": [Float32Screen]}
FAST = pytest.mark.skipif(not Bfloat16Screen.is_fast(), reason="this processor has no AMX")
if Bfloat16Screen.is_fast():  # elsewhere nothing holds torch to the bound
    SCREENS["bfloat16"] = [Bfloat16Screen]
BOTH = [Float32Screen, pytest.param(Bfloat16Screen, marks=FAST)]


def ranks_of(image, text, owner, **options):
    return exact_ranks(image, text, right_pairs(owner), **options)


@pytest.fixture
def never_enough(monkeypatch):
    """Screens that decide nothing, so that every tile is counted in float64."""
    monkeypatch.setattr(module, "OPEN_SHARE", -1.0)


@settings(max_examples=200, deadline=None)
@given(
    case=small_cases(),
    tile=st.tuples(st.integers(1, 13), st.integers(1, 19)),
    coarse=st.sampled_from(sorted(SCREENS)),
)
def test_every_screen_and_tile_gives_the_ranks_of_the_definition(case, tile, coarse):
    image, text, owner = case
    scores, right = true_scores(image, text), owned(owner, len(image))
    ranks = ranks_of(image, text, owner, tile=tile, coarse=SCREENS[coarse])
    assert as_tuples(ranks.i2t) == true_ranks(scores, right)
    assert as_tuples(ranks.t2i) == true_ranks(scores.T, right.T)


@pytest.mark.usefixtures("never_enough")
@pytest.mark.parametrize("distinct", [None, 1, 7])
def test_counting_in_float64_gives_the_ranks_of_the_definition(distinct):
    image, text, owner = unit_case(5, 23, 61, dim=19, distinct=distinct)
    scores, right = true_scores(image, text), owned(owner, len(image))
    ranks = ranks_of(image, text, owner, tile=(10, 24))
    assert as_tuples(ranks.i2t) == true_ranks(scores, right)
    assert as_tuples(ranks.t2i) == true_ranks(scores.T, right.T)


@pytest.mark.parametrize("distinct", [None, 40, 1])
@pytest.mark.parametrize("coarse", sorted(SCREENS))
def test_wide_vectors_rank_alike_in_tiles_of_any_size(coarse, distinct):
    """Tiles that hold everything take other paths through a matrix product than small ones."""
    image, text, owner = unit_case(3, 300, 700, dim=768, distinct=distinct)
    whole = ranks_of(image, text, owner, coarse=SCREENS[coarse])
    parts = ranks_of(image, text, owner, tile=(37, 101), coarse=[])
    assert all(np.array_equal(*pair) for pair in zip(whole.i2t, parts.i2t, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(whole.t2i, parts.t2i, strict=True))


@FAST
def test_pairs_left_open_by_bfloat16_are_decided_in_every_tile_and_direction(monkeypatch):
    seen = set()
    pair_keys = Float32Screen.pair_keys

    def spied(self, texts, images, pairs, axis):
        seen.add((texts.start, images.start, axis))
        return pair_keys(self, texts, images, pairs, axis)

    monkeypatch.setattr(Float32Screen, "pair_keys", spied)
    image, text, _ = unit_case(12, 1500, 3000, dim=64)
    owner = np.arange(3000) % 1500
    text = (text + image[owner] / 2).astype(np.float32)
    ranks = ranks_of(image, text, owner, tile=(1500, 750), coarse=[Bfloat16Screen])
    assert seen == {(t, i, axis) for t in (0, 1500) for i in (0, 750) for axis in (0, 1)}
    scores = (image.astype(np.float64) @ text.astype(np.float64).T).astype(np.float32)
    own = scores[owner, np.arange(3000)]
    assert np.array_equal(ranks.t2i.above, np.count_nonzero(scores > own, axis=0))
    best = np.maximum(own[:1500], own[1500:])
    assert np.array_equal(ranks.i2t.above, np.count_nonzero(scores > best[:, None], axis=1))


def test_counts_are_right_in_tiles_far_wider_and_higher_than_a_byte_counts():
    image, text, _ = unit_case(4, 2500, 600, dim=4)
    owner = np.argmin(image @ text.T, axis=0)  # nearly all other images score higher
    whole = ranks_of(image, text, owner, tile=(600, 2500))
    parts = ranks_of(image, text, owner, tile=(100, 200))
    assert whole.t2i.above.min() > 2040
    assert whole.i2t.above.max() > 255
    assert all(np.array_equal(*pair) for pair in zip(whole.t2i, parts.t2i, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(whole.i2t, parts.i2t, strict=True))


@pytest.mark.parametrize("screen", BOTH)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-18, 1e9])
@pytest.mark.parametrize("width", [1, 7, 64, 768])
def test_what_a_screen_is_sure_of_is_so(screen, dtype, scale, width):
    rng = np.random.default_rng(width)
    image = (scale * rng.standard_normal((41, width))).astype(dtype)
    text = rng.standard_normal((53, width)).astype(dtype)
    scores = (image.astype(np.float64) @ text.astype(np.float64).T).astype(np.float32)
    for best in np.quantile(scores, [0.0, 0.2, 0.5, 0.9, 1.0]):
        sides = (np.full(41, best), np.full(53, best))
        screened = screen(measured(image), measured(text), *sides)
        for texts, images in (
            (slice(0, 53), slice(0, 41)),
            (slice(0, 53), slice(40, 41)),
            (slice(52, 53), slice(3, 20)),
        ):
            keys, exact = screened.keys(texts, images), scores.T[texts, images]
            for edges, queries in (
                (screened.text_edges, (texts, None)),
                (screened.image_edges, (None, images)),
            ):
                assert np.all(exact[keys < edges.low[queries]] < best)
                assert np.all(exact[keys > edges.high[queries]] > best)


@pytest.mark.parametrize("screen", BOTH)
def test_a_screen_leaves_little_open(screen):
    """Otherwise it would be right and useless."""
    image, text, owner = unit_case(8, 200, 400, dim=256)
    scores, wrong = image @ text.T, ~owned(owner, 200)
    best = np.full(200, 0.2), scores[owner, np.arange(400)].astype(np.float64)
    screened = screen(measured(image), measured(text), *best)
    keys = screened.keys(slice(0, 400), slice(0, 200)).T
    edges = screened.text_edges
    is_open = (keys >= edges.low) & (keys <= edges.high)
    assert np.mean(is_open[wrong]) < {Float32Screen: 1e-3, Bfloat16Screen: 0.1}[screen]


def test_no_setting_of_torch_makes_the_fine_screen_less_precise():
    image, text, owner = unit_case(9, 64, 128, dim=64)
    scores, right = true_scores(image, text), owned(owner, len(image))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        ranks = ranks_of(image, text, owner, coarse=[])
    finally:
        torch.set_float32_matmul_precision(before)
    assert as_tuples(ranks.t2i) == true_ranks(scores.T, right.T)


def test_torchs_threads_are_as_they_were():
    image, text, owner = unit_case(9, 20, 30)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ranks_of(image, text, owner)
        with ThreadPoolExecutor(1) as another:
            assert (torch.get_num_threads(), another.submit(torch.get_num_threads).result()) == (
                3,
                3,
            )
    finally:
        torch.set_num_threads(before)


def test_zero_vectors_tie_with_each_other():
    image, text = np.zeros((6, 5), np.float32), np.zeros((9, 5), np.float32)
    ranks = retrieval_ranks(image, text, np.arange(9) % 6)
    assert ranks.t2i.tied.tolist() == [5] * 9
    assert ranks.i2t.tied.tolist() == [7, 7, 7, 8, 8, 8]


def test_equal_vectors_tie_at_any_place():
    """In float32 a matrix product may give the last column of a tile another last digit."""
    places = [3, 17, 500, 1000]
    image, text, _ = unit_case(2, 1001, 1001, dim=301)
    text[places] = text[3]
    ranks = retrieval_ranks(image, text, np.arange(1001))
    assert np.flatnonzero(ranks.i2t.tied).tolist() == places
    assert ranks.i2t.tied[places].tolist() == [3, 3, 3, 3]
    assert not ranks.t2i.tied.any()
