"""Pictures to pixels for evaluation: both resize modes, the official pictures, saved settings.

Not for opening files (test_images.py) nor for training crops (test_transforms.py).
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2encoder.encoder import Encoder
from m2encoder.images import open_image
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor, ResizeMode
from m2encoder.model.processing_m2encoder import M2EncoderProcessor

FIXTURES = Path(__file__).parent / "fixtures/official"
WHOLE = Path(__file__).resolve().parents[2] / "shared/conformance/official"
SIZES = [(300, 200), (97, 211), (60, 640), (31, 64), (640, 31), (64, 64), (17, 13), (1, 1), (1, 90)]


def photo(width: int, height: int) -> Image.Image:
    """Return smooth colours with noise, so that both filter and rounding show."""
    rng = np.random.default_rng([width, height])
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(17 * y * x), np.sin(30 * y)], axis=-1)
    pixels = 127 + 90 * waves + rng.normal(0, 20, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ── references ──────────────────────────────────────────────────────────────────────────────────


def cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def resize_columns(pixels: np.ndarray, new: int) -> np.ndarray:
    """Antialiased bicubic along axis 1, in Pillow's fixed point: (H, W, 3) -> (H, new, 3) uint8."""
    old = pixels.shape[1]
    stretch = max(old / new, 1.0)
    weights = np.zeros((new, old), dtype=np.int64)
    for column in range(new):
        centre = (column + 0.5) * old / new
        first = max(0, int(centre - 2 * stretch + 0.5))
        last = min(old, int(centre + 2 * stretch + 0.5))
        taps = np.array([cubic((i - centre + 0.5) / stretch) for i in range(first, last)])
        weights[column, first:last] = np.rint(taps / taps.sum() * 2**22)
    sums = np.einsum("hwc,nw->hnc", pixels.astype(np.int64), weights)
    return np.clip((sums + 2**21) >> 22, 0, 255).astype(np.uint8)


def squash_reference(picture: Image.Image, width: int, height: int) -> np.ndarray:
    """Horizontal pass, rounded to bytes, then the vertical one. Returns (height, width, 3)."""
    across = resize_columns(np.asarray(picture), width)
    return resize_columns(across.transpose(1, 0, 2), height).transpose(1, 0, 2)


def clip_reference(picture: Image.Image, size: int) -> np.ndarray:
    """As open_clip and torchvision: the longer side is rounded down, the centre cut out."""
    width, height = picture.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    resized = squash_reference(picture, width, height)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[top : top + size, left : left + size]


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """(3, S, S) float32 in 0..1 -> (S, S, 3) uint8, exactly."""
    levels = pixels.transpose(1, 2, 0) * np.float32(255)
    assert np.abs(levels - np.rint(levels)).max() < 1e-4
    return np.rint(levels).astype(np.uint8)


# ── squash, the released transform ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squash_is_bicubic_to_a_square_horizontal_pass_first(size: tuple[int, int]) -> None:
    """On every Pillow: 13 goes vertical first on tall pictures, and so would differ."""
    pixels = M2EncoderImageProcessor(32).to_pixels(photo(*size))
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), np.float32)
    np.testing.assert_array_equal(to_bytes(pixels), squash_reference(photo(*size), 32, 32))


def test_squash_of_a_wide_picture_is_what_pillow_gives_in_one_call() -> None:
    pixels = M2EncoderImageProcessor(64).to_pixels(photo(300, 200))
    pillow = np.asarray(photo(300, 200).resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels, pillow.transpose(2, 0, 1) / np.float32(255))


def test_a_picture_of_the_right_size_is_only_divided_by_255() -> None:
    picture = photo(64, 64)
    for mode in ("squash", "shortest"):
        pixels = M2EncoderImageProcessor(64, mode).to_pixels(picture)
        np.testing.assert_array_equal(
            pixels, np.asarray(picture).transpose(2, 0, 1) / np.float32(255)
        )


@pytest.mark.parametrize(("folder", "count"), [(FIXTURES, 8), (WHOLE, 25)])
def test_the_released_pictures_give_the_released_pixels(folder: Path, count: int) -> None:
    if not folder.is_dir():
        pytest.skip("the whole set of the released code's files is not beside us")
    expected = np.load(folder / "image_preprocess_expected.npz")
    assert len(expected.files) == count
    for key in expected.files:
        name, _, size = key.rpartition("@")
        want = expected[key].astype(np.float32) / np.float32(255)
        picture = open_image(folder / "images" / Path(name).name)
        got = M2EncoderImageProcessor(int(size)).to_pixels(picture)
        levels = 2.01 if name.endswith(".jpg") else 0  # JPEG decoders differ a little
        assert np.abs(got - want).max() * 255 <= levels, key


# ── shortest, CLIP's transform ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shortest_scales_the_shorter_side_and_crops_the_centre(size: tuple[int, int]) -> None:
    pixels = M2EncoderImageProcessor(32, "shortest").to_pixels(photo(*size))
    np.testing.assert_array_equal(to_bytes(pixels), clip_reference(photo(*size), 32))


def test_shortest_keeps_the_aspect_ratio_where_squash_does_not() -> None:
    """A circle in a wide picture stays as wide as high."""
    y, x = np.mgrid[0:100, 0:300]
    disc = ((y - 50) ** 2 + (x - 150) ** 2 < 40**2) * np.uint8(255)
    picture = Image.fromarray(np.stack([disc] * 3, axis=-1))
    cases: list[tuple[ResizeMode, float]] = [("shortest", 1.0), ("squash", 1 / 3)]
    for mode, ratio in cases:
        seen = M2EncoderImageProcessor(90, mode).to_pixels(picture)[0] > 0.5
        wide, high = seen.any(axis=0).sum(), seen.any(axis=1).sum()
        assert wide / high == pytest.approx(ratio, abs=0.05)


def test_an_unknown_resize_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="resize_mode is 'crop', expected 'squash' or 'shortest'"):
        M2EncoderImageProcessor(64, "crop")  # pyright: ignore[reportArgumentType]


# ── what it takes, what it gives, what it keeps ─────────────────────────────────────────────────


def test_arrays_and_pictures_of_every_mode_give_rgb_and_alpha_is_dropped() -> None:
    picture = photo(50, 40)
    processor = M2EncoderImageProcessor(16)
    want = processor.to_pixels(picture)
    transparent = picture.copy()
    transparent.putalpha(0)
    for same in (np.asarray(picture), transparent, np.asarray(transparent)):
        np.testing.assert_array_equal(processor.to_pixels(same), want)
    grey = processor.to_pixels(picture.convert("L"))
    np.testing.assert_array_equal(grey[0], grey[2])
    np.testing.assert_array_equal(processor.to_pixels(np.asarray(picture.convert("L"))), grey)


@pytest.mark.parametrize("kind", ["np", "pt", None])
def test_a_call_stacks_one_or_many_pictures(kind: str | None) -> None:
    processor = M2EncoderImageProcessor(16)
    pictures = [photo(50, 40), photo(20, 90)]
    many = np.asarray(processor(pictures, return_tensors=kind)["pixel_values"])
    assert (many.shape, many.dtype) == ((2, 3, 16, 16), np.float32)
    for row, picture in zip(many, pictures, strict=True):
        np.testing.assert_array_equal(row, processor.to_pixels(picture))
    one = np.asarray(processor(pictures[0], return_tensors=kind)["pixel_values"])
    np.testing.assert_array_equal(one, many[:1])


@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_settings_are_saved_and_read_back(mode: ResizeMode, tmp_path: Path) -> None:
    M2EncoderImageProcessor(48, mode).save_pretrained(tmp_path)
    again = M2EncoderImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, M2EncoderImageProcessor)
    assert (again.size_px, again.resize_mode) == (48, mode)
    picture = photo(70, 50)
    np.testing.assert_array_equal(
        again.to_pixels(picture), M2EncoderImageProcessor(48, mode).to_pixels(picture)
    )


def test_the_processor_joins_pictures_and_texts(tiny_encoder: Encoder) -> None:
    processor = M2EncoderProcessor(tiny_encoder.image_processor, tiny_encoder.tokenizer)
    both = processor(images=[photo(40, 30)] * 2, text=["一只红色的猫", "a cat", "繁體"])
    assert both["pixel_values"].shape == (2, 3, 32, 32)
    assert both["input_ids"].shape == both["attention_mask"].shape
    assert len(both["input_ids"]) == 3
    out = tiny_encoder.model(**both)
    assert out.logits_per_image.shape == (2, 3)
    assert list(processor(text="猫").keys()) == ["input_ids", "attention_mask"]
    assert list(processor(images=photo(8, 8)).keys()) == ["pixel_values"]


def test_the_processor_cuts_long_texts_and_wants_something(tiny_encoder: Encoder) -> None:
    processor = M2EncoderProcessor(tiny_encoder.image_processor, tiny_encoder.tokenizer)
    assert processor(text=["猫" * 10_000, "a"])["input_ids"].shape == (2, 52)
    with pytest.raises(ValueError, match="give images, text or both"):
        processor()
