"""Pictures to pixel values with Pillow and NumPy alone; the evaluation transform of a model folder.

Not for training augmentation (m2encoder/transforms.py). Normalisation happens inside the model.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from PIL import Image
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_processing_utils import BatchFeature

ResizeMode = Literal["squash", "shortest"]


class Settings(TypedDict, total=False):
    """What a caller of `from_pretrained` may set; transformers 5 asks for it by this kind."""

    size_px: int
    resize_mode: ResizeMode


class M2EncoderImageProcessor(ImageProcessingMixin):
    """RGB, Pillow bicubic to a square, divided by 255.

    size_px: height and width of the result.
    resize_mode: `squash` scales both sides alike (released M2-Encoder: no crop, aspect ratio not
        kept); `shortest` scales the shorter side and crops the centre (CLIP).
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - the type that transformers expects
    valid_kwargs = Settings

    def __init__(
        self, size_px: int = 224, resize_mode: ResizeMode = "squash", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if resize_mode not in ("squash", "shortest"):
            raise ValueError(f"resize_mode is {resize_mode!r}, expected 'squash' or 'shortest'")
        self.size_px = size_px
        self.resize_mode = resize_mode

    def __call__(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """images: one or many Pillow images or arrays (H, W[, 3 or 4]) uint8.

        Returns {"pixel_values": (N, 3, S, S) float32 in 0..1}.
        """
        many = images if isinstance(images, Sequence) else [images]
        pixels = np.stack([self.to_pixels(image) for image in many])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    preprocess = __call__

    def to_pixels(self, image: Image.Image | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return one picture as (3, S, S) float32 in 0..1. Alpha is dropped, EXIF ignored."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        if self.resize_mode == "shortest":
            picture = resize_shortest_and_crop(picture, self.size_px)
        else:
            picture = resize_squash(picture, self.size_px, self.size_px)
        return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)


def resize_squash(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic in two passes, horizontal first: what Pillow <= 12 did and the released weights saw.

    Pillow 13 goes vertical first on many tall pictures, up to 5 levels off.
    """
    resized = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return resized.resize((width, height), Image.Resampling.BICUBIC)


def resize_shortest_and_crop(picture: Image.Image, size_px: int) -> Image.Image:
    """CLIP's transform: the shorter side to size_px (the longer rounded down), then the centre."""
    shortest = min(picture.size)
    width, height = (size_px * side // shortest for side in picture.size)
    resized = resize_squash(picture, width, height)
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    return resized.crop((left, top, left + size_px, top + size_px))


M2EncoderImageProcessor.register_for_auto_class()
