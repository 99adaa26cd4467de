"""Stored vectors: found again, never mixed, whole after a kill at any moment, damage noticed.

Not for how vectors are made (test_embed_lists.py).
"""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from stored_vectors import KEY, parts, same
from tiny_pictures import CountedReads, listed

from m2encoder.embed import embed_folder, embed_pairs, embed_pictures, embed_texts
from m2encoder.errors import DataError
from m2encoder.load import load_model
from m2encoder.shards import ShardReader
from m2encoder.vector_store import VectorStore

TEXTS = ["猫在屋顶上", "貓在屋頂上", "ＡＢＣ，全角！", "dog 🐕", "很长 " * 5000, "a cat"]


@pytest.fixture
def store(tmp_path):
    return VectorStore(tmp_path / "vectors")


@pytest.fixture
def counted(tmp_path):
    """23 pictures, two of them bad, that count what is read of them."""
    return CountedReads(listed(23, bad={3, 11}), tmp_path / "reads")


# --- through the public door --------------------------------------------------------------------


def test_pictures_are_read_once_bad_ones_too(tiny_encoder, store, counted):
    plain = embed_pictures(tiny_encoder, counted, on_error="skip")
    counted.positions()
    first = embed_pictures(tiny_encoder, counted, on_error="skip", store=store)
    assert sorted(counted.positions()) == list(range(23))
    again = embed_pictures(tiny_encoder, counted, on_error="skip", store=store)
    assert counted.positions() == []
    same(first, plain)
    same(again, plain)
    assert [path.name for path in parts(store)] == ["0000000000-0000000023.part"]


def test_a_stored_bad_picture_raises_where_an_unstored_one_would(tiny_encoder, store, counted):
    embed_pictures(tiny_encoder, counted, on_error="skip", store=store)
    counted.positions()
    with pytest.raises(DataError, match=r"^图3\.png: not a picture that Pillow can read"):
        embed_pictures(tiny_encoder, counted, store=store)
    assert counted.positions() == []


def test_what_was_computed_before_an_error_is_kept(tiny_encoder, store, counted):
    with pytest.raises(DataError, match=r"^图3\.png"):
        embed_pictures(tiny_encoder, counted, batch_size=1, store=store)
    counted.positions()
    found = embed_pictures(tiny_encoder, counted, batch_size=1, on_error="skip", store=store)
    assert sorted(counted.positions()) == list(range(3, 23))
    same(found, embed_pictures(tiny_encoder, counted, batch_size=1, on_error="skip"))


def test_texts_are_found_again_with_their_count_of_truncated_ones(tiny_encoder, store):
    plain = embed_texts(tiny_encoder, TEXTS)
    embed_texts(tiny_encoder, TEXTS, store=store)
    (path,) = parts(store)
    written = path.stat().st_mtime_ns
    again = embed_texts(tiny_encoder, TEXTS, store=store)
    assert path.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again.vectors, plain.vectors)
    assert again.truncated == plain.truncated == 1


@pytest.mark.parametrize("texts", [TEXTS[::-1], TEXTS[:-1], [*TEXTS[:-1], "a cat "], []])
def test_other_texts_are_other_data(tiny_encoder, store, texts):
    embed_texts(tiny_encoder, TEXTS, store=store)
    found = embed_texts(tiny_encoder, texts, store=store)
    np.testing.assert_array_equal(found.vectors, embed_texts(tiny_encoder, texts).vectors)
    assert len(parts(store)) == 1 + bool(texts)


def test_pairs_come_from_the_store_with_their_captions(tiny_encoder, tiny_shards, store):
    reader = ShardReader(tiny_shards / "test")
    plain = embed_pairs(tiny_encoder, reader)
    for _ in range(2):
        found = embed_pairs(tiny_encoder, reader, store=store)
        np.testing.assert_array_equal(found.image, plain.image)
        assert (found.keys, found.metas) == (plain.keys, plain.metas)
        for language, texts in plain.texts.items():
            assert found.texts[language].texts == texts.texts
            np.testing.assert_array_equal(found.texts[language].vectors, texts.vectors)
    assert len(parts(store)) == 3  # pictures, zh, en


def test_another_model_gets_vectors_of_its_own(tiny_encoder, tiny_model_folder, store):
    other = load_model(tiny_model_folder, device="cpu")
    other.model.image_projection.weight.data[0] *= 3
    mine = embed_pictures(tiny_encoder, listed(5), store=store)
    theirs = embed_pictures(other, listed(5), store=store)
    assert np.abs(mine.vectors - theirs.vectors).max() > 1e-3
    same(theirs, embed_pictures(other, listed(5)))
    same(embed_pictures(tiny_encoder, listed(5), store=store), mine)
    assert len(store.entries()) == 2


def test_upright_and_precision_are_kept_apart(tiny_encoder, store):
    embed_pictures(tiny_encoder, listed(4), store=store)
    embed_pictures(tiny_encoder, listed(4), store=store, upright=True)
    embed_pictures(tiny_encoder, listed(4), store=store, precision="bfloat16")
    assert len(store.entries()) == 3


def test_a_changed_file_is_encoded_anew(tiny_encoder, store, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pictures = listed(3)
    for name, content in zip(pictures.names, pictures.contents, strict=True):
        (folder / name).write_bytes(content)
    before = embed_folder(tiny_encoder, folder, store=store)
    (folder / pictures.names[1]).write_bytes(listed(1, seed=5).contents[0])
    after = embed_folder(tiny_encoder, folder, store=store)
    changed = np.abs(after.vectors - before.vectors).max(axis=1) > 1e-4
    assert changed.tolist() == [False, True, False]
    same(after, embed_folder(tiny_encoder, folder))


def test_another_batch_size_uses_what_is_there(tiny_encoder, store, counted):
    first = embed_pictures(tiny_encoder, counted, on_error="skip", batch_size=4, store=store)
    counted.positions()
    same(embed_pictures(tiny_encoder, counted, on_error="skip", batch_size=7, store=store), first)
    assert counted.positions() == []


def test_keys_that_differ_in_anything_have_other_folders():
    others = [
        replace(KEY, kind="texts"),
        replace(KEY, model="other"),
        replace(KEY, preprocessing="[224]"),
        replace(KEY, precision="bfloat16"),
        replace(KEY, content="其他"),
        replace(KEY, count=11),
        replace(KEY, dim=5),
    ]
    assert len({key.digest for key in [KEY, *others]}) == 8


# --- the folder ---------------------------------------------------------------------------------


def test_a_store_makes_nothing_before_it_has_something_to_keep(store):
    assert store.entries() == []
    assert store.size_bytes() == 0
    assert store.prune(max_bytes=0) == 0
    assert not store.folder.exists()


def test_sizes_are_those_on_disk_and_the_oldest_go_first(tiny_encoder, store):
    for seed in range(3):
        embed_pictures(tiny_encoder, listed(4, seed=seed), store=store)
    for age, entry in enumerate(store.entries()):
        os.utime(entry.folder / "key.json", (1000 + age, 1000 + age))
    on_disk = sum(path.stat().st_size for path in store.folder.glob("*/*"))
    assert store.size_bytes() == on_disk
    oldest, *rest = store.entries()
    assert store.prune(max_bytes=on_disk) == 0
    assert store.prune(max_bytes=on_disk - 1) == oldest.size_bytes
    assert store.entries() == rest
    assert store.prune(max_bytes=0) == sum(entry.size_bytes for entry in rest)
    assert store.entries() == []


def test_being_read_counts_as_use(tiny_encoder, store):
    for seed in range(2):
        embed_pictures(tiny_encoder, listed(4, seed=seed), store=store)
    for entry in store.entries():
        os.utime(entry.folder / "key.json", (1000, 1000))
    embed_pictures(tiny_encoder, listed(4), store=store)
    store.prune(max_bytes=store.size_bytes() - 1)
    counts = len(parts(store))
    embed_pictures(tiny_encoder, listed(4), store=store)
    assert len(parts(store)) == counts == 1


def test_an_entry_without_a_readable_key_goes_first(tiny_encoder, store):
    for seed in range(2):
        embed_pictures(tiny_encoder, listed(4, seed=seed), store=store)
    broken = store.entries()[1]
    key = json.loads((broken.folder / "key.json").read_text())
    (broken.folder / "key.json").write_text(json.dumps({**key, "model": "other"}))
    (entry,) = [entry for entry in store.entries() if entry.key is None]
    assert entry.folder == broken.folder
    assert store.prune(max_bytes=10**9) == entry.size_bytes
    assert [entry.key is None for entry in store.entries()] == [False]


def test_a_job_whose_vectors_are_pruned_meanwhile_computes_on(tiny_encoder, store, tmp_path):
    class Pruning(CountedReads):
        def read(self, position):
            store.prune(max_bytes=0)
            return super().read(position)

    pictures = Pruning(listed(12), tmp_path / "reads")
    eager = VectorStore(store.folder, flush_s=0)
    found = embed_pictures(tiny_encoder, pictures, batch_size=2, store=eager)
    same(found, embed_pictures(tiny_encoder, listed(12), batch_size=2))


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        VectorStore(tmp_path)


def test_what_others_put_into_the_folder_is_left_alone(tiny_encoder, store):
    embed_pictures(tiny_encoder, listed(4), store=store)
    (store.folder / "notes").mkdir()
    (store.folder / "notes" / "thesis.tex").write_text("years of work")
    store.prune(max_bytes=0)
    assert (store.folder / "notes" / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_cannot_be_written_is_named(tiny_encoder, tmp_path):
    (tmp_path / "file").write_text("")
    store = VectorStore(tmp_path / "file" / "vectors")
    with pytest.raises(DataError, match=r"vectors cannot be kept there \(.*\); choose a folder"):
        embed_pictures(tiny_encoder, listed(3), store=store)


def test_a_negative_size_is_refused(store):
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        store.prune(max_bytes=-1)
