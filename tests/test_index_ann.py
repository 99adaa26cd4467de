"""Large indexes: which kind is chosen, what it finds, and what it does under conditions and change.

Thresholds are lowered so that a few thousand vectors are many.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from indexed import MAKER, clustered

from m2encoder.errors import ConfigError, DataError
from m2encoder.index import (
    ImageIndex,
    IndexSettings,
    add_pictures,
    build_index,
    index_vectors,
    remove_pictures,
    update_index,
)
from m2encoder.index_choice import choose_kind, num_lists
from m2encoder.shards import ShardReader

COUNT = 3_000
NAMES = [f"{i:04d}" for i in range(COUNT)]
METAS = [{"rare": i % 500 == 0, "half": i % 2} for i in range(COUNT)]
VECTORS = clustered(COUNT)
QUERIES = clustered(64, seed=1)


def settings(**changes):
    return IndexSettings(**{"flat_limit": 100, "few_rows": 10, "slack_rows": 100, **changes})


@pytest.fixture(scope="module")
def ivf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ivf") / "index"
    return index_vectors(MAKER, VECTORS, NAMES, folder, metas=METAS, settings=settings())


@pytest.fixture(scope="module")
def hnsw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hnsw") / "index"
    chosen = settings(kind="hnsw")
    return index_vectors(MAKER, VECTORS, NAMES, folder, metas=METAS, settings=chosen)


def true_scores(queries, k, keep: Sequence[int] = range(COUNT)):
    return -np.sort(-(queries @ VECTORS[list(keep)].T), axis=1)[:, :k]


def scores_of(found):
    return np.array([[hit.score for hit in hits] for hits in found])


def recall(found, true):
    return float((scores_of(found) >= true[:, -1:] - 1e-6).mean())


@pytest.mark.parametrize(
    ("count", "chosen", "expected"),
    [
        (200_000, {}, "flat"),
        (200_001, {}, "ivf"),
        (200_000, {"memory_budget_mb": 102}, "ivf"),  # 102.4 MB of float32
        (200_000, {"memory_budget_mb": 103}, "flat"),
        (500_000, {"memory_budget_mb": 10_000}, "ivf"),
        (500_000, {"memory_budget_mb": 10_000, "flat_limit": 10**6}, "flat"),
        (10, {"kind": "ivf"}, "ivf"),
        (10**9, {"kind": "flat"}, "flat"),
        (10, {"kind": "hnsw"}, "hnsw"),
        (0, {"kind": "ivf"}, "flat"),
    ],
)
def test_the_kind_follows_size_and_memory(count, chosen, expected):
    assert choose_kind(count, 128, IndexSettings(**chosen)) == expected


@pytest.mark.parametrize(
    ("count", "lists"),
    [(1, 1), (40, 1), (80, 2), (3_000, 64), (100_000, 1024), (200_001, 2048), (10**6, 4096),
     (2 * 10**6, 16_384), (10**8, 65_536), (10**9, 131_072)],
)  # fmt: skip
def test_the_number_of_lists_follows_the_number_of_vectors(count, lists):
    assert num_lists(count) == lists


@pytest.mark.parametrize(
    "wrong", [{"recall": 0}, {"recall": 1.5}, {"flat_limit": -1}, {"memory_budget_mb": -5}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="must"):
        IndexSettings(**wrong)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_it_finds_what_it_was_asked_to_and_says_so(kind, request):
    index = request.getfixturevalue(kind)
    assert index.meta.ann.kind == kind
    assert index.meta.ann.recall_at_10["pictures"] >= 0.95
    assert index.meta.ann.queries == {"pictures": 256}
    found = index.search(QUERIES, 10)
    assert recall(found, true_scores(QUERIES, 10)) >= 0.93  # other queries than it was tuned on
    index.check()


def test_ivf_reads_some_of_its_lists_only(ivf):
    assert 1 <= ivf.meta.ann.probes < ivf.meta.ann.lists == 64


def test_more_recall_reads_more_lists(tmp_path, ivf):
    sure = settings(recall=1.0)
    index = index_vectors(MAKER, VECTORS, NAMES, tmp_path / "sure", settings=sure)
    assert index.meta.ann is not None
    assert index.meta.ann.probes > ivf.meta.ann.probes
    assert index.meta.ann.recall_at_10["pictures"] == 1


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_scores_are_exact_cosines(kind, request):
    index = request.getfixturevalue(kind)
    for hits, query in zip(index.search(QUERIES[:8], 5), QUERIES, strict=False):
        for hit in hits:
            # 8-bit codes alone would be off by about 1e-3.
            assert hit.score == pytest.approx(float(query @ VECTORS[int(hit.name)]), abs=2e-6)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("where", [["rare=true"], ["half=1", "id>2900"], ["half=0"]])
def test_conditions_leave_no_place_empty(kind, where, request):
    index = request.getfixturevalue(kind)
    keep = [i for i, meta in enumerate(METAS)
            if {"rare=true": meta["rare"], "half=0": not meta["half"]}.get(
                where[0], bool(meta["half"] and i + 1 > 2900))]  # fmt: skip
    found = index.search(QUERIES, 5, where=where)
    assert all(int(hit.name) in keep for hits in found for hit in hits)
    true = true_scores(QUERIES, 5, keep)
    assert scores_of(found).shape == true.shape
    assert recall(found, true) >= 0.95


def test_few_allowed_pictures_are_compared_exactly(tmp_path):
    few = settings(few_rows=60)
    index = index_vectors(MAKER, VECTORS, NAMES, tmp_path / "i", metas=METAS, settings=few)
    found = index.search(QUERIES, 60, where=["half=1", "id>2900"])
    keep = [i for i in range(2_900, COUNT) if i % 2]
    np.testing.assert_allclose(scores_of(found), true_scores(QUERIES, 60, keep), atol=2e-6)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_k_beyond_what_is_reached_or_there_gives_all(kind, request):
    index = request.getfixturevalue(kind)
    found = index.search(QUERIES[:2], COUNT + 7)
    np.testing.assert_allclose(scores_of(found), true_scores(QUERIES[:2], COUNT), atol=2e-6)
    assert len(index.search(QUERIES[:1], 99, where="rare=true")[0]) == 6
    assert index.search(QUERIES[:1], 99, where="rare=none") == [[]]


def test_hnsw_can_only_be_read(hnsw, tiny_encoder, tiny_shards, tmp_path):
    with pytest.raises(DataError, match=r"HNSW index, which can only be read .* m2enc index MODEL"):
        remove_pictures(hnsw.folder, ["0001"])
    (tmp_path / "in").mkdir()
    for i, pair in enumerate(ShardReader(tiny_shards / "test")):
        (tmp_path / "in" / f"{i}.png").write_bytes(pair.image)
    chosen = settings(kind="hnsw")
    build_index(tiny_encoder, tmp_path / "in", tmp_path / "index", settings=chosen).close()
    for change in (
        lambda: update_index(tiny_encoder, tmp_path / "index"),
        lambda: add_pictures(tiny_encoder, tmp_path / "index", [tmp_path / "in/1.png"]),
    ):
        with pytest.raises(DataError, match="HNSW index, which can only be read"):
            change()


# ── changes ─────────────────────────────────────────────────────────────────────────────────────


def test_removed_pictures_are_not_found_before_and_after_the_lists_are_written_anew(tmp_path):
    folder = tmp_path / "index"
    index = index_vectors(MAKER, VECTORS, NAMES, folder, settings=settings())
    first = index.meta.ann
    gone: set[int] = set()
    for numbers in (range(50), range(50, 80), range(80, 2_000)):
        remove_pictures(folder, [NAMES[i] for i in numbers])
        gone |= set(numbers)
        keep = [i for i in range(COUNT) if i not in gone]
        found = index.search(VECTORS[:64], 10)
        assert not any(int(hit.name) in gone for hits in found for hit in hits)
        assert recall(found, true_scores(VECTORS[:64], 10, keep)) >= 0.93
        index.check()
        assert index.counts()["items"] == len(keep) == index.meta.count
        if len(gone) <= 100:
            assert index.meta.ann == first
    assert index.meta.ann is not None
    assert index.meta.ann.count == COUNT - len(gone) == index.meta.rows
    assert index.counts()["dead"] == 0
    assert {path.suffix for path in folder.glob("ann-*")} == {".faiss"}
    assert len(list(folder.glob("ann-*"))) == len(list(folder.glob("vectors-*"))) == 1


def test_vectors_that_are_gone_leave_the_lists_when_these_are_written_anew(
    tiny_encoder, tiny_shards, photos, tmp_path
):
    train = ShardReader(tiny_shards / "train")
    folder, chosen = tmp_path / "index", settings(flat_limit=30, slack_rows=5)
    index = build_index(tiny_encoder, photos, folder, settings=chosen)
    for i in range(4):
        (photos / f"{i:03d}.png").unlink()
        (photos / f"new {i}.png").write_bytes(train[i].image)
    update_index(tiny_encoder, folder)  # four too many and four too few, but few dead rows
    index.check()
    assert index.meta.ann is not None
    assert (index.counts()["dead"], index.meta.rows, index.meta.ann.rows) == (4, 44, 44)
    assert index.meta.ann.count == index.meta.count == 40


@pytest.fixture
def photos(tiny_shards, tmp_path):
    """Forty pictures with a hundred copies of names, embedded once."""
    (tmp_path / "in").mkdir()
    for i, pair in enumerate(ShardReader(tiny_shards / "test")):
        (tmp_path / "in" / f"{i:03d}.png").write_bytes(pair.image)
    return tmp_path / "in"


def test_added_pictures_are_found_before_and_after_the_lists_are_written_anew(
    tiny_encoder, tiny_shards, photos, tmp_path
):
    train = ShardReader(tiny_shards / "train")
    folder, chosen = tmp_path / "index", settings(flat_limit=30, slack_rows=5)
    index = build_index(tiny_encoder, photos, folder, settings=chosen)
    first = index.meta.ann
    for start, stop in ((0, 4), (4, 20), (20, 80)):
        for i in range(start, stop):
            (photos / f"new {i:02d}.png").write_bytes(train[i].image)
        update_index(tiny_encoder, folder)
        own = tiny_encoder.encode_image([train[i].image for i in range(start, stop)])
        found = index.search(own, 3)
        for i, hits in zip(range(start, stop), found, strict=True):
            assert f"new {i:02d}.png" in [hit.name for hit in hits if hit.score > 1 - 1e-4]
        index.check()
        if stop == 4:
            assert index.meta.ann == first  # four wait outside the lists
            assert index.meta.rows == 44
    ann = index.meta.ann
    assert ann is not None
    assert first is not None
    assert (ann.count, ann.rows, ann.trained_on) == (120, 120, 120)  # twice as many: trained anew
    assert first.trained_on == 40


def test_words_of_the_model_are_measured_too(tiny_encoder, photos, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "i", settings=settings(flat_limit=30))
    assert index.meta.ann is not None
    assert index.meta.ann.queries == {"pictures": 40, "words": 32}
    assert index.meta.ann.recall_at_10["words"] >= 0.95


def test_a_removal_without_the_model_reads_no_fewer_lists(tiny_encoder, photos, tmp_path):
    chosen = settings(flat_limit=3, slack_rows=0, recall=1.0)
    index = build_index(tiny_encoder, photos, tmp_path / "i", settings=chosen)
    before = index.meta.ann
    removed = ImageIndex.open(tmp_path / "i", encoder=tiny_encoder).names[:3]
    remove_pictures(tmp_path / "i", removed)
    index.counts()  # sees the change
    assert before is not None
    assert index.meta.ann is not None
    assert index.meta.ann != before
    assert index.meta.ann.probes >= before.probes


def test_an_index_that_shrinks_is_searched_exactly_again(tmp_path):
    folder = tmp_path / "index"
    chosen = settings(slack_rows=0)
    index = index_vectors(MAKER, VECTORS[:200], NAMES[:200], folder, settings=chosen)
    assert index.meta.ann is not None
    remove_pictures(folder, NAMES[:120])
    found = index.search(QUERIES, 5)
    np.testing.assert_allclose(
        scores_of(found), true_scores(QUERIES, 5, range(120, 200)), atol=2e-6
    )
    assert index.meta.ann is None
    assert list(folder.glob("ann-*")) == []


def test_a_damaged_faiss_file_is_refused_and_made_again_by_the_next_change(tmp_path):
    folder = tmp_path / "index"
    index_vectors(MAKER, VECTORS, NAMES, folder, settings=settings()).close()
    path = next(folder.glob("ann-*"))
    whole = path.read_bytes()
    for content in (whole[:-9], b"", b"\0" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"half-written or damaged index .* m2enc index"):
            ImageIndex.open(folder, encoder=MAKER)
    path.unlink()
    with pytest.raises(DataError, match="half-written or damaged index"):
        ImageIndex.open(folder, encoder=MAKER)
    remove_pictures(folder, NAMES[:200])  # enough to write the lists anew
    with ImageIndex.open(folder, encoder=MAKER) as index:
        index.check()
        assert recall(index.search(VECTORS[500:564], 10), true_scores(
            VECTORS[500:564], 10, range(200, COUNT))) >= 0.93  # fmt: skip
