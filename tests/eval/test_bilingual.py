"""Parallel captions: consistency, text retrieval, gap and offsets, by hand, by loops, by property.

Not for two lists of scores alone (test_agreement.py), nor the command (test_bilingual_cli.py).
"""

import json
from math import comb

import numpy as np
import pytest

from m2encoder.embed import PairEmbeddings, TextEmbeddings, embed_pairs
from m2encoder.errors import DataError
from m2encoder.eval.bilingual import (
    ParallelCaptions,
    consistency,
    cosine_offsets,
    cross_lingual_gap,
    measure_bilingual,
    parallel_captions,
    text_retrieval,
)
from m2encoder.eval.result_fields import plain
from m2encoder.shards import ShardReader

DRAWS = 50


def unit(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(seed=0, *, images=30, captions=50, dim=8, noise=0.6):
    """Captions near their picture; those of the second language nearer than the first's."""
    rng = np.random.default_rng(seed)
    image = unit(rng, images, dim)
    owner = np.sort(rng.integers(0, images, captions))
    near = [
        image[owner] + share * noise * rng.standard_normal((captions, dim)) for share in (1, 0.5)
    ]
    first, second = (
        (each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32) for each in near
    )
    return ParallelCaptions(("zh", "en"), image, first, second, owner, {"zh": 0, "en": 0})


def swapped(parallel):
    return ParallelCaptions(
        ("zh", "en"), parallel.image, parallel.second, parallel.first, parallel.owner, {}
    )


def texts_of(owner, dim=2):
    vectors = np.tile(np.eye(dim, dtype=np.float32)[0], (len(owner), 1))
    return TextEmbeddings(vectors, np.asarray(owner), [f"第{i}句" for i in range(len(owner))])


# ── pairing ─────────────────────────────────────────────────────────────────────────────────────


def test_captions_are_paired_by_their_order_within_a_picture():
    first, second = texts_of([0, 0, 1, 3]), texts_of([0, 1, 1, 2, 3])
    for row, text in enumerate(first.vectors):
        text[:] = row
    for row, text in enumerate(second.vectors):
        text[:] = 10 + row
    found = parallel_captions(np.ones((4, 2), np.float32), first, second)
    assert found.owner.tolist() == [0, 1, 3]
    assert found.first[:, 0].tolist() == [0, 2, 3]
    assert found.second[:, 0].tolist() == [10, 11, 14]
    assert found.left_out == {"zh": 1, "en": 2}


def test_no_picture_with_both_languages_is_an_error():
    with pytest.raises(DataError, match="no picture has captions in both zh and en"):
        parallel_captions(np.ones((2, 2), np.float32), texts_of([0]), texts_of([1]))


def test_a_language_without_captions_is_an_error():
    pairs = PairEmbeddings(np.ones((1, 2), np.float32), {"zh": texts_of([0])}, ["a"], [{}], [])
    with pytest.raises(DataError, match="no captions in en"):
        measure_bilingual(pairs)


def test_vectors_that_are_no_numbers_are_named():
    parallel = make()
    parallel.second[3, 0] = np.nan
    with pytest.raises(DataError, match=r"zh vectors: 1 of 50 .* row 3"):
        swapped(parallel)


# ── by hand and by loops ────────────────────────────────────────────────────────────────────────


def test_worked_by_hand():
    """Two pictures, one caption each: Chinese finds both, English takes both for the first."""
    image = np.eye(2, dtype=np.float32)
    english = np.asarray([[1, 0], [1, 0]], np.float32)
    parallel = ParallelCaptions(("zh", "en"), image, image.copy(), english, np.arange(2), {})
    found = consistency(parallel, ks=[1, 2], draws=DRAWS).metrics
    assert found["overlap_at_1"].value == 0.5  # the first caption agrees, the second does not
    assert found["overlap_at_2"].value == 1
    assert found["spearman"].value == 0  # 1 and -1
    gap = cross_lingual_gap(parallel, ks=[1], draws=DRAWS).metrics
    assert (gap["t2i_r1_zh"].value, gap["t2i_r1_en"].value) == (1, 0.5)
    assert gap["t2i_r1_gap"].value == 0.5
    assert gap["i2t_r1_en"].value == 0.5  # for each picture both captions tie
    assert (gap["i2t_r1_en"].tie_low, gap["i2t_r1_en"].tie_high) == (0, 1)
    texts = text_retrieval(parallel, ks=[1], draws=DRAWS).metrics
    assert texts["zh_to_en_r1"].value == 0.5  # both ask among two equal English captions
    assert texts["en_to_zh_r1"].value == 0.5  # both find the first Chinese one
    offsets = cosine_offsets(parallel, draws=DRAWS).metrics
    assert offsets["cosine_offset"].value == 0.5
    assert offsets["cosine_parallel"].value == 0.5
    assert offsets["centroid_distance_image_zh"].value == 0
    assert offsets["centroid_distance_zh_en"].value == pytest.approx(np.hypot(0.5, 0.5))


def test_everything_equals_loops_on_one_matrix():
    parallel = make()
    sim = [text @ parallel.image.T for text in (parallel.first, parallel.second)]
    rank = [
        [sum(row > row[own]) for row, own in zip(each, parallel.owner, strict=True)] for each in sim
    ]
    found = measure_bilingual_of(parallel)
    for k in (1, 5, 10):
        shared = [
            len(set(np.argsort(-a)[:k]) & set(np.argsort(-b)[:k])) / k
            for a, b in zip(*sim, strict=True)
        ]
        assert found[f"overlap_at_{k}"].value == pytest.approx(np.mean(shared))
        recall = [np.mean(np.asarray(each) < k) for each in rank]
        assert found[f"t2i_r{k}_gap"].value == pytest.approx(recall[0] - recall[1])
        order = np.argsort(-(parallel.first @ parallel.second.T), axis=1)[:, :k]
        hit = (parallel.owner[order] == parallel.owner[:, None]).any(axis=1)
        assert found[f"zh_to_en_r{k}"].value == pytest.approx(hit.mean())


def test_text_retrieval_equals_a_loop_where_captions_tie_and_pictures_have_several():
    rng = np.random.default_rng(4)
    first, second = np.round(unit(rng, 120, 3), 1), np.round(unit(rng, 120, 3), 1)
    owner = rng.integers(0, 30, 120)  # in no order
    parallel = ParallelCaptions(("zh", "en"), unit(rng, 30, 3), first, second, owner, {})
    found = text_retrieval(parallel, ks=[1, 5], draws=DRAWS).metrics
    expected: dict[str, list[float]] = {"zh_to_en_r1": [], "zh_to_en_r5": []}
    for q in range(120):
        scores = (second.astype(np.float64) @ first[q].astype(np.float64)).astype(np.float32)
        right = owner == owner[q]
        best = scores[right].max()
        above, tied = sum(scores[~right] > best), sum(scores[~right] == best)
        same = sum(scores[right] == best)
        for k in (1, 5):
            places = max(0, k - above)
            miss = comb(tied, places) / comb(tied + same, places) if places <= tied else 0
            expected[f"zh_to_en_r{k}"].append(1 - miss)
    for name, values in expected.items():
        assert found[name].value == pytest.approx(np.mean(values))
        low, high = found[name].tie_low, found[name].tie_high
        assert low is not None
        assert high is not None
        assert low < found[name].value < high


def measure_bilingual_of(parallel, seed=0):
    metrics = {}
    for measure in (consistency, text_retrieval, cross_lingual_gap, cosine_offsets):
        metrics |= measure(parallel, seed=seed, draws=DRAWS).metrics
    return metrics


# ── properties ──────────────────────────────────────────────────────────────────────────────────


def test_equal_towers_agree_wholly_and_have_no_gap():
    parallel = make()
    twin = ParallelCaptions(
        ("zh", "en"), parallel.image, parallel.first, parallel.first, parallel.owner, {}
    )
    found = measure_bilingual_of(twin)
    for name in ("overlap_at_1", "overlap_at_5", "overlap_at_10", "spearman", "kendall"):
        assert found[name].value == pytest.approx(1), name
    for name, metric in found.items():
        if name.endswith(("_gap", "_offset")) or name == "centroid_distance_zh_en":
            assert metric.value == pytest.approx(0), name
        if name.endswith("_gap"):
            assert metric.ci95 == (0, 0)
        if "_to_" in name:
            assert metric.value == 1, name


def test_swapping_the_languages_flips_the_sign_of_the_gap():
    there, back = measure_bilingual_of(make()), measure_bilingual_of(swapped(make()))
    assert there["t2i_r1_gap"].value < 0
    for name, metric in there.items():
        if name.endswith(("_gap", "_offset")):
            assert back[name].value == pytest.approx(-metric.value), name
            assert back[name].ci95 == pytest.approx((-metric.ci95[1], -metric.ci95[0])), name
        elif name.startswith(("overlap", "spearman", "kendall", "cosine_parallel")):
            assert back[name].value == pytest.approx(metric.value), name
    assert back["zh_to_en_r5"] == there["en_to_zh_r5"]


def test_collapsed_towers_score_chance_with_bounds():
    parallel = make(captions=30)
    flat = np.tile(np.eye(8, dtype=np.float32)[0], (30, 1))
    collapsed = ParallelCaptions(
        ("zh", "en"), np.tile(flat[:1], (30, 1)), flat, flat, parallel.owner, {}
    )
    found = measure_bilingual_of(collapsed)
    for k in (1, 5, 10):
        overlap = found[f"overlap_at_{k}"]
        assert (overlap.value, overlap.tie_low, overlap.tie_high) == pytest.approx((k / 30, 0, 1))
        recall = found[f"t2i_r{k}_zh"]
        assert (recall.value, recall.tie_low, recall.tie_high) == pytest.approx((k / 30, 0, 1))
        assert (found[f"t2i_r{k}_gap"].tie_low, found[f"t2i_r{k}_gap"].tie_high) == (-1, 1)
    for name in ("spearman", "kendall"):
        assert np.isnan(found[name].value)
        assert found[name].n == 0


def test_the_interval_holds_the_value_and_the_gap_of_unlike_towers_is_clear():
    found = measure_bilingual_of(make(captions=400, images=200))
    low, high = found["t2i_r1_gap"].ci95 or (0, 0)
    assert low <= found["t2i_r1_gap"].value <= high < 0


def test_a_k_above_the_number_of_pictures_is_left_out_of_the_overlap():
    found = consistency(make(images=7), draws=DRAWS)
    assert [name for name in found.metrics if "overlap" in name] == ["overlap_at_1", "overlap_at_5"]
    assert found.details["chance"]["overlap_at_5"] == 5 / 7


def test_correlations_of_many_queries_take_a_sample_that_the_seed_draws():
    parallel = make(captions=1_300, images=6)
    found = [consistency(parallel, seed=seed, draws=2).metrics["kendall"] for seed in (0, 0, 1)]
    assert [metric.n for metric in found] == [1_000] * 3
    assert found[0] == found[1] != found[2]


def test_a_shard_folder_is_measured_in_one_go(tiny_encoder, tiny_shards):
    pairs = embed_pairs(tiny_encoder, ShardReader(tiny_shards / "test"))
    output = measure_bilingual(pairs, draws=DRAWS)
    assert output.metrics["overlap_at_1"].n == len(pairs.texts["zh"].texts)
    assert output.metrics["i2t_r1_gap"].n == len(pairs.keys)
    assert output.details["left_out"] == {"zh": 0, "en": 0}
    assert json.loads(json.dumps(plain(output.details)))
    assert all(np.isfinite(metric.value) for metric in output.metrics.values())
