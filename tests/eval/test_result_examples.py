"""Examples are the worst queries and some good ones, shown with pictures from the data."""

import numpy as np
import pytest
from made_results import made_result
from read_pages import page_of, picture, picture_folder

from m2encoder.eval.examples import Asked, retrieval_examples
from m2encoder.eval.picture_finder import PictureFinder
from m2encoder.eval.retrieval import measure_retrieval
from m2encoder.pictures import FolderPictures, ListedBytes
from m2encoder.shards import Pair, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


def test_pictures_are_small(folder):
    uri = PictureFinder(folder).uri("大.jpg")
    assert uri is not None
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 5_000


def test_pictures_are_found_in_shards_in_a_folder_and_where_images_says(tmp_path, folder):
    pairs = [Pair("key-1", picture(), {"zh": ["红"]}), Pair("key-2", b"no picture", {"zh": ["坏"]})]
    write_shards(pairs, tmp_path / "shards")
    shards = PictureFinder(tmp_path / "shards")
    assert shards.uri("key-1")
    assert shards.uri("key-2") is None
    assert PictureFinder(tmp_path / "gone", images=folder).uri("b.png")
    assert PictureFinder(tmp_path / "gone", images=tmp_path / "shards").uri("key-1")
    captions = folder / "captions.jsonl"
    captions.write_text('{"image": "b.png", "captions": ["蓝"]}\n', "utf-8")
    assert PictureFinder(captions).uri("b.png")
    captions.unlink()


def test_names_cannot_lead_out_of_the_folder(tmp_path, folder):
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "inside").mkdir()
    finder = PictureFinder(tmp_path / "inside")
    names = ["../secret.png", str(tmp_path / "secret.png"), "", "\0", "x" * 5_000, "."]
    assert [finder.uri(name) for name in names] == [None] * len(names)
    assert finder.missing == set(names)


def test_examples_are_the_worst_queries_then_drawn_successes(folder):
    # pictures and captions in a plane; caption 0 of picture 0 lies nearest to picture 1
    image = np.asarray([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    text = np.asarray([[0, 1], [0, 1], [-1, 0], [0, -1], [1, 0]], np.float32)
    owner = np.asarray([0, 1, 2, 3, 0])
    pictures = FolderPictures(folder)
    texts = ["红", "蓝", "绿", "金", "红的"]
    output = measure_retrieval(image, text, owner)
    found = retrieval_examples(
        Asked(image, text, owner, pictures, texts), output.ranks, successes=2
    )
    worst, *fine = found["t2i"]
    assert (worst["query"], worst["rank"]) == ("红", 2.5)
    assert worst["right"] == [pictures.name(0)]
    assert worst["found"][0] == {"name": pictures.name(1), "score": 1.0}
    assert [each["rank"] for each in fine] == [1.0, 1.0]
    assert len(found["i2t"][0]["found"]) == 4
    assert page_of(made_result(details={"examples": found}, data={"path": str(folder)})).all("img")


def test_failures_come_worst_first_and_one_of_each_picture():
    count = 6
    asked = Asked(
        np.eye(count), np.eye(count), np.arange(count),
        ListedBytes([f"p{i}" for i in range(count)], [b""] * count), list("abcdef"),
    )  # fmt: skip
    ranks = {f"t2i_{name}": np.zeros(count, np.int64) for name in ("above", "tied", "right")}
    ranks |= {
        "t2i_above": np.asarray([0, 3, 9, 1, 5, 0]),
        "t2i_image": np.asarray([0, 1, 2, 3, 2, 5]),
    }
    found = retrieval_examples(asked, ranks, failures=2, successes=5)["t2i"]
    assert [each["query"] for each in found[:2]] == ["c", "b"]
    assert sorted(each["query"] for each in found[2:]) == ["a", "f"]
    assert "i2t" not in retrieval_examples(asked, ranks)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="expected one for each"):
        Asked(np.eye(2), np.eye(2), np.asarray([0, 1]), ListedBytes([], []), ["a", "b"])
