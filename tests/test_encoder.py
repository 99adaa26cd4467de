"""The Encoder: pictures and strings in, unit vectors out; one bad item never spoils the rest.

Not for opening folders (test_load.py) nor for the model's tensors (test_model.py).
"""

import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2encoder.encoder import BadItem, Encoder, OnError, language_of
from m2encoder.errors import DataError
from m2encoder.load import load_model

Call = tuple[Callable[..., Any], list[Any]]

TEXTS = [
    "一只红色的猫",
    "繁體中文：貓與狗",
    "ＦＵＬＬ　ｗｉｄｔｈ！",
    "a red cat",
    "A RED CAT",
    "x",
    "👨‍👩‍👧‍👦 family",
    "a red cat sits on a blue sofa and looks at two dogs " * 3,
    "猫" * 10_000,
    "<0x41> ＜cls＞ ▁",
    "图中有 three 个 circles",
    "\t two  blanks\n",
]


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def png_of(width: int, height: int) -> bytes:
    """Return a PNG whose header promises a size; nothing may decode it."""
    chunks = b""
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        chunks += struct.pack(">I", len(data)) + name + data + checksum
    return b"\x89PNG\r\n\x1a\n" + chunks


def assert_unit_float32(vectors: np.ndarray, count: int, encoder: Encoder) -> None:
    assert isinstance(vectors, np.ndarray)
    assert (vectors.shape, vectors.dtype) == ((count, encoder.dim), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


# ── vectors ─────────────────────────────────────────────────────────────────────────────────────


def test_text_vectors_are_float32_of_unit_norm_one_per_text(tiny_encoder: Encoder) -> None:
    assert_unit_float32(tiny_encoder.encode_text(TEXTS), len(TEXTS), tiny_encoder)
    assert_unit_float32(tiny_encoder.encode_text(tuple(TEXTS)), len(TEXTS), tiny_encoder)


def test_picture_vectors_are_float32_of_unit_norm_one_per_picture(tiny_encoder: Encoder) -> None:
    pictures = [picture(0), picture(1, 1, 1), picture(2, 300, 7)]
    assert_unit_float32(tiny_encoder.encode_image(pictures), 3, tiny_encoder)


def test_one_item_alone_gives_one_row(tiny_encoder: Encoder) -> None:
    assert_unit_float32(tiny_encoder.encode_text("猫"), 1, tiny_encoder)
    assert_unit_float32(tiny_encoder.encode_image(picture(0)), 1, tiny_encoder)
    assert_unit_float32(tiny_encoder.encode("猫"), 1, tiny_encoder)
    assert_unit_float32(tiny_encoder.encode(np.asarray(picture(0))), 1, tiny_encoder)


def test_nothing_gives_no_rows(tiny_encoder: Encoder) -> None:
    for encode in (tiny_encoder.encode_text, tiny_encoder.encode_image, tiny_encoder.encode):
        assert_unit_float32(encode([]), 0, tiny_encoder)


def test_order_and_batching_do_not_change_vectors(tiny_encoder: Encoder) -> None:
    """Padding to another longest text only moves float32 noise."""
    pictures = [picture(i, 20 + 7 * i, 50 - 3 * i) for i in range(8)]
    calls: list[Call] = [(tiny_encoder.encode_text, TEXTS), (tiny_encoder.encode_image, pictures)]
    for encode, items in calls:
        want = encode(items)
        assert np.linalg.norm(want - want[0], axis=1)[1:].min() > 1e-4  # the items do differ
        for batch_size in (1, 3, 5, 1000):
            np.testing.assert_allclose(encode(items, batch_size=batch_size), want, atol=1e-6)
        np.testing.assert_allclose(encode(items[::-1]), want[::-1], atol=1e-6)


def test_every_form_of_one_picture_gives_the_same_vector(
    tiny_encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "猫 １.png"
    path.write_bytes(encoded(picture(5)))
    forms = [path, str(path), path.read_bytes(), Image.open(path), np.asarray(picture(5))]
    vectors = tiny_encoder.encode_image(forms)
    np.testing.assert_allclose(vectors, vectors[:1].repeat(5, axis=0), atol=1e-6)


def test_equal_texts_after_normalisation_give_equal_vectors(tiny_encoder: Encoder) -> None:
    full, half, blanks = tiny_encoder.encode_text(
        ["ａ　ｒｅｄ　ｃａｔ", "a red cat", " a  red\tcat\n"]
    )
    np.testing.assert_allclose(full, half, atol=1e-6)
    np.testing.assert_allclose(blanks, half, atol=1e-6)


def test_tensors_on_request_hold_the_same_vectors(tiny_encoder: Encoder) -> None:
    calls: list[Call] = [
        (tiny_encoder.encode_text, TEXTS[:3]),
        (tiny_encoder.encode_image, [picture(0)]),
        (tiny_encoder.encode, ["a red cat", picture(1), "猫"]),
        (tiny_encoder.encode, []),
    ]
    for encode, items in calls:
        tensor = encode(items, convert_to_tensor=True)
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.dtype, tensor.device) == (torch.float32, tiny_encoder.device)
        np.testing.assert_array_equal(tensor.numpy(), encode(items))


def test_similarity_is_the_cosine_of_every_pair(tiny_encoder: Encoder) -> None:
    texts, images = tiny_encoder.encode_text(TEXTS), tiny_encoder.encode_image([picture(0)] * 2)
    found = tiny_encoder.similarity(texts, images)
    assert (found.shape, found.dtype) == ((len(TEXTS), 2), np.float32)
    assert found[3, 1] == pytest.approx(float(np.dot(texts[3], images[1])), abs=1e-6)
    as_tensors = tiny_encoder.similarity(torch.from_numpy(texts), torch.from_numpy(images))
    np.testing.assert_array_equal(as_tensors, found)


# ── mixed lists ─────────────────────────────────────────────────────────────────────────────────


def test_in_a_mixed_list_a_str_is_text_and_a_path_a_picture(
    tiny_encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(picture(3)))
    items = [str(path), path, "猫", path.read_bytes(), picture(3), np.asarray(picture(3)), "a cat"]
    found = tiny_encoder.encode(items)
    text = tiny_encoder.encode_text([str(path), "猫", "a cat"])
    np.testing.assert_allclose(found[[0, 2, 6]], text, atol=1e-6)
    image = tiny_encoder.encode_image(path)
    np.testing.assert_allclose(found[[1, 3, 4, 5]], image.repeat(4, axis=0), atol=1e-6)


def test_bad_items_of_a_mixed_list_are_named_by_their_place_in_it(
    tiny_encoder: Encoder, tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere.png"
    items = ["猫", "", picture(0), b"junk", "a cat", missing, " ", np.zeros((2, 2)), picture(1)]
    skipped: list[BadItem] = []
    found = tiny_encoder.encode(items, on_error="skip", skipped=skipped, batch_size=2)
    np.testing.assert_allclose(
        found, tiny_encoder.encode(["猫", picture(0), "a cat", picture(1)]), atol=1e-6
    )
    names = ["text 1", "picture 3", str(missing), "text 6", "picture 7"]
    assert [(bad.position, bad.name) for bad in skipped] == list(
        zip([1, 3, 5, 6, 7], names, strict=True)
    )
    for bad in skipped:
        assert bad.reason.startswith(f"{bad.name}: ")
        assert "\n" not in bad.reason
    with pytest.raises(DataError, match=r"^picture 3: not a picture"):
        tiny_encoder.encode(items)
    with pytest.raises(DataError, match=r"^text 1: empty"):
        tiny_encoder.encode(items[:3])


# ── bad items ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "picture 1: empty file, expected an encoded picture"),
        (b"not a picture", "picture 1: not a picture that Pillow can read"),
        (encoded(picture(0))[:900], "picture 1: damaged picture ("),
        (png_of(30_000, 30_000), "picture 1: 900,000,000 pixels are too many, at most 178,956,970"),
        (np.zeros((2, 2, 3)), "picture 1: array of float64 (2, 2, 3), expected uint8"),
        (
            Path("nowhere/猫.png"),
            "nowhere/猫.png: no such file, expected a picture; check the path",
        ),
        ("nowhere/cat.png", "nowhere/cat.png: no such file, expected a picture; check the path"),
    ],
    ids=["empty", "junk", "truncated", "30000x30000", "float", "path", "str"],
)
def test_a_bad_picture_raises_one_line_or_is_left_out_by_name(
    tiny_encoder: Encoder, image: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    _assert_one_is_bad(tiny_encoder.encode_image, [picture(0), image, picture(2)], words, caplog)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "text 1: empty, expected at least one character"),
        (" \t\n　\u00a0", "text 1: empty, expected at least one character"),
        ("▁", "text 1: empty, expected at least one character"),
        ("cat \ud83d", "text 1: text holds half of a surrogate pair (character 4)"),
    ],
    ids=["empty", "blank", "word mark", "surrogate"],
)
def test_a_bad_text_raises_one_line_or_is_left_out_by_name(
    tiny_encoder: Encoder, text: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    _assert_one_is_bad(tiny_encoder.encode_text, ["猫", text, "a cat"], words, caplog)


def _assert_one_is_bad(
    encode: Callable[..., Any], items: list[Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError) as caught:
        encode(items)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    skipped: list[BadItem] = []
    with caplog.at_level(logging.WARNING):
        found = encode(items, on_error="skip", skipped=skipped, batch_size=1)
    np.testing.assert_allclose(found, encode([items[0], items[2]]), atol=1e-6)
    assert skipped == [BadItem(1, words.partition(":")[0], str(caught.value))]
    assert [record.getMessage() for record in caplog.records] == [f"skipped {caught.value}"]


def test_when_every_item_is_bad_no_row_is_left(tiny_encoder: Encoder) -> None:
    skipped: list[BadItem] = []
    found = tiny_encoder.encode_image([b"", b"x"], on_error="skip", skipped=skipped)
    assert_unit_float32(found, 0, tiny_encoder)
    assert [bad.position for bad in skipped] == [0, 1]


def test_a_text_of_100_000_characters_is_truncated_with_one_warning(
    tiny_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from m2encoder.load import load_model

    encoder = load_model(tiny_model_folder, device="cpu")
    long = "一只红色的猫坐在沙发上，a red cat. " * 4000
    with caplog.at_level(logging.WARNING):
        found = encoder.encode_text([long[:100_000]] * 3, batch_size=1)
    assert_unit_float32(found, 3, encoder)
    assert [r.getMessage() for r in caplog.records] == [
        "a text fills all 52 tokens; longer ones lose their start"
    ]
    assert encoder.tokenizer.truncation_side == "left"
    np.testing.assert_allclose(found[:1], encoder.encode_text(long[90_000:100_000]), atol=1e-6)


def test_a_callers_mistake_is_no_data_error(tiny_encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="on_error is 'ignore', expected 'raise' or 'skip'"):
        tiny_encoder.encode_text("猫", on_error="ignore")  # pyright: ignore[reportArgumentType]
    wrong: Any = [7]
    for on_error in ("raise", "skip"):
        mode: OnError = on_error
        with pytest.raises(TypeError, match="text 0 is a int, expected a str"):
            tiny_encoder.encode_text(wrong, on_error=mode)


# ── classify ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "labels", [["猫", "狗", "鳥"], ["cat", "dog"], ["红色的猫", "a red cat", "{}", "100%"]]
)
def test_probabilities_of_chinese_and_english_labels_sum_to_one(
    tiny_encoder: Encoder, labels: list[str]
) -> None:
    odds = tiny_encoder.classify([picture(0), picture(1)], labels)
    assert (odds.shape, odds.dtype) == ((2, len(labels)), np.float32)
    np.testing.assert_allclose(odds.sum(axis=1), 1, atol=1e-6)
    assert (odds > 0).all()


def test_probabilities_are_the_softmax_of_the_scaled_cosine_with_averaged_prompts(
    tiny_encoder: Encoder,
) -> None:
    labels, templates = ["cat", "猫", "dog"], ["{}", "a drawing of {}", "{}的画"]
    classes = []
    for label in labels:
        mean = tiny_encoder.encode_text([t.replace("{}", label) for t in templates]).mean(axis=0)
        classes.append(mean / np.linalg.norm(mean))
    logits = tiny_encoder.logit_scale * tiny_encoder.encode_image(picture(0)) @ np.array(classes).T
    want = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    found = tiny_encoder.classify(picture(0), labels, templates=templates)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert tiny_encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_classify_leaves_out_bad_pictures(tiny_encoder: Encoder) -> None:
    skipped: list[BadItem] = []
    odds = tiny_encoder.classify([b"", picture(0)], ["猫", "狗"], on_error="skip", skipped=skipped)
    assert odds.shape == (1, 2)
    assert [bad.position for bad in skipped] == [0]


def test_classify_refuses_labels_that_cannot_be_told_apart(tiny_encoder: Encoder) -> None:
    for labels in (["猫"], ["猫", "猫"], []):
        with pytest.raises(ValueError, match="labels must be two or more different ones"):
            tiny_encoder.classify(picture(0), labels)
    with pytest.raises(ValueError, match=r"template 'a cat' has no \{\} for the label"):
        tiny_encoder.classify(picture(0), ["猫", "狗"], templates=["a cat"])


def test_the_language_of_a_label_is_chinese_if_any_character_is() -> None:
    chinese = ["猫", "貓", "T恤", "𠮷野家", "a 红 b"]
    assert [language_of(text) for text in chinese] == ["zh"] * 5
    english = ["cat", "", "ＣＡＴ", "👨‍👩‍👧‍👦", "naïve café", "100%"]
    assert [language_of(text) for text in english] == ["en"] * 6


# ── progress ────────────────────────────────────────────────────────────────────────────────────


def test_a_bar_shows_only_when_it_is_asked_for(
    tiny_encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_encoder.encode_text(["猫"] * 5, batch_size=2)  # not a terminal here
    tiny_encoder.encode_text("猫", show_progress=False)
    assert capsys.readouterr() == ("", "")
    tiny_encoder.encode_text(["猫"] * 5, batch_size=2, show_progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "5/5" in shown.err


def test_fingerprint_follows_weights_that_training_changes_in_place(tiny_model_folder):
    encoder = load_model(tiny_model_folder, device="cpu")
    before = encoder.fingerprint
    encoder.model.logit_scale.data = encoder.model.logit_scale.data.clone()
    assert encoder.fingerprint == before
    with torch.no_grad():
        encoder.model.logit_scale.mul_(2)
    changed = encoder.fingerprint
    with torch.no_grad():
        encoder.model.logit_scale.div_(2)
    assert changed != before
    assert encoder.fingerprint == before
