"""Streamed pictures and texts equal those encoded directly; bad ones are named.

Not for the Encoder itself.
"""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_pictures import encoded_picture

from m2encoder.embed import embed_folder, embed_pairs, embed_text_file, embed_to_folder
from m2encoder.errors import DataError
from m2encoder.images import open_image
from m2encoder.shards import Pair, ShardReader, write_shards

# Batches of another size are summed in another order by BLAS: a few units in the last place.
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return tiny_shards / "test"


def shards_with_faults(folder):
    """Five pairs: ragged captions, one without any, an unreadable picture, an empty caption."""
    captions = [
        {"zh": ["一只猫。", "貓在屋頂上"], "en": ["a cat"]},
        {"zh": ["坏图"], "en": ["broken"]},
        {},
        {"zh": ["ＡＢＣ，全角！", "  "]},
        {"en": ["dog 🐕", "a dog " * 1000]},
    ]
    images = [encoded_picture(0), b"no picture", *(encoded_picture(i) for i in (2, 3, 4))]
    pairs = [Pair(f"p{i}", images[i], captions[i], {"number": i}) for i in range(5)]
    write_shards(pairs, folder, pairs_per_shard=2)
    return ShardReader(folder)


def test_pairs_equal_their_items_encoded_directly(tiny_encoder, shards):
    reader = ShardReader(shards)
    pairs = embed_pairs(tiny_encoder, reader, batch_size=5)
    assert pairs.keys == reader.keys
    direct = tiny_encoder.encode_image([pair.image for pair in reader])
    np.testing.assert_allclose(pairs.image, direct, **CLOSE)
    for language, texts in pairs.texts.items():
        expected = [text for pair in reader for text in pair.captions[language]]
        owners = [i for i, pair in enumerate(reader) for _ in pair.captions[language]]
        assert texts.texts == expected
        assert texts.owner.tolist() == owners
        np.testing.assert_allclose(texts.vectors, tiny_encoder.encode_text(expected), **CLOSE)


def test_vectors_are_float32_of_unit_norm(tiny_encoder, shards):
    pairs = embed_pairs(tiny_encoder, ShardReader(shards))
    for vectors in (pairs.image, *(texts.vectors for texts in pairs.texts.values())):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_skipped_pictures_and_texts_are_named_and_owners_stay_right(
    tiny_encoder, tmp_path, batch_size
):
    reader = shards_with_faults(tmp_path)
    pairs = embed_pairs(tiny_encoder, reader, batch_size=batch_size, on_error="skip")
    assert pairs.keys == ["p0", "p2", "p3", "p4"]
    assert [meta["number"] for meta in pairs.metas] == [0, 2, 3, 4]
    assert pairs.texts["zh"].texts == ["一只猫。", "貓在屋頂上", "ＡＢＣ，全角！"]
    assert pairs.texts["zh"].owner.tolist() == [0, 0, 2]
    assert pairs.texts["en"].owner.tolist() == [0, 3, 3]
    assert [bad.name for bad in pairs.skipped] == ["p1", "p3, zh caption 1"]
    assert [bad.position for bad in pairs.skipped] == [1, 3]


def test_the_first_bad_picture_raises_by_default(tiny_encoder, tmp_path):
    with pytest.raises(DataError, match=r"^p1: not a picture that Pillow can read"):
        embed_pairs(tiny_encoder, shards_with_faults(tmp_path))


def test_an_unknown_on_error_is_refused(tiny_encoder, tmp_path):
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        embed_pairs(tiny_encoder, shards_with_faults(tmp_path), on_error="ignore")  # pyright: ignore


def test_only_the_languages_asked_for_are_encoded(tiny_encoder, shards):
    assert set(embed_pairs(tiny_encoder, ShardReader(shards), languages=["zh"]).texts) == {"zh"}


def test_a_folder_is_read_in_order_of_names_and_below(tiny_encoder, tmp_path):
    for name in ("b.png", "子目录/a.png", "a.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded_picture(len(name)))
    found = embed_folder(tiny_encoder, tmp_path, batch_size=2)
    assert found.names == ["a.PNG", "b.png", "子目录/a.png"]
    direct = tiny_encoder.encode_image([tmp_path / name for name in found.names])
    np.testing.assert_allclose(found.vectors, direct, **CLOSE)


def test_photographs_are_turned_upright(tiny_encoder, tmp_path):
    picture = open_image(encoded_picture(1))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: turn by 90 degrees clockwise to show
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    found = embed_folder(tiny_encoder, tmp_path)
    np.testing.assert_allclose(found.vectors, tiny_encoder.encode_image(picture), **CLOSE)


def test_an_unreadable_picture_of_a_folder_is_skipped_and_named(tiny_encoder, tmp_path):
    (tmp_path / "good.png").write_bytes(encoded_picture(0))
    (tmp_path / "empty.jpg").write_bytes(b"")
    found = embed_folder(tiny_encoder, tmp_path, on_error="skip")
    assert found.names == ["good.png"]
    assert [(bad.position, bad.name) for bad in found.skipped] == [(0, "empty.jpg")]
    assert "not a picture" in found.skipped[0].reason


def test_a_folder_without_pictures_is_refused(tiny_encoder, tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        embed_folder(tiny_encoder, tmp_path)


def test_lines_of_a_text_file_become_texts(tiny_encoder, tmp_path):
    path = tmp_path / "文本.txt"
    path.write_bytes("\ufeff一只猫\r\na cat\u2028on a roof\n\n🐕\n".encode())
    found = embed_text_file(tiny_encoder, path, on_error="skip")
    assert found.names == ["一只猫", "a cat\u2028on a roof", "🐕"]
    assert [bad.name for bad in found.skipped] == ["文本.txt, line 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("猫在屋顶上".encode("gb18030"), "not UTF-8 at byte"),
        (b"", "holds no text"),
        (b"a cat\n\n", "line 2: empty text"),
    ],
)
def test_an_unusable_text_file_is_refused(tiny_encoder, tmp_path, content, message):
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        embed_text_file(tiny_encoder, path)


def test_shards_are_written_with_one_item_per_row(tiny_encoder, tmp_path):
    reader = shards_with_faults(tmp_path / "data")
    out = tmp_path / "out"
    written = embed_to_folder(tiny_encoder, reader.folder, out, on_error="skip")
    image, text = np.load(out / "image.npy"), np.load(out / "text.npy")
    items = [json.loads(line) for line in (out / "items.jsonl").read_text("utf-8").splitlines()]
    assert written.counts == {"image": len(image), "text": len(text)} == {"image": 4, "text": 6}
    assert [item["array"] for item in items] == ["image"] * 4 + ["text"] * 6
    (dog,) = (item for item in items if item.get("text") == "dog 🐕")
    assert (dog["array"], dog["key"], dog["language"]) == ("text", "p4", "en")
    direct = tiny_encoder.encode_text("dog 🐕")[0]
    np.testing.assert_allclose(text[dog["row"]], direct, **CLOSE)


def test_the_meta_file_says_which_model_and_what_was_left_out(tiny_encoder, tmp_path):
    reader = shards_with_faults(tmp_path / "data")
    embed_to_folder(tiny_encoder, reader.folder, tmp_path / "out", on_error="skip")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text("utf-8"))
    assert meta["fingerprint"] == tiny_encoder.fingerprint
    assert (meta["dim"], meta["dtype"]) == (tiny_encoder.dim, "float32")
    assert [bad["name"] for bad in meta["skipped"]] == ["p1", "p3, zh caption 1"]


def test_writing_again_replaces_and_leaves_no_temporary_folder(tiny_encoder, tmp_path):
    source = tmp_path / "texts.txt"
    for text in ("猫\n狗\n", "马\n"):
        source.write_text(text, encoding="utf-8")
        embed_to_folder(tiny_encoder, source, tmp_path / "out")
    assert np.load(tmp_path / "out" / "text.npy").shape == (1, tiny_encoder.dim)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts.txt"]


def test_a_folder_of_other_files_is_never_replaced(tiny_encoder, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    source = tmp_path / "texts.txt"
    source.write_text("猫", encoding="utf-8")
    with pytest.raises(DataError, match="holds other files"):
        embed_to_folder(tiny_encoder, source, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failure_leaves_the_older_result_as_it_was(tiny_encoder, tmp_path):
    source = tmp_path / "texts.txt"
    source.write_text("猫", encoding="utf-8")
    embed_to_folder(tiny_encoder, source, tmp_path / "out")
    source.write_text("猫\n\n狗", encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        embed_to_folder(tiny_encoder, source, tmp_path / "out")
    assert np.load(tmp_path / "out" / "text.npy").shape == (1, tiny_encoder.dim)


@pytest.mark.parametrize("name", ["nothing", "nothing.txt", "picture.png"])
def test_an_unusable_source_is_refused(tiny_encoder, tmp_path, name):
    (tmp_path / "picture.png").write_bytes(encoded_picture(0))
    with pytest.raises(DataError, match=name):
        embed_to_folder(tiny_encoder, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
