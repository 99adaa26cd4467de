"""Open one picture, whatever it comes as, and find the pictures of a folder.

Not for resizing or normalising: model/image_processing_m2encoder.py and transforms.py do that.
"""

import io
import os
import re
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from m2encoder.errors import DataError

MAX_PIXELS = 178_956_970
"""Refuse larger pictures before decoding (about 0.5 GB once decoded); Pillow's own hard limit."""

HEIF_SUFFIXES = frozenset({".heic", ".heif"})
"""Photographs of telephones; opened if pillow-heif is installed, else refused with its name."""
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
IMAGE_SUFFIXES = HEIF_SUFFIXES | {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"
}  # fmt: skip

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]


class _QuietPillow:
    """Ignore Pillow's own warnings (half our limit reached, odd EXIF) while a picture is opened.

    Threads share the interpreter's filters, and catch_warnings in each would put back what another
    one had set; so the first to come sets them and the last to go restores them.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._outside = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._outside = warnings.catch_warnings()
                self._outside.__enter__()
                warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._outside.__exit__(None, None, None)


_QUIET_PILLOW = _QuietPillow()


def open_image(
    source: ImageSource, *, name: str | None = None, upright: bool = False
) -> Image.Image:
    """Return the picture as RGB; alpha is dropped, not composited, as the released model does.

    source: a path, encoded bytes, a Pillow image, or an array (H, W), (H, W, 3) or (H, W, 4) uint8.
    name: what to call it in an error; by default its path.
    upright: turn it by its EXIF orientation. Off for released-style evaluation, on for search.
    Raises DataError if it cannot be read or holds more than MAX_PIXELS pixels.
    """
    name = name or (str(source) if isinstance(source, str | os.PathLike) else "image")
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    if isinstance(source, bytes) and not source:
        raise DataError(f"{name}: empty file, expected an encoded picture; remove or replace it")
    try:
        if isinstance(source, Image.Image):  # perhaps not decoded yet, so it may fail here
            return _to_rgb(source, name, upright, is_own=False)
        stream = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
        with _QUIET_PILLOW, _open_encoded(stream, name) as image:
            return _to_rgb(image, name, upright, is_own=True)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file, expected a picture; check the path") from None
    except (IsADirectoryError, PermissionError) as error:
        reason = (error.strerror or "refused").lower()
        raise DataError(f"{name}: cannot be read ({reason}), expected a picture file") from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))  # Pillow names the count, not width and height
        raise DataError(_too_large(name, f"{int(found[0]):,} " if found else "")) from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name}: not a picture that Pillow can read; remove it or convert it to JPEG or PNG"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: damaged picture ({reason}); remove or replace it") from None


def has_heif() -> bool:
    """Say whether HEIC pictures can be opened here."""
    return find_spec("pillow_heif") is not None


@cache
def enable_heif() -> None:
    """Teach Pillow to open HEIC pictures; needs pillow-heif."""
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()


def _open_encoded(stream: io.BytesIO | Path, name: str) -> Image.Image:
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        if not _is_heif(stream):  # whatever its name is: telephones also write them as .jpg
            raise
    if not has_heif():
        raise DataError(
            f"{name}: HEIC picture, which needs pillow-heif; install it with: "
            f"pip install 'm2encoder[heic]'"
        )
    enable_heif()
    return Image.open(stream)


def _is_heif(stream: io.BytesIO | Path) -> bool:
    if isinstance(stream, Path):
        with stream.open("rb") as file:
            head = file.read(12)
    else:
        head = stream.getvalue()[:12]
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _to_rgb(image: Image.Image, name: str, upright: bool, *, is_own: bool) -> Image.Image:
    """is_own: nobody else has this picture, so it may be changed and returned itself."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(_too_large(name, f"{image.width}x{image.height} "))
    if isinstance(image, JpegImageFile) and is_own:  # a photograph: each copy takes half a ms
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        image.load()
        if image.mode == "RGB":
            return image
    elif upright:
        image = ImageOps.exif_transpose(image)
    # Pillow clips 16-bit grey at 255, so most of it turns white: that is what the released model
    # sees, and the conformance pictures hold us to it.
    return image.convert("RGB")


def _too_large(name: str, found: str) -> str:
    return f"{name}: {found}pixels are too many, at most {MAX_PIXELS:,} are read; scale it down"


def _from_array(array: np.ndarray[Any, Any], name: str) -> Image.Image:
    is_picture = array.ndim in (2, 3) and array.shape[2:] in ((), (3,), (4,))
    if array.dtype != np.uint8 or not is_picture:
        raise DataError(
            f"{name}: array of {array.dtype} {array.shape}, expected uint8 (H, W), (H, W, 3) or "
            f"(H, W, 4); convert it first"
        )
    if array.size == 0:
        raise DataError(f"{name}: array of shape {array.shape} holds no pixels; leave it out")
    return Image.fromarray(array)


def list_images(folder: Path) -> list[Path]:
    """Return every picture below `folder`, sorted by path; hidden files and folders are left out.

    Raises DataError if the folder is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with pictures; check the path")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
