"""Opening pictures: every odd input gives RGB or one clear line."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2encoder.errors import DataError
from m2encoder.images import MAX_PIXELS, list_images, open_image

RED = (255, 0, 0)


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def png_by_hand(width: int, height: int, *, bits: int = 8, rows: bytes = b"") -> bytes:
    """Return an RGB PNG with any header; a huge one needs no huge data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def noise(image_format: str) -> bytes:
    """Return an encoded picture that does not compress, so that half of it is missing something."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), image_format)


def first_pixel(image: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(image)[0, 0].tolist())


# ── good, if odd ────────────────────────────────────────────────────────────────────────────────


def test_a_path_a_string_bytes_a_picture_and_an_array_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "图片 １.png"
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path.write_bytes(encode(Image.fromarray(pixels)))
    for source in (path, str(path), path.read_bytes(), Image.open(path), pixels):
        image = open_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def _palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    return encode(image, transparency=bytes([255, 0]))  # the red entry is invisible


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (_palette_with_transparency(), RED),
        (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100), RED),
        (encode(Image.new("RGBA", (4, 4), (9, 8, 7, 0))), (9, 8, 7)),
        (encode(Image.new("LA", (4, 4), (9, 0))), (9, 9, 9)),
        (encode(Image.new("L", (4, 4), 200)), (200, 200, 200)),
        (encode(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (png_by_hand(1, 1, bits=16, rows=b"\0" + struct.pack(">3H", 65535, 0, 0)), RED),
        (np.full((4, 4), 7, np.uint8), (7, 7, 7)),
        (np.full((4, 4, 4), 7, np.uint8), (7, 7, 7)),
        (np.full((9, 9, 3), 7, np.uint8)[::-2, ::2], (7, 7, 7)),
    ],
    ids=["palette", "cmyk", "rgba", "la", "grey", "bits", "rgb16", "HW", "HW4", "strided"],
)
def test_every_kind_of_picture_becomes_rgb_and_alpha_is_dropped(
    source: bytes | np.ndarray, expected: tuple[int, ...]
) -> None:
    image = open_image(source)
    assert image.mode == "RGB"
    assert first_pixel(image) == expected


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_clipped_as_the_released_model_sees_it(image_format: str) -> None:
    grey = np.arange(0, 512, 32, dtype=np.uint16).reshape(4, 4)
    opened = np.asarray(open_image(encode(Image.fromarray(grey), image_format)))
    np.testing.assert_array_equal(opened[..., 0], np.minimum(grey, 255))


def test_exif_orientation_counts_only_when_upright_is_asked_for() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    encoded = encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    assert open_image(encoded).size == (6, 4)
    assert open_image(encoded, upright=True).size == (4, 6)


# ── bad, in one line ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "image: empty file, expected an encoded picture"),
        (b"this is text", "image: not a picture that Pillow can read"),
        (png_by_hand(0, 5), "image: not a picture that Pillow can read"),
        (png_by_hand(4, 4), "image: damaged picture ("),
        (png_by_hand(30_000, 30_000), "image: 900,000,000 pixels are too many, at most 178,956,97"),
        (np.zeros((4, 4, 3), np.float32), "image: array of float32 (4, 4, 3), expected uint8"),
        (np.zeros((4, 4, 3), np.int64), "image: array of int64 (4, 4, 3), expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), "image: array of uint8 (4, 4, 2), expected uint8 (H, W)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "image: array of uint8 (1, 4, 4, 3), expected"),
        (np.zeros((0, 4, 3), np.uint8), "image: array of shape (0, 4, 3) holds no pixels"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_named_in_one_line(source: bytes | np.ndarray, words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_image(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_half_a_file_is_a_data_error(image_format: str) -> None:
    encoded = noise(image_format)
    with pytest.raises(DataError, match=r"^half: (damaged picture \(|not a picture that Pillow)"):
        open_image(encoded[: len(encoded) // 2], name="half")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_random_damage_gives_a_picture_or_a_data_error(image_format: str) -> None:
    rng = np.random.default_rng(0)
    outcomes: list[str] = []
    for _ in range(100):
        damaged = bytearray(noise(image_format))
        for position in rng.integers(0, len(damaged), 5):
            damaged[position] = rng.integers(256)
        try:
            outcomes.append(open_image(bytes(damaged), name="damaged").mode)
        except DataError as error:
            outcomes.append(str(error))
    assert not [text for text in outcomes if text != "RGB" and not text.startswith("damaged: ")]
    assert not [text for text in outcomes if "\n" in text]


def test_a_picture_that_pillow_has_not_decoded_yet_fails_the_same_way() -> None:
    encoded = noise("PNG")
    with pytest.raises(DataError, match="image: damaged picture"):
        open_image(Image.open(io.BytesIO(encoded[: len(encoded) // 2])))


def test_a_picture_in_memory_beyond_the_limit_is_refused() -> None:
    wide = Image.new("1", (MAX_PIXELS // 1_000 + 1, 1_000))
    with pytest.raises(DataError, match=r"image: 178957x1000 pixels are too many"):
        open_image(wide)


def test_a_missing_file_a_folder_and_a_text_file_are_named_by_path(tmp_path: Path) -> None:
    text = tmp_path / "笔记.png"
    text.write_text("不是图片", encoding="utf-8")
    for path, words in (
        (tmp_path / "nowhere.png", "no such file, expected a picture; check the path"),
        (tmp_path, "cannot be read (is a directory), expected a picture file"),
        (text, "not a picture that Pillow can read"),
    ):
        with pytest.raises(DataError) as caught:
            open_image(path)
        assert str(caught.value).startswith(f"{path}: {words}")


def test_the_given_name_stands_in_the_error() -> None:
    with pytest.raises(DataError, match=r"^pair-7: not a picture"):
        open_image(b"x", name="pair-7")


# ── folders ─────────────────────────────────────────────────────────────────────────────────────


def test_list_images_finds_pictures_at_any_depth_sorted_and_skips_the_rest(tmp_path: Path) -> None:
    kept = ["A.JPG", "b/深/c.webp", "b/猫.png"]
    skipped = ["note.txt", ".hidden.png", ".thumbs/x.png", "png"]
    for name in kept + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)] == kept


def test_listing_a_missing_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder, expected one with pictures"):
        list_images(tmp_path / "nowhere")
