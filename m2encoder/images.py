"""Open one picture, whatever it comes as, and find the pictures of a folder.

Not for resizing or normalising: model/image_processing_m2encoder.py and transforms.py do that.
"""

import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from m2encoder.errors import DataError

MAX_PIXELS = 178_956_970
"""Refuse larger pictures before decoding (about 0.5 GB once decoded); Pillow's own hard limit."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]


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
            return _to_rgb(source, name, upright)
        stream = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at half our limit, and on odd EXIF
            with Image.open(stream) as image:
                return _to_rgb(image, name, upright)
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


def _to_rgb(image: Image.Image, name: str, upright: bool) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(_too_large(name, f"{image.width}x{image.height} "))
    if upright:
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
