"""Lists of pictures and texts to vectors: equal to the Encoder's own, in order, on several ranks.

Not for folders and files (test_embed.py) nor for what is stored (test_vector_store.py).
"""

import logging

import numpy as np
import pytest
import torch
from tiny_pictures import encoded_picture, listed

from m2encoder.distributed import World
from m2encoder.embed import embed_pictures, embed_texts
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError
from m2encoder.load import load_model
from m2encoder.pictures import FilePictures, ListedBytes, PictureSubset, ShardPictures
from m2encoder.shards import ShardReader
from m2encoder.vector_store import VectorStore

# Batches of another size are summed in another order by BLAS: a few units in the last place.
CLOSE = {"rtol": 0, "atol": 2e-6}
TEXTS = [
    "一只红色的猫在屋顶上",
    "貓在屋頂上曬太陽",
    "a cat",
    "ＡＢＣ，全角！",
    "dog 🐕 on a 沙滩",
    "猫",
    "a small red cat sits beside a large blue dog under a green tree " * 40,
    "一只猫" * 5000,
    "a cat",
    "  spaces \t around  ",
    "😀👍🏽👨‍👩‍👧",
]
LONG = {6, 7}


@pytest.fixture
def three_threads():
    """Three batches at a time, as on a machine with more cores."""
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(own)


def one_by_one(encoder, pictures):
    return np.concatenate([encoder.encode_image(pictures.read(i)) for i in range(len(pictures))])


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("workers", [None, 1, 4])
def test_pictures_equal_those_encoded_one_by_one(tiny_encoder, three_threads, batch_size, workers):
    pictures = listed(23)
    found = embed_pictures(tiny_encoder, pictures, batch_size=batch_size, workers=workers)
    assert found.names == pictures.names
    assert found.kept.tolist() == list(range(23))
    assert found.skipped == []
    np.testing.assert_allclose(found.vectors, one_by_one(tiny_encoder, pictures), **CLOSE)


def test_vectors_do_not_depend_on_threads(tiny_encoder):
    pictures = listed(30)
    alone = embed_pictures(tiny_encoder, pictures, workers=1)
    own = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        together = embed_pictures(tiny_encoder, pictures, workers=8)
    finally:
        torch.set_num_threads(own)
    np.testing.assert_array_equal(together.vectors, alone.vectors)


def test_vectors_are_float32_of_unit_norm_and_change_with_the_picture(tiny_encoder):
    vectors = embed_pictures(tiny_encoder, listed(6)).vectors
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    assert np.abs(np.diff(vectors, axis=0)).max(axis=1).min() > 1e-3


def test_bad_pictures_are_left_out_and_positions_kept(tiny_encoder, three_threads, tmp_path):
    bad = {0, 1, 2, 7, 22}  # a whole first batch, one inside, the last
    pictures = listed(23, bad=bad)
    found = embed_pictures(tiny_encoder, pictures, batch_size=3, on_error="skip")
    good = [i for i in range(23) if i not in bad]
    assert found.kept.tolist() == good
    assert found.names == [pictures.names[i] for i in good]
    assert [item.position for item in found.skipped] == sorted(bad)
    assert {item.reason for item in found.skipped} == {
        "not a picture that Pillow can read; remove it or convert it to JPEG or PNG"
    }
    np.testing.assert_allclose(
        found.vectors, one_by_one(tiny_encoder, PictureSubset(pictures, good)), **CLOSE
    )


def test_nothing_but_bad_pictures_gives_no_vectors(tiny_encoder):
    found = embed_pictures(tiny_encoder, listed(3, bad={0, 1, 2}), on_error="skip")
    assert found.vectors.shape == (0, tiny_encoder.dim)
    assert (found.names, len(found.skipped)) == ([], 3)


def test_the_first_bad_picture_raises_by_default(tiny_encoder, three_threads):
    with pytest.raises(DataError, match=r"^图4\.png: not a picture that Pillow can read"):
        embed_pictures(tiny_encoder, listed(40, bad={4, 5, 30}), batch_size=2)


def test_missing_and_empty_files_are_bad_pictures(tiny_encoder, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "good.png").write_bytes(encoded_picture(1))
    names = ["empty.png", "gone.png", "good.png"]
    pictures = FilePictures(names, [tmp_path / name for name in names])
    found = embed_pictures(tiny_encoder, pictures, on_error="skip")
    assert found.names == ["good.png"]
    reasons = [item.reason.split(" that")[0].split(",")[0] for item in found.skipped]
    assert reasons == ["not a picture", "no such file"]


def test_a_damaged_shard_raises_even_when_bad_pictures_are_skipped(
    tiny_encoder, tiny_shards, monkeypatch
):
    reader = ShardReader(tiny_shards / "test")
    monkeypatch.setitem(reader.index.shards[0].pairs[2], "json", [0, 9])
    with pytest.raises(DataError, match="is damaged"):
        embed_pictures(tiny_encoder, ShardPictures(reader), on_error="skip")


def test_no_pictures_give_no_vectors(tiny_encoder):
    found = embed_pictures(tiny_encoder, ListedBytes([], []))
    assert found.vectors.shape == (0, tiny_encoder.dim)
    assert (found.names, found.skipped, found.kept.tolist()) == ([], [], [])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lower_precision_gives_nearly_the_same_vectors(tiny_encoder, precision):
    exact = embed_pictures(tiny_encoder, listed(5)).vectors
    found = embed_pictures(tiny_encoder, listed(5), precision=precision).vectors
    assert found.dtype == np.float32
    assert np.abs(found - exact).max() > 1e-5  # else it was not used
    assert (found * exact).sum(axis=1).min() > 0.999
    texts = embed_texts(tiny_encoder, TEXTS, precision=precision).vectors
    assert (texts * embed_texts(tiny_encoder, TEXTS).vectors).sum(axis=1).min() > 0.999


def test_an_unknown_precision_or_batch_size_is_refused(tiny_encoder):
    with pytest.raises(ValueError, match="precision is 'int8', expected one of float32, bfloat16"):
        embed_texts(tiny_encoder, TEXTS, precision="int8")  # pyright: ignore
    for embed, items in ((embed_texts, TEXTS), (embed_pictures, listed(2))):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            embed(tiny_encoder, items, batch_size=0)  # pyright: ignore


# --- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_texts_equal_those_encoded_one_by_one_in_their_order(
    tiny_encoder, three_threads, batch_size
):
    found = embed_texts(tiny_encoder, TEXTS, batch_size=batch_size)
    direct = np.concatenate([tiny_encoder.encode_text(text) for text in TEXTS])
    np.testing.assert_allclose(found.vectors, direct, **CLOSE)
    assert found.truncated == len(LONG)


def test_many_windows_of_texts_keep_their_order(tiny_encoder, three_threads):
    texts = [f"{'红 dog ' * (i % 5)}{i}" for i in range(300)]
    found = embed_texts(tiny_encoder, texts, batch_size=2)
    np.testing.assert_allclose(found.vectors, tiny_encoder.encode_text(texts), **CLOSE)
    assert found.truncated == 0


def test_texts_that_just_fit_are_not_counted_as_truncated(tiny_encoder):
    fits = [
        "q" * 49,
        "，" * 49,
        "Ｑ" * 49,
        " " * 20_000 + "猫",
    ]  # 52 tokens, 3 of them not the text
    longer = ["q" * 50, "，" * 50, "Ｑ" * 50, "猫" * 20_000, "猫" * 17]
    assert embed_texts(tiny_encoder, fits).truncated == 0
    assert embed_texts(tiny_encoder, fits + longer).truncated == len(longer)


def test_truncated_texts_are_told_once(tiny_encoder, caplog):
    with caplog.at_level(logging.WARNING):
        embed_texts(tiny_encoder, TEXTS, batch_size=2)
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 11 texts have more than 52 tokens")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^text 70: empty"),
        (" \u3000\n", r"^text 70: empty"),
        ("\ud83d", r"^text 70: text holds half of a surrogate pair"),
    ],
)
def test_an_unusable_text_is_named(tiny_encoder, text, message):
    with pytest.raises(DataError, match=message):
        embed_texts(tiny_encoder, [*["猫"] * 70, text], batch_size=2)


def test_one_text_is_no_list(tiny_encoder):
    with pytest.raises(TypeError, match="texts is one str"):
        embed_texts(tiny_encoder, "雪山日落")


def test_no_texts_give_no_vectors(tiny_encoder):
    found = embed_texts(tiny_encoder, [])
    assert (found.vectors.shape, found.truncated) == ((0, tiny_encoder.dim), 0)


def test_a_model_without_tokenizer_refuses_texts(tiny_encoder):
    encoder = Encoder(tiny_encoder.model, tiny_encoder.image_processor, None)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        embed_texts(encoder, TEXTS)


# --- several ranks ------------------------------------------------------------------------------


def embedded_on_rank(rank, size, folder, count, bad, store):
    """What one rank gets; loaded anew in each process."""
    encoder = load_model(folder, device="cpu")
    world = World(rank, size)
    options = {"batch_size": 4, "world": world, "store": store and VectorStore(store)}
    pictures = embed_pictures(encoder, listed(count, bad=bad), on_error="skip", **options)
    texts = embed_texts(encoder, TEXTS * 5, **{**options, "batch_size": 2})
    return pictures, texts


@pytest.mark.parametrize(("count", "bad"), [(29, {0, 9, 28}), (1, set()), (0, set()), (2, {0, 1})])
@pytest.mark.parametrize("is_stored", [False, True])
def test_two_ranks_get_the_very_vectors_of_one(
    gloo, tiny_model_folder, tmp_path, count, bad, is_stored
):
    store = tmp_path / "vectors" if is_stored else None
    alone_pictures, alone_texts = embedded_on_rank(0, 1, tiny_model_folder, count, bad, None)
    for _ in range(2 if is_stored else 1):  # the second time from the store
        for pictures, texts in gloo(2).run(embedded_on_rank, tiny_model_folder, count, bad, store):
            np.testing.assert_array_equal(pictures.vectors, alone_pictures.vectors)
            assert pictures.kept.tolist() == alone_pictures.kept.tolist()
            assert pictures.names == alone_pictures.names
            assert pictures.skipped == alone_pictures.skipped
            np.testing.assert_array_equal(texts.vectors, alone_texts.vectors)
            assert texts.truncated == alone_texts.truncated == 10


def first_bad_on_rank(rank, size, folder, bad):
    embed_pictures(
        load_model(folder, device="cpu"), listed(40, bad=bad), batch_size=2, world=World(rank, size)
    )


@pytest.mark.parametrize("bad", [{3, 38}, {38}, {3}])
def test_a_bad_picture_of_one_rank_is_raised_on_all(gloo, tiny_model_folder, bad):
    errors = gloo(2).errors(first_bad_on_rank, tiny_model_folder, bad)
    assert [name for name, _ in errors] == ["DataError"] * 2
    assert f"图{min(bad)}.png: not a picture" in errors[0][1]
    if len(bad) == 1:
        assert f"图{min(bad)}.png: not a picture" in errors[1][1]


def different_numbers(rank, size, folder):
    embed_pictures(load_model(folder, device="cpu"), listed(3 + rank), world=World(rank, size))


def test_ranks_with_different_data_are_refused(gloo, tiny_model_folder):
    errors = gloo(2).errors(different_numbers, tiny_model_folder)
    assert {name for name, _ in errors} == {"PlacementError"}
    assert errors[0][1] == "ranks have 3, 4 items, expected the same on all; check the data"
