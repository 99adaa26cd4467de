"""An index follows its source: new, changed, moved and deleted pictures, also after a break.

Not for kills (test_index_kill.py).
"""

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from filelock import FileLock
from indexed import MAKER, changed_encoder, clustered, write_photos

from m2encoder import index_reader
from m2encoder.embed import embed_to_folder
from m2encoder.errors import DataError
from m2encoder.index import (
    ImageIndex,
    IndexSettings,
    add_pictures,
    build_index,
    index_vectors,
    remove_pictures,
    update_index,
)
from m2encoder.shards import ShardReader, write_shards


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return tiny_shards / "test"


@pytest.fixture
def photos(shards, tmp_path):
    return write_photos(tmp_path / "照片", shards)


@pytest.fixture
def folder(tiny_encoder, photos, tmp_path):
    """A finished index of `photos`."""
    build_index(tiny_encoder, photos, tmp_path / "index").close()
    return tmp_path / "index"


def contents(folder, encoder):
    """Open the index, check it, and return name -> (id, score with a text) of every picture."""
    with ImageIndex.open(folder, encoder=encoder) as index:
        index.check()
        hits = index.search(encoder.encode_text("一颗星星"), 999)[0]
        assert len(hits) == index.meta.count == len(index.names)
        return {hit.name: (hit.id, hit.score) for hit in hits}


def rebuilt(folder, encoder, photos, tmp_path):
    """Return what an index of the folder as it is now holds."""
    build_index(encoder, photos, tmp_path / "again").close()
    return contents(tmp_path / "again", encoder)


def assert_same_but_ids(found, expected):
    scores = {name: score for name, (_, score) in found.items()}
    # Other batches, sums in another order: a few units in the last place.
    assert scores == pytest.approx({name: s for name, (_, s) in expected.items()}, abs=2e-6)


def write_again(path, content):
    """Overwrite a file so that its time of change differs, however fast this machine is."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def test_only_new_and_changed_pictures_are_embedded(tiny_encoder, photos, folder, shards, tmp_path):
    before = contents(folder, tiny_encoder)
    reader = ShardReader(shards)
    write_again(photos / "图 01.png", reader[30].image)
    (photos / "新 🏔️.png").write_bytes(reader[31].image)
    (photos / "图 02.png").unlink()
    changes = update_index(tiny_encoder, folder)
    assert (changes.added, changes.changed, changes.removed, changes.embedded) == (
        ["新 🏔️.png"], ["图 01.png"], ["图 02.png"], 2
    )  # fmt: skip
    after = contents(folder, tiny_encoder)
    assert_same_but_ids(after, rebuilt(folder, tiny_encoder, photos, tmp_path))
    kept = before.keys() & after.keys()
    assert {name: after[name][0] for name in kept} == {name: before[name][0] for name in kept}
    assert after["新 🏔️.png"][0] > max(number for number, _ in before.values())


def test_an_update_without_changes_does_nothing(tiny_encoder, folder):
    before = contents(folder, tiny_encoder)
    changes = update_index(tiny_encoder, folder)
    assert not changes
    assert [bad.name for bad in changes.skipped] == ["broken.jpg"]
    assert contents(folder, tiny_encoder) == before


def test_ids_are_never_given_again(tiny_encoder, photos, folder):
    before = contents(folder, tiny_encoder)
    last = max(before, key=lambda name: before[name][0])
    content = (photos / last).read_bytes()
    (photos / last).unlink()
    update_index(tiny_encoder, folder)
    (photos / last).write_bytes(content)
    update_index(tiny_encoder, folder)
    assert contents(folder, tiny_encoder)[last][0] > before[last][0]


def test_moved_and_copied_pictures_are_not_embedded_again(tiny_encoder, photos, folder, tmp_path):
    (photos / "旅行").rename(photos / "2024")
    shutil.copy(photos / "图 01.png", photos / "copy.png")
    changes = update_index(tiny_encoder, folder)
    assert (len(changes.added), len(changes.removed), changes.embedded) == (5, 4, 0)
    found = contents(folder, tiny_encoder)
    assert_same_but_ids(found, rebuilt(folder, tiny_encoder, photos, tmp_path))


def test_a_picture_that_was_only_touched_is_not_embedded_again(tiny_encoder, photos, folder):
    before = contents(folder, tiny_encoder)
    write_again(photos / "图 01.png", (photos / "图 01.png").read_bytes())
    changes = update_index(tiny_encoder, folder)
    assert (changes.changed, changes.embedded) == ([], 0)
    assert contents(folder, tiny_encoder) == before
    assert update_index(tiny_encoder, folder).embedded == 0


def test_a_picture_that_broke_is_left_out_and_one_that_was_mended_comes_in(
    tiny_encoder, photos, folder, shards
):
    write_again(photos / "图 01.png", b"broken now")
    write_again(photos / "broken.jpg", ShardReader(shards)[20].image)
    changes = update_index(tiny_encoder, folder)
    assert (changes.added, changes.removed) == (["broken.jpg"], ["图 01.png"])
    assert [bad.name for bad in changes.skipped] == ["图 01.png"]
    assert "图 01.png" not in contents(folder, tiny_encoder)


def test_removed_pictures_stay_out_until_they_are_added(tiny_encoder, photos, folder):
    names = set(contents(folder, tiny_encoder))
    changes = remove_pictures(folder, ["旅行/*", "图 01.png"])
    assert changes.removed == sorted([n for n in names if n.startswith("旅行")] + ["图 01.png"])
    update_index(tiny_encoder, folder)
    assert set(contents(folder, tiny_encoder)) == names - set(changes.removed)
    added = add_pictures(tiny_encoder, folder, [photos / "旅行"])
    assert all(name.startswith("旅行") for name in added.added)
    update_index(tiny_encoder, folder)
    assert set(contents(folder, tiny_encoder)) == names - {"图 01.png"}


def test_building_anew_brings_removed_pictures_back(tiny_encoder, photos, folder):
    names = set(contents(folder, tiny_encoder))
    remove_pictures(folder, ["旅行/*"])
    build_index(tiny_encoder, photos, folder).close()
    update_index(tiny_encoder, folder)
    assert set(contents(folder, tiny_encoder)) == names


def test_an_index_may_become_empty(tiny_encoder, folder):
    assert len(remove_pictures(folder, ["*"]).removed) == 12
    assert contents(folder, tiny_encoder) == {}
    with ImageIndex.open(folder, encoder=tiny_encoder) as index:
        assert index.search(tiny_encoder.encode_text("星"), 3, where="size>0") == [[]]


def test_adding_one_picture_leaves_the_others_alone(tiny_encoder, photos, folder, shards):
    for name, at in (("a.png", 30), ("b.png", 31)):
        (photos / name).write_bytes(ShardReader(shards)[at].image)
    assert add_pictures(tiny_encoder, folder, [photos / "a.png"]).added == ["a.png"]
    found = contents(folder, tiny_encoder)
    assert "a.png" in found
    assert "b.png" not in found
    assert update_index(tiny_encoder, folder).added == ["b.png"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("../elsewhere.png", "outside the indexed folder"), ("none.png", "not a picture of")],
)
def test_only_pictures_of_the_folder_can_be_added(tiny_encoder, photos, folder, path, message):
    with pytest.raises(DataError, match=message):
        add_pictures(tiny_encoder, folder, [photos / path])


def test_removing_what_is_not_there_is_refused(folder, tiny_encoder):
    with pytest.raises(DataError, match=r"no picture '旅行/none\.png', expected names as"):
        remove_pictures(folder, ["图 01.png", "旅行/none.png"])
    assert "图 01.png" in contents(folder, tiny_encoder)


def test_an_emptied_source_is_refused_and_the_index_kept(tiny_encoder, photos, folder):
    shutil.rmtree(photos)
    with pytest.raises(DataError, match="no such folder"):
        update_index(tiny_encoder, folder)
    photos.mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        update_index(tiny_encoder, folder)
    assert len(contents(folder, tiny_encoder)) == 12


def test_another_model_cannot_update(tiny_encoder, photos, folder):
    with pytest.raises(DataError, match="index was made by"):
        update_index(changed_encoder(tiny_encoder), folder)


def test_vectors_of_ones_own_have_no_source_to_update_from(tiny_encoder, tmp_path):
    index_vectors(tiny_encoder, clustered(3, dim=tiny_encoder.dim), list("abc"), tmp_path / "i")
    with pytest.raises(DataError, match="without a source"):
        update_index(tiny_encoder, tmp_path / "i")
    with pytest.raises(DataError, match="only one of a picture folder takes pictures"):
        add_pictures(tiny_encoder, tmp_path / "i", [tmp_path / "x.png"])
    remove_pictures(tmp_path / "i", ["b"])
    assert set(contents(tmp_path / "i", tiny_encoder)) == {"a", "c"}


def test_an_index_of_shards_follows_them(tiny_encoder, shards, tmp_path):
    pairs = list(ShardReader(shards))
    write_shards(pairs[:20], tmp_path / "pairs", pairs_per_shard=8)
    build_index(tiny_encoder, tmp_path / "pairs", tmp_path / "index").close()
    pairs[3].meta["colour"] = "changed"
    write_shards(pairs[1:22], tmp_path / "pairs", pairs_per_shard=8)
    changes = update_index(tiny_encoder, tmp_path / "index")
    assert changes.added == sorted(pair.key for pair in pairs[20:22])
    assert changes.removed == [pairs[0].key]
    assert changes.embedded == 2
    with ImageIndex.open(tmp_path / "index", encoder=tiny_encoder) as index:
        hits = index.search(tiny_encoder.encode_text("星"), 99, where="colour=changed")[0]
    assert [hit.name for hit in hits] == [pairs[3].key]


def test_an_index_of_embeddings_follows_them(tiny_encoder, photos, shards, tmp_path):
    embed_to_folder(tiny_encoder, photos, tmp_path / "vectors", on_error="skip")
    build_index(tiny_encoder, tmp_path / "vectors", tmp_path / "index").close()
    (photos / "new.png").write_bytes(ShardReader(shards)[30].image)
    (photos / "图 01.png").unlink()
    embed_to_folder(tiny_encoder, photos, tmp_path / "vectors", on_error="skip")
    changes = update_index(tiny_encoder, tmp_path / "index")
    assert (changes.added, changes.removed) == (["new.png"], ["图 01.png"])
    found = contents(tmp_path / "index", tiny_encoder)
    assert_same_but_ids(found, rebuilt(tmp_path, tiny_encoder, photos, tmp_path))


def test_dead_rows_are_dropped_when_they_are_many(tiny_encoder, photos, tmp_path):
    settings = IndexSettings(slack_rows=3)
    folder = tmp_path / "index"
    build_index(tiny_encoder, photos, folder, settings=settings).close()
    before = contents(folder, tiny_encoder)
    for count in (1, 2, 3, 4):
        remove_pictures(folder, [f"图 {n:02d}.png" for n in [(1, 2, 4, 5)[count - 1]]])
        with ImageIndex.open(folder, encoder=tiny_encoder) as index:
            assert index.counts()["dead"] == (count if count <= 3 else 0)
    after = contents(folder, tiny_encoder)
    assert after == {name: before[name] for name in after}
    assert len(after) == 8
    assert next(folder.glob("vectors-*")).stat().st_size == 8 * tiny_encoder.dim * 4
    assert len(list(folder.glob("vectors-*"))) == 1


def test_a_reader_sees_changes_at_its_next_search(tiny_encoder, photos, folder, shards):
    index = ImageIndex.open(folder, encoder=tiny_encoder)
    query = tiny_encoder.encode_text("一颗星星")
    assert len(index.search(query, 99)[0]) == 12
    (photos / "new.png").write_bytes(ShardReader(shards)[30].image)
    update_index(tiny_encoder, folder)
    assert "new.png" in {hit.name for hit in index.search(query, 99)[0]}
    build_index(tiny_encoder, photos, folder).close()
    assert len(index.search(query, 99)[0]) == 13
    build_index(changed_encoder(tiny_encoder), photos, folder).close()
    with pytest.raises(DataError, match="built again with another model, other; open it again"):
        index.search(query, 99)


def test_a_change_in_the_middle_of_a_search_is_not_half_seen(tiny_encoder, folder, monkeypatch):
    index = ImageIndex.open(folder, encoder=tiny_encoder)
    names = set(index.names)
    nearest = index_reader._nearest

    def change_once(*arguments):
        """The real search, but a picture goes between it and the look-up of its hits."""
        if len(index.names) == 12:
            remove_pictures(folder, ["图 01.png"])
        return nearest(*arguments)

    monkeypatch.setattr(index_reader, "_nearest", change_once)
    found = index.search(tiny_encoder.encode_text("一颗星星"), 99)[0]
    assert {hit.name for hit in found} == names - {"图 01.png"}


def test_threads_search_while_the_index_changes(tiny_encoder, photos, folder):
    index = ImageIndex.open(folder, encoder=tiny_encoder)
    query = tiny_encoder.encode_text("一颗星星")
    counts, errors, stop = set(), [], threading.Event()

    def look():
        try:
            while not stop.is_set():
                counts.add(len(index.search(query, 99)[0]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in ("图 01.png", "图 02.png", "图 04.png"):
        remove_pictures(folder, [name])
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert counts <= {12, 11, 10, 9}
    assert len(index.search(query, 99)[0]) == 9


def test_two_processes_do_not_change_an_index_at_once(tiny_encoder, folder):
    code = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]).acquire(); "
    code += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder / "writer.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another process is changing this index"):
            update_index(tiny_encoder, folder)
        other.communicate()
    update_index(tiny_encoder, folder)


def test_an_index_whose_vectors_are_damaged_is_not_updated(tiny_encoder, photos, folder):
    (photos / "图 01.png").unlink()
    vectors = next(folder.glob("vectors-*"))
    vectors.write_bytes(vectors.read_bytes()[:-1])
    for change in (
        lambda: update_index(tiny_encoder, folder),
        lambda: remove_pictures(folder, ["图 02.png"]),
    ):
        with pytest.raises(DataError, match=r"half-written or damaged index .* m2enc index"):
            change()


def test_building_anew_keeps_the_old_index_until_the_end(tiny_encoder, photos, folder):
    before = contents(folder, tiny_encoder)
    broken = changed_encoder(tiny_encoder)
    broken.model.load_state_dict({k: v * np.nan for k, v in broken.model.state_dict().items()})
    with pytest.raises(DataError, match="its vector has length nan"):
        build_index(broken, photos, folder)
    assert contents(folder, tiny_encoder) == before


def test_the_lock_is_free_after_an_error(tiny_encoder, photos, folder):
    with pytest.raises(DataError):
        update_index(changed_encoder(tiny_encoder), folder)
    with FileLock(folder / "writer.lock", timeout=0):
        pass


def test_removing_from_vectors_needs_no_model(tmp_path):
    index_vectors(MAKER, clustered(3), ["猫", "狗", "🐟"], tmp_path / "i").close()
    remove_pictures(tmp_path / "i", ["🐟"])
    assert ImageIndex.open(tmp_path / "i", encoder=MAKER).names == ["猫", "狗"]
