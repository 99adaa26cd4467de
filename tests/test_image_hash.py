"""Copies are found again whatever was done to the file; other pictures are not, however alike.

Not for going through training data: tests/eval/test_contamination.py.
"""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from m2encoder.errors import DataError
from m2encoder.image_hash import (
    INSETS,
    MAX_RESIDUAL,
    SIDE_PX,
    CopyFinder,
    Thumbprint,
    copy_residual,
    perceptual_hashes,
    small_copy,
    thumbprint,
)
from m2encoder.shards import ShardReader

WIDTH, HEIGHT = 320, 240


def photograph(seed):
    """A picture with detail at every scale, as photographs have it: noise with a 1/f spectrum."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.fftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        waves = np.fft.fft2(rng.normal(size=(HEIGHT, WIDTH))) / frequency
        plane = np.fft.ifft2(waves).real
        planes.append(plane / plane.std())
    common = planes[0]
    rgb = np.stack([128 + 45 * common + 12 * plane for plane in planes], axis=2)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def again(picture, *, quality=70, scale=0.8, crop=(0.0, 0.0, 0.0, 0.0)):
    """The picture cropped (top, bottom, left, right), scaled and encoded as JPEG."""
    top, bottom, left, right = crop
    width, height = picture.size
    box = (width * left, height * top, width * (1 - right), height * (1 - bottom))
    cut = picture.crop(tuple(map(round, box)))
    size = max(1, round(cut.width * scale)), max(1, round(cut.height * scale))
    return encoded(cut.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=quality)


@pytest.fixture(scope="module")
def pictures():
    return [photograph(seed) for seed in range(40)]


@pytest.fixture(scope="module")
def finder(pictures):
    return CopyFinder([thumbprint(encoded(picture)) for picture in pictures])


@pytest.fixture(scope="module")
def scenes(tiny_shards):
    """Drawn scenes, which look alike: flat shapes on five light backgrounds."""
    reader = ShardReader(tiny_shards / "test")
    return [Image.open(io.BytesIO(pair.image)).convert("RGB") for pair in reader]


def found(finder, images):
    return [[copy.row for copy in of] for of in finder.find([thumbprint(each) for each in images])]


# --- the same picture ----------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [50, 70, 95])
@pytest.mark.parametrize("scale", [0.5, 0.8, 1, 2])
def test_copies_are_found_after_jpeg_and_scaling(pictures, finder, quality, scale):
    images = [again(picture, quality=quality, scale=scale) for picture in pictures]
    assert found(finder, images) == [[row] for row in range(len(pictures))]


@pytest.mark.parametrize(
    "crop",
    [
        (0.01, 0.01, 0.01, 0.01),
        (0.025, 0.025, 0.025, 0.025),
        (0.05, 0.05, 0.05, 0.05),
        (0, 0.04, 0, 0),
        (0.01, 0.03, 0.03, 0),
    ],
)
def test_copies_are_found_after_small_crops_of_either_side(pictures, finder, crop):
    images = [again(picture, crop=crop) for picture in pictures]
    assert found(finder, images) == [[row] for row in range(len(pictures))]
    cropped = CopyFinder([thumbprint(each) for each in images])
    whole = [again(picture, quality=90, scale=1) for picture in pictures]
    assert found(cropped, whole) == [[row] for row in range(len(pictures))]


def test_copies_of_drawn_scenes_are_found_and_nothing_else(scenes):
    """Five hundred pixels of one colour each: the hardest pictures to tell apart that we have."""
    finder = CopyFinder([thumbprint(encoded(scene)) for scene in scenes])
    large = [scene.resize((64, 64), Image.Resampling.LANCZOS) for scene in scenes]
    images = [again(scene) for scene in large]
    rows = found(finder, images)
    assert np.mean([row in of for row, of in enumerate(rows)]) >= 0.95
    assert [of for row, of in enumerate(rows) if set(of) - {row}] == []


def test_the_same_bytes_are_the_same_file(pictures, finder):
    for row, picture in enumerate(pictures[:3]):
        (copy,) = finder.find([thumbprint(encoded(picture))])[0]
        assert copy == (row, "file", 0.0)


def test_equal_pictures_in_other_bytes_differ_in_nothing(pictures, finder):
    (copy,) = finder.find([thumbprint(encoded(pictures[5], "BMP"))])[0]
    assert (copy.row, copy.kind) == (5, "copy")
    assert copy.residual == pytest.approx(0, abs=1e-6)


def test_a_picture_known_twice_is_found_twice(pictures):
    prints = [thumbprint(encoded(pictures[k])) for k in (3, 1, 3)]
    assert found(CopyFinder(prints), [again(pictures[3])]) == [[0, 2]]


def test_a_copy_is_found_in_a_crowd_of_look_alikes():
    """More pictures of one layout than are looked at: the nearest ones must be among them."""
    crowd = []
    for k in range(90):
        picture = Image.new("RGB", (200, 200), (236, 226, 206))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((40, 40, 160, 160), fill=(40, 84, 208))
        x, y = 50 + 8 * (k % 12), 50 + 8 * (k // 12)
        draw.rectangle((x, y, x + 14, y + 14), fill=(250, 214, 30))
        crowd.append(picture)
    finder = CopyFinder([thumbprint(encoded(picture)) for picture in crowd])
    asked = range(0, 90, 3)
    rows = found(finder, [again(crowd[k], quality=90) for k in asked])
    assert rows == [[k] for k in asked]


def test_exif_orientation_is_undone(pictures, finder):
    turned = pictures[7].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # turn by 270 degrees to see it upright
    image = encoded(turned, "JPEG", quality=80, exif=exif)
    assert found(finder, [image]) == [[7]]


# --- other pictures ------------------------------------------------------------------------------


def test_different_pictures_are_never_copies(pictures, finder):
    others = [encoded(photograph(seed)) for seed in range(100, 130)]
    assert found(finder, others) == [[] for _ in others]


def test_pure_noise_has_no_copies():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(120)]
    finder = CopyFinder([thumbprint(each) for each in noise[:60]])
    assert found(finder, noise[60:]) == [[] for _ in range(60)]


def test_one_moved_or_recoloured_shape_makes_another_picture():
    def scene(x, colour):
        picture = Image.new("RGB", (128, 128), (206, 224, 238))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((10, 10, 50, 50), fill=(218, 38, 40), outline=(74, 74, 80), width=3)
        draw.rectangle((x, 70, x + 36, 106), fill=colour, outline=(74, 74, 80), width=3)
        return thumbprint(encoded(picture))

    first = scene(70, (36, 150, 60))
    finder = CopyFinder([first])
    moved, recoloured = scene(80, (36, 150, 60)), scene(70, (136, 48, 172))
    assert finder.find([moved, recoloured, scene(70, (36, 150, 60))])[:2] == [[], []]
    assert copy_residual(first.small, moved.small) > MAX_RESIDUAL
    assert copy_residual(first.small, recoloured.small) > MAX_RESIDUAL


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (120, 90, 30)])
def test_plain_pictures_match_only_the_same_file(colour):
    plain = encoded(Image.new("RGB", (64, 64), colour))
    slightly_other = encoded(Image.new("RGB", (80, 64), colour))
    finder = CopyFinder([thumbprint(plain)])
    assert finder.plain.tolist() == [True]
    assert [
        [c.kind for c in of] for of in finder.find([*map(thumbprint, (plain, slightly_other))])
    ] == [
        ["file"],
        [],
    ]


# --- the parts -----------------------------------------------------------------------------------


def test_hash_equals_the_transform_written_out(pictures):
    """The whole picture's hash by the formula of the DCT, term by term."""
    small = small_copy(pictures[0])
    y = small.astype(np.float64) @ [0.299, 0.587, 0.114]
    edges = np.linspace(0, SIDE_PX, 33)
    sampled = np.empty((32, 32))
    weights = np.array(
        [
            [max(0.0, min(edges[o + 1], i + 1) - max(edges[o], i)) for i in range(SIDE_PX)]
            for o in range(32)
        ]
    )
    sampled = weights @ y @ weights.T / 1.5**2
    cosines = np.cos(np.pi * (2 * np.arange(32) + 1)[None] * np.arange(8)[:, None] / 64)
    waves = np.array(
        [[(sampled * np.outer(cosines[u], cosines[v])).sum() for v in range(8)] for u in range(8)]
    )
    waves *= np.where(np.arange(8) == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))[:, None]
    waves *= np.where(np.arange(8) == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))[None]
    expected = waves.reshape(-1)[1:]
    brightness = perceptual_hashes(small[None])[0, 0, :63]
    assert np.allclose(
        brightness / np.linalg.norm(brightness), expected / np.linalg.norm(expected), atol=1e-5
    )


def test_hashes_are_unit_vectors_for_each_inset(pictures):
    hashes = perceptual_hashes(np.stack([small_copy(each) for each in pictures]))
    assert hashes.shape == (len(pictures), len(INSETS), 93)
    assert np.allclose(np.linalg.norm(hashes, axis=2), 1, atol=1e-5)


def test_batches_do_not_change_what_is_found(pictures, finder):
    images = [again(picture) for picture in pictures]
    one_by_one = [found(finder, [image])[0] for image in images]
    assert found(finder, images) == one_by_one


def test_residual_is_symmetric_and_zero_for_itself(pictures):
    one, other = small_copy(pictures[0]), small_copy(pictures[1])
    assert copy_residual(one, one) == 0
    assert copy_residual(one, other) == pytest.approx(copy_residual(other, one))


def test_nothing_known_and_nothing_asked_give_nothing(finder):
    assert finder.find([]) == []
    assert CopyFinder([]).find([Thumbprint(b"", np.zeros((48, 48, 3), np.uint8))]) == [[]]


def test_files_paths_and_arrays_give_the_same_small_copy(pictures, tmp_path):
    path = tmp_path / "图片 一.png"
    path.write_bytes(encoded(pictures[0]))
    prints = thumbprint(path), thumbprint(path.read_bytes()), thumbprint(np.asarray(pictures[0]))
    assert prints[0].sha256 == prints[1].sha256
    assert all(np.array_equal(each.small, prints[0].small) for each in prints)


@pytest.mark.parametrize("content", [b"", b"no picture", encoded(photograph(0), "JPEG")[:2000]])
def test_unreadable_pictures_are_refused_by_name(content):
    with pytest.raises(DataError, match=r"^坏图片: "):
        thumbprint(content, name="坏图片")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jpg: cannot be read \(no such file"):
        thumbprint(tmp_path / "nowhere.jpg")
