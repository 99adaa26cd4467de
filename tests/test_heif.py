"""HEIC pictures are opened where pillow-heif is installed, else its pip line is shown.

Not for other formats (test_images.py).
"""

import base64

import pytest

from m2encoder.errors import DataError
from m2encoder.images import has_heif, list_images, open_image
from m2encoder.index import build_index

# 48 x 32, left half red, right half blue, taken on 2024-05-01; written with pillow-heif.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAb5tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAA"
    "AAAAAAAAADRpbG9jAAAAAERAAAIAAQAAAAAB4gABAAAAAAAAACUAAgAAAAACBwABAAAAAAAAAFYAAAA4aWluZgAAAAAA"
    "AgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADd"
    "aXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAq"
    "QgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQAN"
    "AAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAADAAAAABAAAAIAAAAAH////wAAAAAv///+AAAAACAAAAEHBp"
    "eGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAABppcmVmAAAAAAAAAA5jZHNjAAIAAQABAAAAg21kYXQA"
    "AAAhKAGvWPkS3f/WE/+dNIcPGc77+oQF2M8/QBoWnjuSMgDDAAAABkV4aWYAAE1NACoAAAAIAAIBEgADAAAAAQAGAACH"
    "aQAEAAAAAQAAACYAAAAAAAGQAwACAAAAFAAAADgAAAAAMjAyNDowNTowMSAwODowMDowMAA="
)
without = pytest.mark.skipif(has_heif(), reason="pillow-heif is installed here")
needs_heif = pytest.mark.skipif(not has_heif(), reason="needs pillow-heif (extra heic)")


@pytest.fixture
def photos(tmp_path):
    """Three names for the same picture, and one that is cut off."""
    folder = tmp_path / "照片"
    folder.mkdir()
    for name in ("a.HEIC", "猫.heif", "really heic.jpg"):
        (folder / name).write_bytes(HEIC)
    (folder / "cut.heic").write_bytes(HEIC[:300])
    return folder


def test_they_are_listed_as_pictures(photos):
    assert len(list_images(photos)) == 4


@without
@pytest.mark.parametrize("name", ["a.HEIC", "really heic.jpg"])
def test_without_the_package_the_error_names_it(photos, name):
    with pytest.raises(DataError, match=r"HEIC picture.*pip install 'm2encoder\[heic\]'"):
        open_image(photos / name)
    with pytest.raises(DataError, match=r"HEIC picture.*pip install"):
        open_image(HEIC, name=name)


@without
def test_without_the_package_they_are_left_out_by_name(photos, tiny_encoder, tmp_path, tiny_shards):
    from m2encoder.shards import ShardReader

    (photos / "fine.png").write_bytes(ShardReader(tiny_shards / "test")[0].image)
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    assert index.names == ["fine.png"]
    reasons = {bad.name: bad.reason for bad in index.skipped}
    assert len(reasons) == 4
    assert all("m2encoder[heic]" in reason for reason in reasons.values())


@needs_heif
def test_they_are_opened(photos):
    for source in (photos / "猫.heif", photos / "really heic.jpg", HEIC):
        picture = open_image(source)
        assert (picture.size, picture.mode) == ((48, 32), "RGB")
        for at, hot, cold in ((5, 0, 2), (42, 2, 0)):
            colour = picture.getpixel((at, 16))
            assert isinstance(colour, tuple)
            assert colour[hot] > 200 > 60 > colour[cold]


@needs_heif
def test_they_are_found_with_the_date_they_were_taken(photos, tiny_encoder, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    assert [bad.name for bad in index.skipped] == ["cut.heic"]
    hits = index.search(tiny_encoder.encode_image(HEIC), 9, where="date=2024-05-01")[0]
    assert [round(hit.score, 4) for hit in hits] == [1, 1, 1]
