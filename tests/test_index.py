"""FAISS search equals brute force; foreign and damaged indexes are refused; `m2enc search`.

Not for embedding (test_embed.py).
"""

import json
import shutil

import faiss
import numpy as np
import pytest

from m2encoder.cli.search import OWN_INDEX, is_picture, open_for_search, search
from m2encoder.encoder import Encoder
from m2encoder.errors import ConfigError, DataError
from m2encoder.index import ImageIndex, IndexMeta, build_index, source_stamp
from m2encoder.shards import ShardReader


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return tiny_shards / "test"


@pytest.fixture
def photos(shards, tmp_path):
    """A folder of twelve pictures, some in a folder below, and one unreadable file."""
    folder = tmp_path / "照片"
    (folder / "旅行").mkdir(parents=True)
    reader = ShardReader(shards)
    for i in range(12):
        below = folder / "旅行" if i % 3 == 0 else folder
        (below / f"图 {i:02d}.png").write_bytes(reader[i].image)
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def other_encoder(tiny_encoder):
    """The same model with one weight changed."""
    import copy

    model = copy.deepcopy(tiny_encoder.model)
    model.logit_scale.data += 1
    return Encoder(model, tiny_encoder.image_processor, tiny_encoder.tokenizer, name="other")


@pytest.fixture
def model_folder(tiny_model_folder):
    return str(tiny_model_folder)


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


def test_a_picture_finds_itself_first(tiny_encoder, photos, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    path = photos / "旅行" / "图 03.png"
    best = index.search(tiny_encoder.encode_image(path), 1)[0][0]
    assert best.path is not None
    assert best.path.samefile(path)
    assert best.score == pytest.approx(1, abs=1e-5)


def test_an_index_inside_its_folder_moves_with_it(tiny_encoder, photos, tmp_path):
    build_index(tiny_encoder, photos, photos / OWN_INDEX)
    moved = photos.rename(tmp_path / "moved")
    index = ImageIndex.open(moved / OWN_INDEX, encoder=tiny_encoder)
    hits = index.search(tiny_encoder.encode_text("星星"), 3)[0]
    assert all(hit.path is not None and hit.path.is_file() for hit in hits)


def test_unreadable_pictures_are_named_also_when_opened_later(tiny_encoder, photos, tmp_path):
    built = build_index(tiny_encoder, photos, tmp_path / "index")
    opened = ImageIndex.open(tmp_path / "index", encoder=tiny_encoder)
    assert built.meta.count == 12
    assert [bad.name for bad in opened.skipped] == ["broken.jpg"]
    assert "Pillow" in opened.skipped[0].reason


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


def test_more_hits_than_pictures_gives_all_best_first(tiny_encoder, photos, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    hits = index.search(tiny_encoder.encode_text("a star"), 99)[0]
    assert len({hit.name for hit in hits}) == 12
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_an_index_of_another_model_is_refused(tiny_encoder, other_encoder, photos, tmp_path):
    build_index(tiny_encoder, photos, tmp_path / "index")
    with pytest.raises(DataError, match=r"made by .*, you opened it with other .*m2enc index"):
        ImageIndex.open(tmp_path / "index", encoder=other_encoder)


def truncate_vectors(folder):
    path = folder / "index.faiss"
    path.write_bytes(path.read_bytes()[:-40])


def empty_vectors(folder):
    (folder / "index.faiss").write_bytes(b"")


def drop_an_item(folder):
    path = folder / "items.jsonl"
    path.write_text("\n".join(path.read_text("utf-8").splitlines()[1:]), encoding="utf-8")


def replace_vectors(folder):
    small = faiss.IndexFlatIP(3)
    (folder / "index.faiss").write_bytes(faiss.serialize_index(small).tobytes())


@pytest.mark.parametrize(
    "damage",
    [
        truncate_vectors,
        empty_vectors,
        drop_an_item,
        replace_vectors,
        lambda folder: (folder / "items.jsonl").unlink(),
        lambda folder: (folder / "index.faiss").unlink(),
        lambda folder: (folder / "items.jsonl").write_text('{"na'),
    ],
)
def test_a_damaged_index_says_to_build_it_again(tiny_encoder, photos, tmp_path, damage):
    folder = tmp_path / "index"
    build_index(tiny_encoder, photos, folder)
    damage(folder)
    with pytest.raises(DataError, match=r"half-written or damaged .* m2enc index MODEL") as caught:
        ImageIndex.open(folder, encoder=tiny_encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected an index"),
        ("{", "damaged"),
        ("{}", "damaged"),
        ('{"format": 9}', "reads 1"),
    ],
)
def test_a_missing_damaged_or_foreign_meta_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "index_meta.json").write_text(content)
    with pytest.raises(DataError, match=message):
        IndexMeta.load(tmp_path)


@pytest.mark.parametrize("shape", [(1, 3), (16,)])
def test_queries_of_another_shape_are_refused(tiny_encoder, photos, tmp_path, shape):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    with pytest.raises(ValueError, match=r"expected \(Q, "):
        index.search(np.zeros(shape, np.float32), 1)


def test_nan_queries_and_k_below_one_are_refused(tiny_encoder, photos, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    query = np.zeros((1, tiny_encoder.dim), np.float32)
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(query, 0)
    with pytest.raises(ValueError, match="NaN"):
        index.search(query * np.nan, 1)


def test_the_stamp_changes_with_any_picture_and_only_then(photos):
    before = source_stamp(photos)
    (photos / "notes.txt").write_text("not a picture")
    assert source_stamp(photos) == before
    (photos / "图 01.png").rename(photos / "图 99.png")
    assert source_stamp(photos) != before


# --- the command ---------------------------------------------------------------------------------


def test_a_first_search_needs_a_model_and_later_ones_remember_it(photos, model_folder, capsys):
    with pytest.raises(ConfigError, match="--model FOLDER"):
        search(photos, "一颗星星")
    assert search(photos, "一颗星星", model=model_folder, k=3) == 4
    first = capsys.readouterr()
    assert "broken.jpg" in first.err
    assert search(photos, "一颗星星", k=3) == 0
    assert capsys.readouterr().out == first.out
    assert len(first.out.splitlines()) == 3


def test_json_holds_rank_score_and_path(photos, model_folder, capsys):
    search(photos, str(photos / "图 01.png"), model=model_folder, k=2, json=True)
    found = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in found["hits"]] == [1, 2]
    assert found["hits"][0]["path"] == str(photos / "图 01.png")


def test_the_index_is_made_again_when_a_picture_comes(photos, model_folder):
    open_for_search(photos, model_folder)
    assert open_for_search(photos, None)[2] is False
    shutil.copy(photos / "图 01.png", photos / "new.png")
    index, _, is_new = open_for_search(photos, None)
    assert is_new
    assert "new.png" in index.names


def test_the_index_is_made_again_for_another_model(photos, model_folder, other_encoder, tmp_path):
    from m2encoder.model_folder import save_model_folder

    save_model_folder(other_encoder, tmp_path / "other")
    open_for_search(photos, model_folder)
    index, encoder, is_new = open_for_search(photos, str(tmp_path / "other"))
    assert is_new
    assert index.meta.model_fingerprint == encoder.fingerprint == other_encoder.fingerprint


def test_an_index_folder_is_searched_with_the_model_that_made_it(
    tiny_encoder, shards, tmp_path, capsys
):
    build_index(tiny_encoder, shards, tmp_path / "index")
    assert search(tmp_path / "index", "two trees", k=2) == 0
    keys = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert set(keys) <= set(ShardReader(shards).keys)


def test_a_model_that_is_gone_is_named(photos, tiny_encoder):
    build_index(tiny_encoder, photos, photos / OWN_INDEX)
    path = photos / OWN_INDEX / "index_meta.json"
    meta = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(meta | {"model_path": "/gone/model"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="/gone/model, which is gone"):
        open_for_search(photos, None)


def test_words_of_any_length_are_no_picture():
    assert not is_picture("雪山日落 🏔️")
    assert not is_picture("word " * 20_000)
    assert not is_picture("nul \0 inside")


@pytest.mark.parametrize(
    ("query", "message"), [("", "empty"), ("  ", "empty"), ("猫.JPG", "no such")]
)
def test_an_empty_query_or_missing_picture_is_refused(query, message):
    with pytest.raises(DataError, match=message):
        is_picture(query)


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a folder of pictures or an index"):
        search(tmp_path / "nothing", "猫")
