"""Lists of pictures: names, order, what is read, and hashes that change when the data does.

Not for encoding them (test_embed_lists.py).
"""

import io
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_pictures import encoded_picture, listed

from m2encoder.errors import DataError
from m2encoder.images import open_image
from m2encoder.pictures import (
    FilePictures,
    FolderPictures,
    ListedBytes,
    PictureSubset,
    ShardPictures,
    content_hash,
)
from m2encoder.shards import Pair, ShardReader, write_shards

NAMES = ["a.PNG", "b.png", "子目录/雪山 日落👍.png"]


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded_picture(len(name)))
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def shards(folder, seeds):
    write_shards([Pair(f"p{i}", encoded_picture(i), {}) for i in seeds], folder, pairs_per_shard=2)
    return ShardPictures(ShardReader(folder))


def test_a_folder_lists_its_pictures_by_path_below_it(folder):
    pictures = FolderPictures(folder)
    assert [pictures.name(i) for i in range(len(pictures))] == NAMES
    assert [pictures.read(i) for i in range(3)] == [folder / name for name in NAMES]


def test_a_missing_folder_is_refused_and_an_empty_one_has_no_pictures(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        FolderPictures(tmp_path / "nowhere")
    assert len(FolderPictures(tmp_path)) == 0


def test_shard_pictures_are_their_pairs(tmp_path):
    pictures = shards(tmp_path, [4, 2, 7])
    assert [pictures.name(i) for i in range(len(pictures))] == ["p4", "p2", "p7"]
    assert [pictures.read(i) for i in range(3)] == [encoded_picture(i) for i in (4, 2, 7)]


def test_a_subset_keeps_the_order_that_is_asked_for(folder):
    subset = PictureSubset(FolderPictures(folder), np.array([2, 0]))
    assert [subset.name(i) for i in range(len(subset))] == [NAMES[2], NAMES[0]]
    assert subset.read(0) == folder / NAMES[2]


@pytest.mark.parametrize("row", [3, -1])
def test_a_subset_of_rows_that_are_not_there_is_refused(folder, row):
    with pytest.raises(ValueError, match=rf"row {row} is asked for, there are 3 pictures"):
        PictureSubset(FolderPictures(folder), [0, row])


def test_names_and_pictures_of_different_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 names for 2 paths"):
        FilePictures(["a"], [tmp_path, tmp_path])
    with pytest.raises(ValueError, match="2 names for 0 pictures"):
        ListedBytes(["a", "b"], [])


def test_every_list_survives_pickling_with_its_key(folder, tmp_path):
    of_folder = FolderPictures(folder)
    lists = [of_folder, shards(tmp_path / "shards", [1, 2]), listed(3)]
    for pictures in [*lists, PictureSubset(of_folder, [1])]:
        again = pickle.loads(pickle.dumps(pictures))
        assert again.content_key() == pictures.content_key()
        assert (len(again), again.name(0)) == (len(pictures), pictures.name(0))


def test_the_key_of_a_folder_stays_when_nothing_changes(folder, tmp_path):
    before = FolderPictures(folder).content_key()
    assert FolderPictures(folder).content_key() == before
    (folder / "notes.txt").write_text("still no picture")
    assert FolderPictures(folder).content_key() == before
    folder.rename(tmp_path / "elsewhere")
    assert FolderPictures(tmp_path / "elsewhere").content_key() == before


def touch(folder):
    os.utime(folder / "b.png", ns=(1, 1))


def grow(folder):
    path = folder / "b.png"
    then = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(then, then))


def rename(folder):
    (folder / "b.png").rename(folder / "b2.png")


def remove(folder):
    (folder / "b.png").unlink()


def add(folder):
    (folder / "c.png").write_bytes(encoded_picture(9))


@pytest.mark.parametrize("change", [touch, grow, rename, remove, add])
def test_the_key_of_a_folder_changes_with_its_files(folder, change):
    before = FolderPictures(folder).content_key()
    change(folder)
    assert FolderPictures(folder).content_key() != before


def test_a_file_that_comes_back_changes_the_key(folder):
    pictures = FilePictures(["a", "b"], [folder / "a.PNG", folder / "late.png"])
    before = pictures.content_key()
    assert pictures.content_key() == before
    (folder / "late.png").write_bytes(encoded_picture(1))
    assert pictures.content_key() != before


def test_the_key_of_shards_follows_their_bytes(tmp_path):
    keys = [
        shards(tmp_path / "a", [1, 2, 3]).content_key(),
        shards(tmp_path / "b", [1, 2, 4]).content_key(),
        shards(tmp_path / "c", [2, 1, 3]).content_key(),
    ]
    assert len(set(keys)) == 3
    assert shards(tmp_path / "d", [1, 2, 3]).content_key() == keys[0]


def test_the_key_of_bytes_and_of_subsets_follows_names_rows_and_order():
    a, b = encoded_picture(1), encoded_picture(2)
    lists = [
        ListedBytes(["x", "y"], [a, b]),
        ListedBytes(["x", "y"], [b, a]),
        ListedBytes(["y", "x"], [a, b]),
        ListedBytes(["x"], [a]),
        *(PictureSubset(ListedBytes(["x", "y"], [a, b]), rows) for rows in ([0, 1], [1, 0], [0])),
    ]
    assert len({pictures.content_key() for pictures in lists}) == len(lists)


def test_a_hash_of_strings_knows_where_one_ends():
    texts = [["猫", "狗"], ["猫狗"], ["猫狗", ""], ["貓", "狗"], ["ＡＢ", "c"], ["AB", "c"], []]
    texts += [["a" * 100_000], ["a" * 99_999], ["👍"], ["\ud83d", "\udc4d"]]
    assert len({content_hash("texts", *some) for some in texts}) == len(texts)
    assert content_hash("texts", "猫") != content_hash("files", "猫")


# --- opening them in several threads -------------------------------------------------------------


def photograph(orientation, mode):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.open(io.BytesIO(encoded_picture(3, (64, 40)))).convert(mode)
    picture.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_pillow_does(orientation, mode):
    content = photograph(orientation, mode)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    found = open_image(content, upright=True)
    assert (found.mode, found.size) == ("RGB", expected.size)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    lying = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(open_image(content)), np.asarray(lying))


def test_a_picture_of_the_caller_is_never_changed():
    own = Image.open(io.BytesIO(photograph(6, "RGB")))
    found = open_image(own, upright=True)
    assert own.size == (64, 40)
    assert found.size == (40, 64)
    assert open_image(own) is not own


def test_warnings_of_pillow_stay_silent_in_threads_and_filters_are_put_back(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # 48 x 40 is more, but not twice as much
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(encoded_picture(0)))
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(open_image, [encoded_picture(i) for i in range(60)]))
        assert list(warnings.filters) == before
