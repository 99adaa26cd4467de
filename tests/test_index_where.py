"""Conditions on metadata select what they say, whatever is in it, and reach SQL as values only.

Not for how a filtered search finds its hits (test_index_ann.py).
"""

import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed import MAKER, clustered
from PIL import Image

from m2encoder.errors import ConfigError
from m2encoder.index import build_index, index_vectors
from m2encoder.index_where import compile_where
from m2encoder.shards import ShardReader

METAS = {
    "旅行/雪山.jpg": {"colour": "白", "count": 3, "tags": ["snow", "山"], "ok": True},
    "旅行/日落.jpg": {"colour": "red", "count": "7", "tags": [], "place": {"city": "大理"}},
    "home/Cat 1.png": {"colour": "Red", "count": 10, "language": ["zh", "en"], "ok": False},
    "home/猫🐱.png": {"colour": "ＲＥＤ", "count": "many", "language": ["zh"], "size": 5},
    "% _'\".png": {"colour": None, "note": 'it\'s 100% "quoted"; DROP TABLE items'},
}
NAMES = list(METAS)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("where") / "index"
    vectors = clustered(len(NAMES))
    return index_vectors(MAKER, vectors, NAMES, folder, metas=list(METAS.values()))


def found(index, *where):
    hits = index.search(np.eye(24, dtype=np.float32)[:1], 99, where=list(where))[0]
    return sorted(NAMES.index(hit.name) for hit in hits)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["name GLOB 旅行/*"], [0, 1]),
        (["name glob 'home/Cat ?.png'"], [2]),
        (["name LIKE HOME/%"], [2, 3]),
        (["name=旅行/雪山.jpg"], [0]),
        (["name != '旅行/雪山.jpg'"], [1, 2, 3, 4]),
        (['name = "% _\'".png"'], [4]),
        (["colour=red"], [1]),
        (["colour LIKE red"], [1, 2]),
        (["colour=ＲＥＤ"], [3]),
        (["colour=白"], [0]),
        (["colour!=red"], [0, 2, 3, 4]),
        (["count>=7"], [1, 2]),
        (["count = 7"], [1]),
        (["count == 7.0"], [1]),
        (["count<7"], [0]),
        (["count='7'"], [1]),
        (["count=many"], [3]),
        (["count>-1e3"], [0, 1, 2]),
        (["tags=山"], [0]),
        (["tags!=山"], [1, 2, 3, 4]),
        (["language=zh", "language=en"], [2]),
        (["language=zh", "language!=en"], [3]),
        (["ok=true"], [0]),
        (["ok=false"], [2]),
        (["ok!=true"], [1, 2, 3, 4]),
        (["place.city=大理"], [1]),
        (["place.city GLOB *理"], [1]),
        (["meta.size=5"], [3]),
        (["note LIKE %DROP TABLE%"], [4]),
        (["note = 'it's 100% \"quoted\"; DROP TABLE items'"], [4]),
        (["none=1"], []),
        (["id>=2", "id<4"], [1, 2]),
        (["size=5"], []),
        ([], [0, 1, 2, 3, 4]),
    ],
)
def test_conditions_select(index, where, expected):
    assert found(index, *where) == expected


@pytest.mark.parametrize(
    "condition",
    [
        "", "name", "= 3", "name =", "3 = 3", "name ~ x", "name; DROP TABLE items", "a b = 3",
        "size=big", "size LIKE 5%", "id='3'", "date>yesterday", "date=2024-1-1", "date=20245",
        "name=" + "猫" * 10_001, "name=\udcff", "'name'=x", "name IN (1)",
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused_in_one_line(condition):
    with pytest.raises(ConfigError, match="expected") as caught:
        compile_where(condition)
    assert "\n" not in str(caught.value)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_any_value_is_a_value_and_never_sql(index, text):
    """A quoted value is compared as it is, whatever characters it holds."""
    assert found(index, f"colour = '{text}'") == [
        i for i, meta in enumerate(METAS.values()) if meta.get("colour") == text
    ]
    index.check()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("date>=2024", ["b.jpg", "c.png"]),
        ("date>2023", ["b.jpg", "c.png"]),
        ("date=2024-05", ["b.jpg"]),
        ("date<=2024-05-01", ["a.jpg", "b.jpg"]),
        ("date='2023-12-31T23:59:59'", ["a.jpg"]),
        ("date LIKE %-05-%", ["b.jpg"]),
        ("date!=2024", ["a.jpg"]),
    ],
)
def test_pictures_are_selected_by_when_they_were_taken_or_else_written(
    tiny_encoder, tmp_path, where, expected
):
    (tmp_path / "in").mkdir()
    for name, taken in (("a.jpg", "2023:12:31 23:59:59"), ("b.jpg", "2024:05:01 08:00:00")):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = taken
        Image.new("RGB", (9, 9), "red").save(tmp_path / "in" / name, exif=exif)
    Image.new("RGB", (9, 9)).save(tmp_path / "in/c.png")
    moment = time.mktime((2024, 6, 30, 12, 0, 0, 0, 0, -1))
    os.utime(tmp_path / "in/c.png", (moment, moment))
    with build_index(tiny_encoder, tmp_path / "in", tmp_path / "index") as index:
        hits = index.search(tiny_encoder.encode_text("红"), 9, where=where)[0]
        assert sorted(hit.name for hit in hits) == expected
        assert index.search(tiny_encoder.encode_text("红"), 9, where="size>1000000") == [[]]


def test_pairs_are_selected_by_the_language_of_their_captions_and_their_fields(
    tiny_encoder, tiny_shards, tmp_path
):
    reader = ShardReader(tiny_shards / "test")
    colour = next(pair.meta["colour"] for pair in reader if "colour" in pair.meta)
    with build_index(tiny_encoder, tiny_shards / "test", tmp_path / "index") as index:
        query = tiny_encoder.encode_text("一颗星星")
        assert len(index.search(query, 99, where="language=zh")[0]) == len(reader)
        assert index.search(query, 99, where="language=fr") == [[]]
        hits = index.search(query, 99, where=f"colour={colour}")[0]
    expected = {pair.key for pair in reader if pair.meta.get("colour") == colour}
    assert {hit.name for hit in hits} == expected
    assert hits[0].meta["colour"] == colour
