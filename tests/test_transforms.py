"""Training augmentation: crops lie inside, the generator decides everything, defaults are mild."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2encoder.config import Augment
from m2encoder.errors import ConfigError
from m2encoder.transforms import augment, random_crop_box

NOTHING = Augment(crop_scale_min=1.0, crop_ratio_max=1.0)
EVERYTHING = Augment(
    crop_scale_min=0.3, crop_ratio_max=2.0, flip=True, rotate_degrees=20.0, color_jitter=0.4
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def halves() -> Image.Image:
    """Return a picture with a red left and a blue right half."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:, 2] = 255
    return Image.fromarray(pixels)


def many(picture: Image.Image, settings: Augment, count: int = 60) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([augment(picture, 16, settings, rng) for _ in range(count)])


# ── crops ───────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    scale=st.floats(0.01, 1),
    ratio=st.floats(1, 5),
    seed=st.integers(0, 2**32),
)
def test_a_crop_lies_inside_and_keeps_its_share_and_stretch(
    width: int, height: int, scale: float, ratio: float, seed: int
) -> None:
    chosen = Augment(crop_scale_min=scale, crop_ratio_max=ratio)
    left, top, right, bottom = random_crop_box(width, height, chosen, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down = (right - left) / width, (bottom - top) / height
    assert across * down <= 1
    # Where the stretched crop would not fit, its longer side ends at the edge.
    if across < 1 - 1e-9 and down < 1 - 1e-9:
        assert across * down >= scale * (1 - 1e-6)
        assert 1 / ratio * (1 - 1e-6) <= across / down <= ratio * (1 + 1e-6)


def test_crops_reach_every_edge_and_every_size() -> None:
    chosen = Augment(crop_scale_min=0.25, crop_ratio_max=1.0)
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(100, 100, chosen, rng) for _ in range(500)])
    widths = boxes[:, 2] - boxes[:, 0]
    assert widths.min() < 55
    assert widths.max() > 98
    assert boxes[:, :2].min() < 1
    assert boxes[:, 2:].max() > 99
    assert np.mean((widths / 100) ** 2) == pytest.approx(0.625, abs=0.03)  # uniform share of area


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 900), (900, 1), (3, 2), (500, 333), (16, 16)], ids=str
)
@pytest.mark.parametrize("chosen", [Augment(), NOTHING, EVERYTHING], ids=["mild", "none", "all"])
def test_every_picture_gives_bytes_of_the_models_size(
    size: tuple[int, int], chosen: Augment
) -> None:
    for pixels in many(noise(*size), chosen, 10):
        assert (pixels.shape, pixels.dtype) == ((3, 16, 16), np.uint8)


def test_with_nothing_to_draw_it_is_pillows_bicubic_resize() -> None:
    picture = noise(50, 40)
    want = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    for pixels in many(picture, NOTHING, 5):
        np.testing.assert_array_equal(pixels, want)


# ── the generator decides ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chosen", [Augment(), EVERYTHING], ids=["mild", "all"])
def test_the_same_generator_gives_the_same_bytes_and_another_does_not(chosen: Augment) -> None:
    def run(seed: int) -> bytes:
        return augment(noise(60, 50), 16, chosen, np.random.default_rng(seed)).tobytes()

    assert run(3) == run(3)
    assert len({run(seed) for seed in range(10)}) == 10


def test_no_global_random_state_is_touched() -> None:
    before = np.random.get_state()[1].tobytes()  # pyright: ignore
    augment(noise(60, 50), 16, EVERYTHING, np.random.default_rng(0))
    assert np.random.get_state()[1].tobytes() == before  # pyright: ignore


def test_the_picture_given_is_left_as_it_was() -> None:
    picture = noise(30, 30)
    before = picture.tobytes()
    many(picture, EVERYTHING, 5)
    assert picture.tobytes() == before


# ── flip, rotation, colours ─────────────────────────────────────────────────────────────────────


def test_left_and_right_are_never_swapped_by_default() -> None:
    for pixels in many(halves(), Augment()):
        assert pixels[0, :, 0].min() > 200  # red stays left
        assert pixels[2, :, -1].min() > 200


def test_flip_mirrors_about_half_of_the_pictures() -> None:
    red_left = many(halves(), Augment(crop_scale_min=1, crop_ratio_max=1, flip=True), 400)[
        :, 0, 0, 0
    ]
    assert set(red_left.tolist()) == {0, 255}
    assert np.mean(red_left == 255) == pytest.approx(0.5, abs=0.08)


def test_colours_stay_by_default() -> None:
    plain = Image.new("RGB", (40, 30), (200, 30, 90))
    pixels = many(plain, Augment())
    np.testing.assert_array_equal(pixels, np.broadcast_to(pixels[:1, :, :1, :1], pixels.shape))
    assert pixels[0, :, 0, 0].tolist() == [200, 30, 90]


def test_jitter_changes_colours_by_about_its_share() -> None:
    grey = Image.new("RGB", (20, 20), (100, 100, 100))
    means = many(grey, Augment(color_jitter=0.2), 300).mean(axis=(1, 2, 3))
    assert means.std() > 5
    assert means.min() >= 79
    assert means.max() <= 121


def test_rotation_fills_corners_with_the_edges_mean_colour() -> None:
    plain = Image.new("RGB", (40, 30), (200, 30, 90))
    turned = Augment(crop_scale_min=1, crop_ratio_max=1, rotate_degrees=45)
    assert set(
        map(tuple, many(plain, turned, 20).transpose(0, 2, 3, 1).reshape(-1, 3).tolist())
    ) == {(200, 30, 90)}


def test_rotation_turns_both_ways_by_at_most_its_degrees() -> None:
    bar = np.zeros((81, 81, 3), np.uint8)
    bar[39:42] = 255
    bar[39:42, :40, 1:] = 0  # red to the left
    turned = Augment(crop_scale_min=1, crop_ratio_max=1, rotate_degrees=30)
    rng = np.random.default_rng(0)
    angles = []
    for _ in range(60):
        pixels = augment(Image.fromarray(bar), 81, turned, rng)
        y, x = np.nonzero(pixels[1] > 128)  # the white half, to the right of the middle
        angles.append(float(np.degrees(np.arctan2(40 - y.mean(), x.mean() - 40))))
    assert -31 < min(angles) < -20
    assert 20 < max(angles) < 31


@pytest.mark.parametrize(
    "wrong", [{"crop_scale_min": 0.0}, {"crop_scale_min": 1.5}, {"crop_ratio_max": 0.5},
              {"color_jitter": 1.0}, {"color_jitter": -0.1}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"data\.augment\.{next(iter(wrong))} must .*, got "):
        Augment(**wrong)
