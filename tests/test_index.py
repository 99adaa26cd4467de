"""Search equals brute force; foreign, half-written and damaged indexes are refused in one line.

Not for changes (test_index_update.py), large indexes (test_index_ann.py) or commands
(test_search.py).
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from indexed import MAKER, changed_encoder, clustered, write_photos

from m2encoder.embed import embed_to_folder
from m2encoder.errors import DataError
from m2encoder.index import (
    ImageIndex,
    VectorMaker,
    build_index,
    index_vectors,
    is_finished,
    read_meta,
    source_stamp,
)
from m2encoder.load import load_model
from m2encoder.shards import ShardReader


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return tiny_shards / "test"


@pytest.fixture
def photos(shards, tmp_path):
    return write_photos(tmp_path / "照片", shards)


def test_search_equals_brute_force(tiny_encoder, shards, tmp_path):
    index = build_index(tiny_encoder, shards, tmp_path / "index", batch_size=7)
    reader = ShardReader(shards)
    queries = tiny_encoder.encode_text(["一颗红色的星星", "two small trees", "🐟", "鱼" * 500])
    scores = queries @ tiny_encoder.encode_image([pair.image for pair in reader]).T
    for found, expected in zip(index.search(queries, 5), scores, strict=True):
        best = np.sort(expected)[::-1][:5]
        # Sums in another order: a few units in the last place.
        np.testing.assert_allclose([hit.score for hit in found], best, rtol=0, atol=2e-6)
        rows = [reader.keys.index(hit.name) for hit in found]
        np.testing.assert_allclose(expected[rows], best, rtol=0, atol=2e-6)


def test_vectors_of_ones_own_are_found_as_brute_force_finds_them(tmp_path):
    vectors = clustered(500)
    names = [f"{i:03d}" for i in range(500)]
    index = index_vectors(MAKER, vectors, names, tmp_path / "index")
    queries = clustered(50, seed=1)
    expected = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    for found, best in zip(index.search(queries, 10), expected, strict=True):
        assert [hit.name for hit in found] == [names[i] for i in best]


def test_equal_vectors_come_in_the_order_of_the_source(tmp_path):
    vectors = np.repeat(clustered(3), 4, axis=0)
    index = index_vectors(MAKER, vectors, [str(i) for i in range(12)], tmp_path / "index")
    assert [hit.name for hit in index.search(vectors[4:5], 4)[0]] == ["4", "5", "6", "7"]


def test_a_picture_finds_itself_first(tiny_encoder, photos, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    path = photos / "旅行" / "图 03.png"
    best = index.search(tiny_encoder.encode_image(path), 1)[0][0]
    assert best.path is not None
    assert best.path.samefile(path)
    assert best.score == pytest.approx(1, abs=1e-5)


def test_an_index_inside_its_folder_moves_with_it(tiny_encoder, photos, tmp_path):
    build_index(tiny_encoder, photos, photos / ".m2enc-index").close()
    moved = photos.rename(tmp_path / "moved")
    index = ImageIndex.open(moved / ".m2enc-index", encoder=tiny_encoder)
    hits = index.search(tiny_encoder.encode_text("星星"), 3)[0]
    assert all(hit.path is not None and hit.path.is_file() for hit in hits)


@pytest.mark.parametrize("name", ["索引 100% #1?", "a'b\"c;d&e"])
def test_the_folder_may_have_any_name(tmp_path, name):
    index_vectors(MAKER, clustered(3), ["a", "b", "c"], tmp_path / name).close()
    assert ImageIndex.open(tmp_path / name, encoder=MAKER).meta.count == 3


def test_embeddings_make_the_same_index_as_their_pictures(tiny_encoder, photos, tmp_path):
    embed_to_folder(tiny_encoder, photos, tmp_path / "vectors", on_error="skip")
    direct = build_index(tiny_encoder, photos, tmp_path / "a")
    embedded = build_index(tiny_encoder, tmp_path / "vectors", tmp_path / "b")
    query = tiny_encoder.encode_text("一颗星星")
    kept = [[(hit.name, hit.score, hit.path) for hit in i.search(query, 12)[0]]
            for i in (direct, embedded)]  # fmt: skip
    assert kept[0] == kept[1]


def test_embeddings_of_shards_and_their_captions_are_found_by_key(tiny_encoder, shards, tmp_path):
    embed_to_folder(tiny_encoder, shards, tmp_path / "vectors")
    index = build_index(tiny_encoder, tmp_path / "vectors", tmp_path / "index")
    assert index.names == ShardReader(shards).keys


def test_embeddings_of_another_model_are_refused(tiny_encoder, photos, tmp_path):
    embed_to_folder(tiny_encoder, photos, tmp_path / "vectors", on_error="skip")
    with pytest.raises(DataError, match=r"vectors were made by .*, this is other .* m2enc embed"):
        build_index(changed_encoder(tiny_encoder), tmp_path / "vectors", tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("damage", ["meta.json", "items.jsonl", "image.npy"])
def test_damaged_embeddings_are_refused(tiny_encoder, photos, tmp_path, damage):
    embed_to_folder(tiny_encoder, photos, tmp_path / "vectors", on_error="skip")
    (tmp_path / "vectors" / damage).write_bytes(b'{"array": "image", "row": 3, "name": "a"')
    with pytest.raises(DataError, match="damaged embeddings"):
        build_index(tiny_encoder, tmp_path / "vectors", tmp_path / "index")


@pytest.mark.parametrize(
    ("vectors", "names", "message"),
    [
        (clustered(3), ["a", "b"], r"\(3, 24\) and 2 names"),
        (clustered(3), ["a", "b", "a"], "'a' appears twice"),
        (clustered(2) * 2, ["a", "b"], "a: its vector has length 2"),
        (clustered(2) * np.nan, ["猫", "b"], "猫: its vector has length nan"),
        (clustered(1), ["\udcff"], "not valid Unicode"),
        (np.zeros((0, 24), np.float32), [], "none of 0 pictures"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path, vectors, names, message):
    with pytest.raises(DataError, match=message) as caught:
        index_vectors(MAKER, vectors, names, tmp_path / "index")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "index").exists()


def test_unreadable_pictures_are_named_also_when_opened_later(tiny_encoder, photos, tmp_path):
    built = build_index(tiny_encoder, photos, tmp_path / "index")
    opened = ImageIndex.open(tmp_path / "index", encoder=tiny_encoder)
    assert built.meta.count == 12
    assert [bad.name for bad in opened.skipped] == ["broken.jpg"]
    assert "Pillow" in opened.skipped[0].reason


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8 exist on Linux only")
def test_a_file_whose_name_is_no_text_is_left_out_by_name(tiny_encoder, photos, tmp_path):
    shutil.copy(photos / "图 01.png", os.fsdecode(os.fsencode(photos) + b"/gbk-\xc3\xa8\xff.png"))
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    assert index.meta.count == 12
    reasons = {bad.name: bad.reason for bad in index.skipped}
    assert any("not UTF-8" in reason for reason in reasons.values())


def test_the_first_unreadable_picture_can_stop_it(tiny_encoder, photos, tmp_path):
    with pytest.raises(DataError, match=r"^broken\.jpg"):
        build_index(tiny_encoder, photos, tmp_path / "index", on_error="raise")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("files", [{}, {"a.jpg": b"", "b.png": b"x"}])
def test_a_folder_without_readable_pictures_is_refused(tiny_encoder, tmp_path, files):
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match="holds no pictures" if not files else "none of 2 pictures"):
        build_index(tiny_encoder, tmp_path / "in", tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_folder_with_other_files_is_not_written_into(tiny_encoder, photos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(DataError, match="holds other files and no index"):
        build_index(tiny_encoder, photos, tmp_path / "mine")
    with pytest.raises(DataError, match="is a file"):
        build_index(tiny_encoder, photos, tmp_path / "mine/notes.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_more_hits_than_pictures_gives_all_best_first(tiny_encoder, photos, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    hits = index.search(tiny_encoder.encode_text("a star"), 99)[0]
    assert len({hit.name for hit in hits}) == 12
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_an_index_of_another_model_is_refused(tiny_encoder, photos, tmp_path):
    build_index(tiny_encoder, photos, tmp_path / "index").close()
    with pytest.raises(DataError, match=r"made by .*, you opened it with other .*m2enc index"):
        ImageIndex.open(tmp_path / "index", encoder=changed_encoder(tiny_encoder))


def test_an_index_of_another_preprocessing_is_refused(
    tiny_encoder, tiny_model_folder, photos, tmp_path
):
    build_index(tiny_encoder, photos, tmp_path / "index").close()
    encoder = load_model(tiny_model_folder, device="cpu")
    encoder.text_normalization = "lower-quotes"
    with pytest.raises(DataError, match=r"made by .*, you opened it with"):
        ImageIndex.open(tmp_path / "index", encoder=encoder)


# ── damage ──────────────────────────────────────────────────────────────────────────────────────


def _vectors(folder):
    return next(folder.glob("vectors-*.f32"))


def truncate_vectors(folder):
    _vectors(folder).write_bytes(_vectors(folder).read_bytes()[:-40])


def drop_an_item(folder):
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("DELETE FROM items WHERE row = 3")
    db.close()


def overwrite_database(folder):
    (folder / "index.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 5_000)


def garble_state(folder):
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("UPDATE state SET value = '{\"dim\": 3}' WHERE key = 'meta'")
    db.close()


DAMAGES = [
    truncate_vectors,
    drop_an_item,
    overwrite_database,
    garble_state,
    lambda folder: _vectors(folder).unlink(),
    lambda folder: (folder / "index.sqlite").write_bytes(b""),
    lambda folder: (folder / "index.sqlite").write_text("猫" * 999, encoding="utf-8"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_says_to_build_it_again(tiny_encoder, photos, tmp_path, damage):
    folder = tmp_path / "index"
    build_index(tiny_encoder, photos, folder).close()
    damage(folder)
    with pytest.raises(DataError, match=r"half-written .* m2enc index MODEL") as caught:
        ImageIndex.open(folder, encoder=tiny_encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_building_again_mends_a_damaged_index(tiny_encoder, photos, tmp_path, damage):
    folder = tmp_path / "index"
    build_index(tiny_encoder, photos, folder).close()
    damage(folder)
    index = build_index(tiny_encoder, photos, folder)
    index.check()
    assert index.meta.count == 12
    assert len(list(folder.glob("vectors-*"))) == 1


def test_a_missing_or_foreign_index_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no index\.sqlite, expected an index"):
        read_meta(tmp_path)
    assert not is_finished(tmp_path)


def test_an_index_of_a_newer_format_is_refused(tmp_path):
    index_vectors(MAKER, clustered(3), ["a", "b", "c"], tmp_path / "index").close()
    with sqlite3.connect(tmp_path / "index" / "index.sqlite") as db:
        db.execute("UPDATE state SET value = '9' WHERE key = 'format'")
    db.close()
    with pytest.raises(DataError, match="index format 9, this version reads 2; build it again"):
        read_meta(tmp_path / "index")


def test_an_index_of_the_first_format_is_refused_and_replaced(tiny_encoder, photos, tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "index_meta.json").write_text('{"format": 1}')
    (folder / "index.faiss").write_bytes(b"old")
    (folder / "items.jsonl").write_text("")
    with pytest.raises(DataError, match="index format 1, this version reads 2; build it again"):
        ImageIndex.open(folder, encoder=tiny_encoder)
    build_index(tiny_encoder, photos, folder)
    assert not {"index_meta.json", "index.faiss", "items.jsonl"} & set(os.listdir(folder))


def test_check_finds_vectors_that_are_none(tmp_path):
    folder = tmp_path / "index"
    index_vectors(MAKER, clustered(9), list("abcdefghi"), folder).close()
    path = _vectors(folder)
    raw = bytearray(path.read_bytes())
    raw[96:100] = np.float32(9).tobytes()
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="no unit vectors"):
        ImageIndex.open(folder, encoder=MAKER).check()


# ── queries ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "index"
    return index_vectors(MAKER, clustered(40), [f"猫 {i}" for i in range(40)], folder)


@pytest.mark.parametrize("shape", [(1, 3), (24,)])
def test_queries_of_another_shape_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"expected \(Q, 24"):
        small.search(np.zeros(shape, np.float32), 1)


def test_nan_queries_and_k_below_one_are_refused(small):
    query = np.zeros((1, 24), np.float32)
    with pytest.raises(ValueError, match="k must be at least 1"):
        small.search(query, 0)
    with pytest.raises(ValueError, match="NaN"):
        small.search(query * np.nan, 1)


def test_no_queries_give_no_results(small):
    assert small.search(np.zeros((0, 24), np.float32), 3) == []


def test_the_stamp_changes_with_any_picture_and_only_then(photos):
    before = source_stamp(photos)
    (photos / "notes.txt").write_text("not a picture")
    assert source_stamp(photos) == before
    (photos / "图 01.png").rename(photos / "图 99.png")
    assert source_stamp(photos) != before


MANY_QUERIES = """
import os, resource, sys
from pathlib import Path
import numpy as np
from m2encoder.index import ImageIndex, VectorMaker
index = ImageIndex.open(Path(sys.argv[1]), encoder=VectorMaker("made", "f" * 64, 24))
query = np.eye(24, dtype=np.float32)
def use():
    for i in range(2_500):
        index.search(query[i % 24 : i % 24 + 1], 10, where=f"id>{i % 30}" if i % 5 == 0 else ())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))
use()
(before, files), (after, files_after) = use(), use()
use()
(last, files_last) = use()
print(last - before, files_last - files)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_do_not_grow_over_ten_thousand_queries(small):
    command = [sys.executable, "-c", MANY_QUERIES, str(small.folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, files = map(int, ran.stdout.split())
    assert grown < 1_000_000  # bytes; an answer of ten hits takes about 5,000
    assert files == 0


def test_a_maker_is_all_that_opening_needs(small):
    assert ImageIndex.open(small.folder, encoder=VectorMaker("x", "f" * 64, 24)).names[0] == "猫 0"
    assert json.dumps(small.meta.to_json())
